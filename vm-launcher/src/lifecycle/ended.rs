//! What is known when a guest is gone.

use omerta_dataplane::Counters;

use crate::{ExitStatus, LaunchError, Scrubbed};

/// A guest that is no more: QEMU reaped, guard detached, tap and run directory removed, save what
/// [`Ended::leftovers`] lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How QEMU ended; `None` if there was none, or if it could not be found out.
    pub status: Option<ExitStatus>,
    /// When QEMU was gone: CLOCK_MONOTONIC, in nanoseconds; `None` if it is not.
    pub ended_at_ns: Option<u64>,
    /// When the tap was gone: CLOCK_MONOTONIC, in nanoseconds; `None` if it is not.
    pub tap_removed_at_ns: Option<u64>,
    /// What the guard had counted when QEMU was gone; `None` if there was no guard, or if it could
    /// not be read.
    pub counters: Option<Counters>,
    /// What it had written to its disk, given back to the file system, looked at and found gone; `None`
    /// if it had no disk, or if that is among [`Ended::leftovers`].
    pub scrubbed: Option<Scrubbed>,
    /// The end of what the serial console had printed, at most [`Ended::MAX_CONSOLE_BYTES`].
    pub console: Vec<u8>,
    /// What could not be removed and why, one line each; empty when all went well.
    pub leftovers: Vec<String>,
}

impl Ended {
    /// The most of the serial console's log that outlives its guest, in bytes.
    pub const MAX_CONSOLE_BYTES: u64 = 64 << 10;

    /// The error that ended the guest, with what could not be undone after it.
    pub(crate) fn after(self, cause: LaunchError) -> LaunchError {
        if self.leftovers.is_empty() {
            return cause;
        }
        LaunchError::LeftBehind {
            cause: Box::new(cause),
            leftovers: self.leftovers,
        }
    }
}
