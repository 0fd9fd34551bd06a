//! All that exists of one guest on this host, and its undoing in reverse order.

use std::sync::Arc;
use std::time::Duration;

use omerta_dataplane::{Guard, GuardWatch};
use tokio::time::timeout;

use crate::clock::monotonic_ns;
use crate::disk::Disks;
use crate::jail::Cell;
use crate::lifecycle::attaching::Attaching;
use crate::lifecycle::{Ended, Traces};
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
    pub(super) cell: Option<Cell>,
    pub(super) disks: Option<Disks>,
    pub(super) run_dir: Option<RunDir>,
    pub(super) tap: Option<Tap>,
    pub(super) process: Option<Arc<QemuProcess>>,
    /// The guard, while it is made.
    pub(super) attaching: Option<Attaching>,
    pub(super) guard: Option<Guard>,
    /// What proves, again and again, that the guard is what was attached.
    pub(super) guard_watch: Option<Arc<GuardWatch>>,
}

impl Machine {
    pub(super) fn new(spec: Spec) -> Self {
        Self {
            spec,
            cell: None,
            disks: None,
            run_dir: None,
            tap: None,
            process: None,
            attaching: None,
            guard: None,
            guard_watch: None,
        }
    }

    /// What tells all that has been made so far from all else.
    pub(super) fn traces(&self) -> Traces {
        Traces {
            uid: self.cell.as_ref().map(Cell::uid),
            cgroups: self.cell.as_ref().map(|cell| cell.cgroups().to_vec()),
            process: self.process.as_ref().map(|qemu| (qemu.pid(), qemu.start())),
            tap: self.tap.as_ref().map(Tap::index),
            guard: self.guard.as_ref().map(Guard::identity),
            // Comes after the guest runs.
            agent: None,
        }
    }

    /// Leaves all as it is, and lets go of it: it may be taken over, or ended, by its traces.
    pub(super) fn let_go(mut self) {
        if let Some(process) = self.process.take() {
            process.let_go();
        }
        if let Some(run_dir) = self.run_dir.take() {
            run_dir.let_go();
        }
        if let Some(cell) = self.cell.take() {
            cell.let_go();
        }
        self.disks = None;
        self.guard = None;
        self.guard_watch = None;
        self.tap = None;
        // Nothing is left in it to undo.
    }

    /// Kills QEMU and undoes everything, keeping nobody waiting meanwhile.
    pub(super) async fn end(mut self) -> Ended {
        if let Some(process) = &self.process {
            if let Err(error) = process.kill() {
                tracing::warn!(guest = %self.spec.name, %error, "cannot kill");
            }
            // Usually a few milliseconds, spent here rather than in `unwind`, which blocks.
            let _ = timeout(KILL_DEADLINE, process.wait()).await;
        }
        // Closing the tap waits some 50 ms for the kernel; other guests' tasks need not.
        let name = self.spec.name.clone();
        let unwound = tokio::task::spawn_blocking(move || self.unwind(Duration::ZERO)).await;
        unwound.unwrap_or_else(|error| {
            tracing::error!(guest = %name, %error, "tidying up failed");
            Ended {
                status: None,
                ended_at_ns: None,
                tap_removed_at_ns: None,
                counters: None,
                scrubbed: None,
                console: Vec::new(),
                leftovers: vec![format!("unknown: tidying up failed: {error}")],
            }
        })
    }

    /// Undoes everything, newest first, with that much patience for QEMU to be gone. Nothing is
    /// undone whose user might still be there: as long as QEMU is not proven dead, its guard and
    /// its run directory stay.
    fn unwind(&mut self, patience: Duration) -> Ended {
        let mut leftovers = Vec::new();
        let status = self.end_process(patience, &mut leftovers);
        if leftovers.is_empty()
            && let Some(cell) = &self.cell
            && !cell.kill_rest(KILL_DEADLINE)
        {
            leftovers.push("processes that QEMU has started: they do not die".to_owned());
        }
        let process_is_gone = leftovers.is_empty();
        let ended_at_ns = process_is_gone.then(monotonic_ns);
        // What is being made is ours to undo, and nobody else knows of it.
        let attached = self.attaching.take().map(Attaching::end).transpose();
        let is_doubtful = attached.is_err();
        if let Ok(Some(guard)) = attached {
            self.guard = Some(guard);
        }
        // It holds the guard's links, which the detaching is to cut.
        self.guard_watch = None;
        let guard = self.guard.take();
        let tap = self.tap.take();
        let run_dir = self.run_dir.take();
        let cell = self.cell.take();
        let disks = self.disks.take();
        let mut scrubbed = None;
        // After the reap, for until then the guest may send; before the detach takes them along.
        let counters = guard.as_ref().and_then(|guard| {
            guard
                .counters()
                .inspect_err(|error| tracing::warn!(%error, "no final counters"))
                .ok()
        });
        let console = run_dir
            .as_ref()
            .map_or_else(Vec::new, RunDir::end_of_console);
        let path = self.spec.run_dir.display();
        let name = &self.spec.tap;
        let mut tap_removed_at_ns = None;
        if process_is_gone {
            let detached = guard.map(Guard::detach).transpose();
            if tap.is_none_or(|tap| tap.remove(TAP_DEADLINE)) {
                tap_removed_at_ns = Some(monotonic_ns());
            } else {
                leftovers.push(format!("interface {name}: still held open"));
            }
            // A tap that was renamed keeps its guard until it is gone itself.
            if (detached.is_err() || is_doubtful)
                && let Err(error) = Guard::remove_stale(name, self.spec.guard_owner.as_ref())
            {
                leftovers.push(format!("guard of {name}: {error}"));
            }
            if run_dir.is_some_and(|run_dir| !run_dir.remove()) {
                leftovers.push(format!("directory {path}: see the log"));
            }
            match disks.map(Disks::scrub).transpose() {
                Ok(done) => scrubbed = done,
                Err(error) => leftovers.push(format!("disk: it may not be scrubbed: {error}")),
            }
            leftovers.extend(cell.map(Cell::tear_down).into_iter().flatten());
        } else {
            if guard.is_some() {
                leftovers.push(format!("guard of {name}: kept, since QEMU may still send"));
            }
            if tap.is_some() {
                leftovers.push(format!("interface {name}: QEMU holds it"));
            }
            if let Some(run_dir) = run_dir {
                run_dir.keep();
                leftovers.push(format!("directory {path}: QEMU uses it"));
            }
            if let Some(disks) = disks {
                disks.keep();
                leftovers.push("disk: QEMU uses it".to_owned());
            }
            if let Some(cell) = cell {
                cell.keep();
                leftovers.push("its user and cgroups: QEMU has them".to_owned());
            }
        }
        Ended {
            status,
            ended_at_ns,
            tap_removed_at_ns,
            counters,
            scrubbed,
            console,
            leftovers,
        }
    }

    fn end_process(
        &mut self,
        patience: Duration,
        leftovers: &mut Vec<String>,
    ) -> Option<ExitStatus> {
        match self.process.take()?.kill_and_reap(patience) {
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
        for leftover in self.unwind(KILL_DEADLINE).leftovers {
            tracing::error!(guest = %self.spec.name, leftover, "left behind");
        }
    }
}
