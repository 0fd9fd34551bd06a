//! All that exists of one guest on this host, and its undoing in reverse order.

use std::sync::Arc;
use std::time::Duration;

use omerta_dataplane::Guard;

use crate::clock::monotonic_ns;
use crate::lifecycle::Ended;
use crate::process::QemuProcess;
use crate::run_dir::RunDir;
use crate::tap::Tap;
use crate::{ExitStatus, Spec};

/// How long a killed QEMU may take to be gone: it has memory to give back.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// How long a tap may take to be gone once it is closed.
const TAP_DEADLINE: Duration = Duration::from_secs(1);

/// What has been made so far. Dropping it at any point undoes just that.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) spec: Spec,
    pub(super) run_dir: Option<RunDir>,
    pub(super) tap: Option<Tap>,
    pub(super) process: Option<Arc<QemuProcess>>,
    pub(super) guard: Option<Guard>,
}

impl Machine {
    pub(super) fn new(spec: Spec) -> Self {
        Self {
            spec,
            run_dir: None,
            tap: None,
            process: None,
            guard: None,
        }
    }

    /// Undoes everything, newest first. Nothing is undone whose user might still be there: as long
    /// as QEMU is not proven dead, its guard stays attached.
    pub(super) fn unwind(&mut self) -> Ended {
        let mut leftovers = Vec::new();
        let status = self.end_process(&mut leftovers);
        let ended_at_ns = monotonic_ns();
        let process_is_gone = leftovers.is_empty();
        if let Some(guard) = self.guard.take() {
            if process_is_gone {
                if let Err(error) = guard.detach() {
                    leftovers.push(format!("guard of {}: {error}", self.spec.tap));
                }
            } else {
                leftovers.push(format!(
                    "guard of {}: kept, since QEMU may still send",
                    self.spec.tap
                ));
            }
        }
        if let Some(tap) = self.tap.take()
            && !tap.remove(TAP_DEADLINE)
        {
            leftovers.push(format!("interface {}: still held open", self.spec.tap));
        }
        let tap_removed_at_ns = monotonic_ns();
        self.run_dir = None;
        if self.spec.run_dir.exists() && process_is_gone && status.is_some() {
            leftovers.push(format!("directory {}", self.spec.run_dir.display()));
        }
        Ended {
            status,
            ended_at_ns,
            tap_removed_at_ns,
            leftovers,
        }
    }

    fn end_process(&mut self, leftovers: &mut Vec<String>) -> Option<ExitStatus> {
        match self.process.take()?.kill_and_reap(KILL_DEADLINE) {
            Ok(status) => Some(status),
            Err(error) => {
                leftovers.push(format!("process: {error}"));
                None
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for leftover in self.unwind().leftovers {
            tracing::error!(guest = %self.spec.name, leftover, "left behind");
        }
    }
}
