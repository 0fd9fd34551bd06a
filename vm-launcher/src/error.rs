//! What can go wrong between a spec and a running guest.

use std::error::Error;

use omerta_dataplane::{ErrorKind, GuardError};

use crate::jail::CellError;
use crate::{
    CanaryError, DiskError, ImageError, JailError, ProcessError, QmpError, RunDirError, SpecError,
    TapError,
};

/// Why a guest did not come up. Everything made for it is gone when this is returned, save what
/// [`LaunchError::LeftBehind`] lists.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher does not run as root.
    #[error("running a guest takes root, for its tap and its guard; use sudo")]
    NotRoot,
    /// The spec cannot be run.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It can have no disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The run directory cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The tap cannot be made or configured.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// This host cannot give its QEMU a jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// QEMU cannot be started or watched.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// QEMU cannot be spoken to, or says what it should not.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The control port's socket cannot be opened.
    #[error("cannot connect to the guest's control port")]
    ControlPort(#[source] std::io::Error),
    /// The guard cannot be attached or verified.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The guard did not drop the canary.
    #[error(transparent)]
    Canary(#[from] CanaryError),
    /// It failed, and what was made for it could not be undone.
    #[error("{}; left behind: {}", cause.report(), leftovers.join("; "))]
    LeftBehind {
        /// Why the guest did not come up.
        cause: Box<LaunchError>,
        /// What could not be removed and why, one line each.
        leftovers: Vec<String>,
    },
}

impl From<CellError> for LaunchError {
    fn from(error: CellError) -> Self {
        match error {
            CellError::Jail(error) => error.into(),
            CellError::Image(error) => error.into(),
            CellError::NoProgram => ProcessError::QemuMissing.into(),
        }
    }
}

impl LaunchError {
    /// What class of failure this is, for exit codes and status codes.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Spec(_) => ErrorKind::Usage,
            Self::Image(ImageError::Missing { .. }) => ErrorKind::NotFound,
            Self::Disk(DiskError::NoRoom { .. }) => ErrorKind::Refused,
            Self::Guard(error) => error.kind(),
            Self::Tap(TapError::Exists(_) | TapError::AddressTaken { .. }) => ErrorKind::Refused,
            Self::LeftBehind { cause, .. } => cause.kind(),
            _ => ErrorKind::Failed,
        }
    }

    /// Why the guest did not come up, and what could not be undone after that.
    pub fn split(self) -> (Self, Vec<String>) {
        match self {
            Self::LeftBehind { cause, leftovers } => (*cause, leftovers),
            cause => (cause, Vec::new()),
        }
    }

    /// The error and its causes in one line.
    pub fn report(&self) -> String {
        report(self)
    }
}

/// An error and its causes in one line.
pub(crate) fn report(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
