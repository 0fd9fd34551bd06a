//! A guest of which QEMU exists, and nothing has run.

use std::future::Future;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use omerta_dataplane::{Guard, GuardError, GuardWatch};
use tokio::net::UnixStream;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::mpsc;
use tokio::task::block_in_place;
use tokio::time::timeout;

use crate::disk::{DiskError, Disks, Handles};
use crate::jail::Root;
use crate::lifecycle::attaching::Attaching;
use crate::lifecycle::guarded::Guarding;
use crate::lifecycle::machine::Machine;
use crate::lifecycle::{Ended, Guarded, Prepared, Traces};
use crate::process::{QemuProcess, last_words};
use crate::qmp::{CONNECT_DEADLINE, MachineEvent, Qmp};
use crate::run_dir::{RunDir, RunFiles};
use crate::tap::Tap;
use crate::{ExitStatus, LaunchError, ProcessError, QmpError, Spec, canary, command};

/// How long a QEMU that has hung up may take to be gone, before it is said that it only hung up.
const DYING: Duration = Duration::from_secs(2);

/// QEMU is there in `prelaunch`, its tap is down and its guard at most being attached, no instruction of
/// the guest has run. Can only be guarded, or dropped, which undoes everything.
#[derive(Debug)]
pub struct Paused {
    pub(super) machine: Machine,
    pub(super) process: Arc<QemuProcess>,
    pub(super) qmp: Arc<Qmp>,
    pub(super) machine_events: mpsc::Receiver<MachineEvent>,
    pub(super) ports: Ports,
}

/// What the guest is heard by.
#[derive(Debug)]
pub(super) struct Ports {
    pub(super) control: UnixStream,
    /// Where its agent is asked.
    pub(super) agent: Option<UnixStream>,
}

impl Ports {
    /// Connects to the ports of `files`.
    pub(super) async fn connect(files: &RunFiles, with_agent: bool) -> Result<Self, LaunchError> {
        let connect = async |path| {
            UnixStream::connect(path)
                .await
                .map_err(LaunchError::ControlPort)
        };
        Ok(Self {
            control: connect(&files.control).await?,
            agent: match with_agent {
                true => Some(connect(&files.agent).await?),
                false => None,
            },
        })
    }
}

/// QEMU, and what it is spoken to and heard by.
pub(super) type Started = (Arc<QemuProcess>, Qmp, mpsc::Receiver<MachineEvent>, Ports);

impl Paused {
    /// Makes the run directory and the tap, starts QEMU stopped, and speaks with it.
    ///
    /// # Errors
    /// Whatever fails; everything made until then is gone.
    pub async fn launch(spec: Spec) -> Result<Self, LaunchError> {
        Prepared::new(spec).await?.launch().await
    }

    pub(super) async fn start_in(mut machine: Machine, root: Root) -> Result<Self, LaunchError> {
        match Self::start(&mut machine, root).await {
            Ok((process, qmp, machine_events, ports)) => Ok(Self {
                machine,
                process,
                qmp: Arc::new(qmp),
                machine_events,
                ports,
            }),
            Err(error) => Err(machine.end().await.after(error)),
        }
    }

    async fn start(machine: &mut Machine, root: Root) -> Result<Started, LaunchError> {
        let spec = &machine.spec;
        // A machine that was prepared always has its cell; the pattern is the proof of it.
        let Some(cell) = &machine.cell else {
            return Err(ProcessError::QemuMissing.into());
        };
        let run_dir = machine.run_dir.insert(RunDir::create(&spec.run_dir)?);
        let files = run_dir.files().clone();
        let channels = run_dir.open_channels(spec.agent.is_some())?;

        let tap = Tap::create(&spec.tap, spec.gateway_mac()).await?;
        let tap = machine.tap.insert(tap).handle()?;
        // Meanwhile: it is proven before the tap is up, and before QEMU is told to go.
        machine.attaching = Some(Attaching::begin(spec)?);
        let disks = machine.disks.as_ref().map(Disks::handles).transpose();
        let disks = disks.map_err(DiskError::Handles)?;
        let open = command::Descriptors {
            tap: tap.as_raw_fd(),
            qmp: channels.qmp.as_raw_fd(),
            console: channels.console.as_raw_fd(),
            control: channels.control.as_raw_fd(),
            agent: channels.agent.as_ref().map(AsRawFd::as_raw_fd),
            console_log: channels.console_log.as_raw_fd(),
            disks: disks.as_ref().map(Handles::numbers),
        };
        let mut handed = vec![
            tap,
            channels.qmp,
            channels.console,
            channels.control,
            channels.console_log,
        ];
        handed.extend(channels.agent);
        handed.extend(spec.image.lease()?);
        handed.extend(disks.into_iter().flat_map(Handles::into_all));
        let process = Arc::new(QemuProcess::spawn(
            root.program(),
            &command::arguments(spec, &open),
            cell.entry(spec, &root, handed)?,
            channels.qemu_log.into(),
            &spec.run_dir,
        )?);
        machine.process = Some(Arc::clone(&process));

        let speaking = async {
            let (qmp, machine_events) = Qmp::connect(&files.qmp, CONNECT_DEADLINE).await?;
            qmp.require_prelaunch().await?;
            let ports = Ports::connect(&files, spec.agent.is_some()).await?;
            Ok((qmp, machine_events, ports))
        };
        let (qmp, machine_events, ports) =
            unless_it_ends(&process, &files.qemu_log, speaking).await?;
        root.forget_files();
        Ok((process, qmp, machine_events, ports))
    }

    /// What tells this guest's process and tap from all others.
    pub fn traces(&self) -> Traces {
        self.machine.traces()
    }

    /// Waits until the guard is attached, verifies it, brings the tap up, and proves the guard with a canary.
    ///
    /// # Errors
    /// Whatever fails; the guest is gone then.
    pub async fn guard(mut self) -> Result<Guarded, LaunchError> {
        match self.prove_guard().await {
            Ok(guarding) => Ok(Guarded::new(self, guarding)),
            Err(error) => Err(self.end().await.after(error)),
        }
    }

    async fn prove_guard(&mut self) -> Result<Guarding, LaunchError> {
        let Machine {
            spec,
            tap,
            attaching,
            guard: slot,
            guard_watch,
            ..
        } = &mut self.machine;
        // A machine in this state always has both; the pattern is the proof of it.
        let (Some(tap), Some(attaching)) = (tap, attaching.take()) else {
            return Err(LaunchError::Guard(GuardError::NotGuarded {
                interface: spec.tap.clone(),
            }));
        };
        let guard = slot.insert(without_stalling(|| attaching.end())?);
        let watch = guard_watch.insert(Arc::new(GuardWatch::begin(guard)?));
        tap.bring_up(spec.gateway, spec.address, spec.mac).await?;
        canary::prove(tap, guard, spec.mac, spec.gateway_mac()).await?;
        watch.check()?;
        self.qmp.require_prelaunch().await?;
        Ok(Guarding {
            guard: match &spec.guard_owner {
                Some(owner) => Guard::open_as(&spec.tap, owner)?,
                None => Guard::open(&spec.tap)?,
            },
            watch: Arc::clone(watch),
            tap: tap.index(),
        })
    }

    /// Kills QEMU, which has run nothing, and removes everything.
    pub async fn end(self) -> Ended {
        self.machine.end().await
    }

    /// What is being run.
    pub fn spec(&self) -> &Spec {
        &self.machine.spec
    }
}

/// Runs `work`, but fails with what QEMU said as soon as QEMU ends. A QEMU that dies hangs up a
/// little before it can be reaped.
async fn unless_it_ends<T>(
    process: &QemuProcess,
    log: &Path,
    work: impl Future<Output = Result<T, LaunchError>>,
) -> Result<T, LaunchError> {
    let broken = tokio::select! {
        biased;
        status = process.wait() => return ended_early(status?, log),
        done = work => match done {
            Err(error @ (LaunchError::Qmp(QmpError::Broken { .. }) | LaunchError::ControlPort(_))) => {
                error
            }
            done => return done,
        },
    };
    match timeout(DYING, process.wait()).await {
        Ok(status) => ended_early(status?, log),
        Err(_) => Err(broken),
    }
}

fn ended_early<T>(status: ExitStatus, log: &Path) -> Result<T, LaunchError> {
    let said = last_words(log);
    Err(ProcessError::EndedEarly { status, said }.into())
}

/// Runs `work`, which may wait for some tenths of a second (the kernel verifies the guard's programs),
/// without holding up the tasks queued behind this one. On this very thread: nobody can cancel between
/// the waiting and the having.
fn without_stalling<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => block_in_place(work),
        _ => work(),
    }
}
