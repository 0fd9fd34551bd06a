//! A guest whose guard is attached, verified and proven, and that has not run.

use std::sync::Arc;

use omerta_dataplane::{Guard, GuardWatch};

use crate::guard_alarm::GuardAlarm;
use crate::lifecycle::{Ended, Paused, Running, Traces};
use crate::link_watch::LinkWatch;
use crate::{LaunchError, Spec, TapError};

/// The tap is up behind a proven guard; no instruction of the guest has run. The only state from
/// which a guest can be resumed.
#[derive(Debug)]
pub struct Guarded {
    paused: Paused,
    guarding: Guarding,
}

/// A proven guard, and what tells when it is no longer what was proven.
#[derive(Debug)]
pub(super) struct Guarding {
    pub(super) guard: Guard,
    pub(super) watch: Arc<GuardWatch>,
    /// The tap's index.
    pub(super) tap: u32,
}

impl Guarded {
    pub(super) fn new(paused: Paused, guarding: Guarding) -> Self {
        Self { paused, guarding }
    }

    /// Verifies the guard once more and lets the guest run.
    ///
    /// # Errors
    /// When the guard is not what it was, or QEMU does not do it; the guest is gone then.
    pub async fn resume(self) -> Result<Running, LaunchError> {
        match self.cont().await {
            Ok((links, alarm)) => Ok(Running::new(self.paused, self.guarding, links, alarm, None)),
            Err(error) => Err(self.end().await.after(error)),
        }
    }

    async fn cont(&self) -> Result<(LinkWatch, GuardAlarm), LaunchError> {
        // First the subscriptions, then the proof: no change falls between.
        let links = LinkWatch::open(self.guarding.tap).map_err(TapError::Netlink)?;
        let alarm = GuardAlarm::of(self.guarding.watch.occasions()?).map_err(TapError::Netlink)?;
        self.guarding.watch.check()?;
        self.paused.qmp.cont().await?;
        Ok((links, alarm))
    }

    /// What tells this guest's process, tap and guard from all others.
    pub fn traces(&self) -> Traces {
        self.paused.machine.traces()
    }

    /// Kills QEMU, which has run nothing, and removes everything.
    pub async fn end(self) -> Ended {
        let Self { paused, guarding } = self;
        drop(guarding);
        paused.end().await
    }

    /// The guard, for reading its counters before the guest runs.
    pub fn guard(&self) -> &Guard {
        &self.guarding.guard
    }

    /// What is being run.
    pub fn spec(&self) -> &Spec {
        &self.paused.machine.spec
    }
}
