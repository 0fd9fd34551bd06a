//! Commands to a running guest, usable from any task.

use std::sync::Arc;
use std::time::Duration;

use omerta_dataplane::{Guard, GuardError, GuardWatch};
use tokio::sync::mpsc;

use crate::clock::monotonic_ns;
use crate::qmp::Qmp;
use crate::{Consumer, LaunchError};

/// A handle that commands one guest. Cheap to clone; of no effect once the guest is gone, which it
/// should not outlive for long: it holds the links of the guard.
#[derive(Clone, Debug)]
pub struct Control {
    qmp: Arc<Qmp>,
    watch: Arc<GuardWatch>,
    guard: Arc<Guard>,
    /// What the guest is to be told.
    words: mpsc::Sender<Consumer>,
}

impl Control {
    pub(super) fn new(
        qmp: Arc<Qmp>,
        watch: Arc<GuardWatch>,
        guard: Arc<Guard>,
        words: mpsc::Sender<Consumer>,
    ) -> Self {
        Self {
            qmp,
            watch,
            guard,
            words,
        }
    }

    /// Lets the guest reach where its consumer is now, and nothing else any more: one commit of the guard. Returns the
    /// epoch in force. Blocks for as long as another holds the guard's lock.
    ///
    /// # Errors
    /// When the guard is not what was proven, or does not take it; it judges as before then.
    pub fn allow(&self, consumer: &Consumer) -> Result<u64, LaunchError> {
        Ok(self
            .watch
            .replace(&self.guard, &[consumer.allowed_endpoint()])?)
    }

    /// Tells the guest where its consumer is: by its agent where that is asked, and else by its control port. It may not
    /// listen, which is its own affair.
    pub fn tell(&self, consumer: &Consumer) {
        // One that hears nothing is told no more than a few.
        let _ = self.words.try_send(*consumer);
    }

    /// Stops the guest. When this returns, none of its instructions runs until it is resumed. Gives
    /// the moment at which QEMU confirmed that: CLOCK_MONOTONIC, in nanoseconds.
    ///
    /// # Errors
    /// When QEMU does not confirm it in time, or says that the guest sleeps (ACPI S3): its own alarm
    /// may wake it, so it must be killed.
    pub async fn pause(&self) -> Result<u64, LaunchError> {
        self.qmp.stop().await?;
        Ok(monotonic_ns())
    }

    /// Verifies the guard and lets a paused guest run on.
    ///
    /// # Errors
    /// When the guard is not in place (the guest stays paused) or QEMU does not answer.
    pub async fn resume(&self) -> Result<(), LaunchError> {
        self.verify_guard()?;
        self.qmp.cont().await?;
        Ok(())
    }

    /// Presses the guest's power button. What the guest makes of it is its own affair.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn powerdown(&self) -> Result<(), LaunchError> {
        self.qmp.system_powerdown().await?;
        Ok(())
    }

    /// Presses the guest's reset button. The guard is looked at again, as at any reset.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn reset(&self) -> Result<(), LaunchError> {
        self.qmp.system_reset().await?;
        Ok(())
    }

    /// Tells QEMU to end, without asking the guest.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn quit(&self) -> Result<(), LaunchError> {
        self.qmp.quit().await?;
        Ok(())
    }

    /// QEMU's word for why a stopped guest can never go on, if so.
    pub(super) async fn fault(&self) -> Result<Option<&'static str>, LaunchError> {
        Ok(self.qmp.fault().await?)
    }

    /// What proves the guard.
    pub(super) fn guard_watch(&self) -> Arc<GuardWatch> {
        Arc::clone(&self.watch)
    }

    /// Begins the guard's lease anew.
    pub(super) fn renew_lease(&self, lease: Option<Duration>) -> Result<(), GuardError> {
        self.watch.renew(lease)
    }

    /// Fails where the guard is no longer what was proven, as far as nothing tells of that.
    pub(super) fn glance_at_guard(&self) -> Result<(), GuardError> {
        self.watch.glance()
    }

    /// Fails where the guard is no longer what was proven before the guest ran.
    pub(super) fn verify_guard(&self) -> Result<(), GuardError> {
        self.watch.check()
    }
}
