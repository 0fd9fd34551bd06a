//! A guest that runs behind its guard.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use omerta_agent::message::Key;
use omerta_dataplane::Guard;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::clock::monotonic_ns;
use crate::guard_alarm::GuardAlarm;
use crate::lifecycle::agent_watch::AgentWatch;
use crate::lifecycle::guarded::Guarding;
use crate::lifecycle::logs::Logs;
use crate::lifecycle::machine::Machine;
use crate::lifecycle::watcher::Watcher;
use crate::lifecycle::{Control, Ended, GuestEvent, Paused, Traces};
use crate::link_watch::LinkWatch;
use crate::process::QemuProcess;
use crate::run_dir::RunFiles;
use crate::{LaunchError, Spec};

/// How many events wait for a slow reader.
const EVENT_BACKLOG: usize = 256;
/// How many words wait for a guest.
const WORD_BACKLOG: usize = 4;

/// A guest that was guarded and now runs. Dropping it ends it and undoes everything.
#[derive(Debug)]
pub struct Running {
    machine: Machine,
    guard: Arc<Guard>,
    process: Arc<QemuProcess>,
    control: Control,
    events: mpsc::Receiver<GuestEvent>,
    files: RunFiles,
    watcher: Watching,
}

#[derive(Debug)]
struct Watching(JoinHandle<()>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Running {
    pub(super) fn new(
        paused: Paused,
        guarding: Guarding,
        links: LinkWatch,
        alarm: GuardAlarm,
        agent_key: Option<Key>,
    ) -> Self {
        let Paused {
            machine,
            process,
            qmp,
            machine_events,
            ports,
        } = paused;
        let Guarding { guard, watch, .. } = guarding;
        let guard = Arc::new(guard);
        let (words, to_guest) = mpsc::channel(WORD_BACKLOG);
        let control = Control::new(qmp, watch, Arc::clone(&guard), words);
        let (sender, events) = mpsc::channel(EVENT_BACKLOG);
        let files = RunFiles::within(&machine.spec.run_dir);
        let watcher = Watcher {
            process: Arc::clone(&process),
            control: control.clone(),
            machine_events,
            control_port: ports.control,
            agent: ports
                .agent
                .zip(machine.spec.agent)
                .map(|(port, timing)| AgentWatch::new(port, timing, agent_key)),
            to_guest,
            events: sender,
            links,
            alarm,
            lease: machine.spec.guard_lease,
            logs: Logs::of(&files),
        };
        let watcher = Watching(tokio::spawn(watcher.run()));
        Self {
            machine,
            guard,
            process,
            control,
            events,
            files,
            watcher,
        }
    }
}

impl Running {
    /// What is being run.
    pub fn spec(&self) -> &Spec {
        &self.machine.spec
    }

    /// QEMU's pid.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The unix socket of the serial console; one client at a time.
    pub fn console_socket(&self) -> &Path {
        &self.files.console
    }

    /// The file that holds what the serial console has printed last; what it printed before is beside it.
    pub fn console_log(&self) -> &Path {
        &self.files.console_log
    }

    /// The guard on the guest's tap.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// A handle to command the guest with, from any task.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Stops QEMU's process itself, which asks nothing of it: sooner than [`Control::pause`], and certain also where somebody
    /// has taken QEMU over. It answers nothing from then on, and can only be killed. Gives the moment from which on no
    /// instruction of the guest's runs: CLOCK_MONOTONIC, in nanoseconds.
    ///
    /// # Errors
    /// Where it has ended.
    pub async fn halt(&self) -> Result<u64, LaunchError> {
        self.process.halt().await?;
        Ok(monotonic_ns())
    }

    /// The next thing that happens. Safe to cancel. After [`GuestEvent::Exited`] it returns that
    /// again.
    pub async fn next_event(&mut self) -> GuestEvent {
        match self.events.recv().await {
            Some(event) => event,
            // The watcher ends when QEMU does.
            None => GuestEvent::Exited {
                status: self.process.wait().await.ok(),
            },
        }
    }

    /// Presses the power button, gives the guest until `deadline` to end, then kills it, and
    /// removes everything.
    pub async fn stop(self, deadline: Duration) -> Ended {
        let ending = async {
            if let Err(error) = self.control.powerdown().await {
                tracing::warn!(guest = %self.machine.spec.name, error = error.report(), "cannot ask for shutdown");
                return;
            }
            let _ = self.process.wait().await;
        };
        if timeout(deadline, ending).await.is_err() {
            tracing::info!(guest = %self.machine.spec.name, "did not shut down in time");
        }
        self.kill().await
    }

    /// Lets go of it, and lets it live on: it may be taken over, or ended, by its traces.
    pub fn leave(self) {
        let Self {
            machine,
            control,
            watcher,
            ..
        } = self;
        drop((control, watcher));
        machine.let_go();
    }

    /// Whether it has a disk of its own.
    pub fn has_disk(&self) -> bool {
        self.machine.disks.is_some()
    }

    /// What tells this guest's process, tap and guard from all others.
    pub fn traces(&self) -> Traces {
        self.machine.traces()
    }

    /// Kills QEMU at once, and removes everything: guard, tap, run directory.
    pub async fn kill(self) -> Ended {
        let Self {
            machine,
            control,
            watcher,
            ..
        } = self;
        drop((control, watcher));
        machine.end().await
    }
}
