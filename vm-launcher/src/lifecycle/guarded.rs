//! A guest whose guard is attached, verified and proven, and that has not run.

use omerta_dataplane::Guard;

use crate::lifecycle::{Ended, Paused, Running};
use crate::{LaunchError, Spec};

/// The tap is up behind a proven guard; no instruction of the guest has run. The only state from
/// which a guest can be resumed.
#[derive(Debug)]
pub struct Guarded {
    paused: Paused,
    guard: Guard,
}

impl Guarded {
    pub(super) fn new(paused: Paused, guard: Guard) -> Self {
        Self { paused, guard }
    }

    /// Verifies the guard once more and lets the guest run.
    ///
    /// # Errors
    /// When the guard is not what it was, or QEMU does not do it; the guest is gone then.
    pub async fn resume(self) -> Result<Running, LaunchError> {
        match self.cont().await {
            Ok(()) => Ok(Running::new(self.paused, self.guard)),
            Err(error) => Err(self.end().await.after(error)),
        }
    }

    async fn cont(&self) -> Result<(), LaunchError> {
        self.guard.verify()?;
        self.paused.qmp.cont().await?;
        Ok(())
    }

    /// Kills QEMU, which has run nothing, and removes everything.
    pub async fn end(self) -> Ended {
        self.paused.end().await
    }

    /// The guard, for reading its counters before the guest runs.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// What is being run.
    pub fn spec(&self) -> &Spec {
        &self.paused.machine.spec
    }
}
