//! What a launcher that is dead has left: a guest that lives on is taken over, the rest removed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use omerta_agent::message::Key;
use omerta_dataplane::{Guard, GuardError, GuardStatus, GuardWatch, Owner};
use tokio::time::timeout;

use crate::disk::{DiskError, Disks};
use crate::guard_alarm::GuardAlarm;
use crate::jail::Cell;
use crate::lifecycle::attaching::redirect_as_asked;
use crate::lifecycle::guarded::Guarding;
use crate::lifecycle::machine::Machine;
use crate::lifecycle::paused::Ports;
use crate::lifecycle::{Paused, Running};
use crate::link_watch::LinkWatch;
use crate::process::QemuProcess;
use crate::qmp::{CONNECT_DEADLINE, Found, Qmp};
use crate::run_dir::{RunDir, RunFiles};
use crate::tap::Tap;
use crate::{JailError, LaunchError, LockFile, ProcessError, Scrubbed, Spec, TapError};

/// How long a process that is killed, and its tap, may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How long a process that is just ending may take, before it is said to live.
const DYING: Duration = Duration::from_secs(1);
const TAP_DEADLINE: Duration = Duration::from_secs(1);

/// What tells everything that was made for a guest from all else on this host, until it boots again.
/// What had not been made, or is not known, is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traces {
    /// The user that QEMU runs as.
    pub uid: Option<u32>,
    /// Its cgroups: those of another launcher may be elsewhere.
    pub cgroups: Option<Vec<PathBuf>>,
    /// QEMU's pid, and when it started.
    pub process: Option<(u32, u64)>,
    /// The tap's index.
    pub tap: Option<u32>,
    /// The guard's identity.
    pub guard: Option<[u32; 2]>,
    /// What its agent proves its answers with, once that has come.
    pub agent: Option<[u8; 32]>,
}

impl Traces {
    /// Whether QEMU lives, or cannot be told not to. One that is just ending is given the time for it.
    pub async fn may_live(&self) -> bool {
        let Some((pid, start)) = self.process else {
            return false;
        };
        match QemuProcess::adopt(pid, start) {
            Ok(process) => {
                process.let_go();
                !matches!(timeout(DYING, process.wait()).await, Ok(Ok(_)))
            }
            Err(error) => !matches!(error, ProcessError::Gone { .. }),
        }
    }
}

impl Running {
    /// Takes over a guest whose launcher is dead: its process, tap and guard are proven to be the very
    /// ones that it left, the policy to be the spec's, and QEMU to answer. Tells how the guest is found.
    ///
    /// # Errors
    /// Whatever cannot be proven. Nothing is changed then: [`unwind`] ends the guest.
    pub async fn adopt(spec: Spec, traces: &Traces) -> Result<(Self, Found), LaunchError> {
        let mut machine = Machine::new(spec);
        let adopted = take_over(&mut machine, traces).await;
        match adopted {
            Ok((paused_parts, guarding, links, alarm, found)) => {
                let (process, qmp, machine_events, ports) = paused_parts;
                let paused = Paused {
                    machine,
                    process,
                    qmp: Arc::new(qmp),
                    machine_events,
                    ports,
                };
                let key = traces.agent.map(Key::new);
                Ok((Self::new(paused, guarding, links, alarm, key), found))
            }
            Err(error) => {
                machine.let_go();
                Err(error)
            }
        }
    }
}

type Parts = (
    crate::lifecycle::paused::Started,
    Guarding,
    LinkWatch,
    GuardAlarm,
    Found,
);

async fn take_over(machine: &mut Machine, traces: &Traces) -> Result<Parts, LaunchError> {
    let (Some(uid), Some((pid, start)), Some(index), Some(identity)) =
        (traces.uid, traces.process, traces.tap, traces.guard)
    else {
        return Err(ProcessError::Gone { pid: 0 }.into());
    };
    let spec = machine.spec.clone();
    let process = machine
        .process
        .insert(Arc::new(QemuProcess::adopt(pid, start)?));
    let process = Arc::clone(process);
    let cgroups = traces.cgroups.as_deref();
    let cell = machine
        .cell
        .insert(Cell::adopt(uid, &spec.run_dir, cgroups)?);
    if !cell.holds(pid) {
        return Err(JailError::Escaped(pid).into());
    }
    machine.disks = Disks::adopt(&process).map_err(DiskError::Handles)?;
    machine.run_dir = Some(RunDir::adopt(&spec.run_dir)?);
    let tap = machine.tap.insert(Tap::adopt(&spec.tap, index)?).index();

    let open = || match &spec.guard_owner {
        Some(owner) => Guard::open_as(&spec.tap, owner),
        None => Guard::open(&spec.tap),
    };
    let guard = machine.guard.insert(open()?);
    if guard.identity() != identity {
        return Err(GuardError::Replaced {
            interface: spec.tap.clone(),
        }
        .into());
    }
    upgrade(&spec, guard);
    redirect_as_asked(guard, spec.redirect);
    let watch = Arc::new(GuardWatch::begin(guard)?);
    machine.guard_watch = Some(Arc::clone(&watch));
    // After the watch began: who changes the policy from here on is noticed.
    require_policy(&spec, &guard.status()?)?;
    let links = LinkWatch::open(tap).map_err(TapError::Netlink)?;
    let alarm = GuardAlarm::of(watch.occasions()?).map_err(TapError::Netlink)?;

    let files = RunFiles::within(&spec.run_dir);
    let (qmp, machine_events) = Qmp::connect(&files.qmp, CONNECT_DEADLINE).await?;
    let found = qmp.found().await?;
    let ports = Ports::connect(&files, spec.agent.is_some()).await?;
    watch.check()?;
    let guarding = Guarding {
        guard: open()?,
        watch,
        tap,
    };
    let parts = (process, qmp, machine_events, ports);
    Ok((parts, guarding, links, alarm, found))
}

/// Puts this build's programs into a guard that was made by another; where that cannot be done, the guest
/// lives on behind those that it has.
fn upgrade(spec: &Spec, guard: &Guard) {
    let upgraded = guard.is_current().and_then(|current| match current {
        true => Ok(false),
        false => guard.upgrade().map(|_| true),
    });
    match upgraded {
        Ok(true) => tracing::info!(guest = %spec.name, "its guard has other programs now"),
        Ok(false) => {}
        Err(error) => {
            let error = error.to_string();
            tracing::warn!(guest = %spec.name, error, "its guard keeps the programs of an omertad before");
        }
    }
}

/// Fails where a guard holds another policy than the spec's.
fn require_policy(spec: &Spec, status: &GuardStatus) -> Result<(), GuardError> {
    let same = status.mac == spec.mac.to_string()
        && status.gateway_mac == spec.gateway_mac().to_string()
        && status.addresses == [spec.address.to_string()]
        && status.gateways == [spec.gateway.to_string()]
        && status.allow
            == spec
                .allowlist()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        && status.mode == spec.mode.word()
        && status.limits == spec.limits;
    if same {
        return Ok(());
    }
    Err(GuardError::NotInForce {
        interface: spec.tap.clone(),
        why: "its policy is not the guest's",
    })
}

/// What became of what a dead launcher had left of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unwound {
    /// What could not be removed and why, one line each; empty when all went well.
    pub leftovers: Vec<String>,
    /// What it had written to its disk, given back to the file system, looked at and found gone; `None`
    /// where no process that had the disk was left.
    pub scrubbed: Option<Scrubbed>,
}

/// Removes whatever a dead launcher has left of a guest, in the order in which a living one does: as
/// long as a process of the guest's is not proven gone, its guard stays. To try again later does no harm. Blocks for seconds at most.
pub fn unwind(tap: &str, run_dir: &Path, owner: Option<&Owner>, traces: &Traces) -> Unwound {
    let mut left = Vec::new();
    let mut disks = None;
    let adopt = |uid| Cell::adopt(uid, run_dir, traces.cgroups.as_deref());
    let cell = match traces.uid.map(adopt).transpose() {
        Ok(cell) => cell,
        // It was given back, which is done last and only without a process, and may be another's now.
        Err(JailError::UidHeld(_)) => None,
        Err(error) => {
            return Unwound {
                leftovers: vec![format!("its user: {error}")],
                scrubbed: None,
            };
        }
    };
    if let Some((pid, start)) = traces.process {
        let ended = match QemuProcess::adopt(pid, start) {
            Ok(process) => {
                // While it lives: nobody else knows its disk.
                disks = Disks::adopt(&process).unwrap_or_else(|error| {
                    // It goes with its QEMU, and nobody has seen it go.
                    tracing::warn!(tap, %error, "the disk of a guest that is ended cannot be held");
                    None
                });
                process.kill_and_reap(KILL_DEADLINE).map(drop)
            }
            Err(ProcessError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            left.push(format!("process: {error}"));
        }
    }
    if cell
        .as_ref()
        .is_some_and(|cell| !cell.kill_everybody(KILL_DEADLINE))
    {
        left.push("processes of its user: they do not die".to_owned());
    }
    if !left.is_empty() {
        if let Some(cell) = cell {
            cell.keep();
        }
        if let Some(disks) = disks {
            disks.keep();
        }
        return Unwound {
            leftovers: left,
            scrubbed: None,
        };
    }
    if let Some(index) = traces.tap
        && let Ok(held) = Tap::adopt(tap, index)
        && !held.remove(TAP_DEADLINE)
    {
        left.push(format!("interface {tap}: still held open"));
    }
    if traces.tap.is_none() && traces.uid.is_some() {
        // Its index was not known yet, and it may have a guard: it goes with its QEMU, a moment later.
        let until = Instant::now() + TAP_DEADLINE;
        while if_nametoindex(tap).is_ok() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    if let Err(error) = Guard::remove_stale(tap, owner) {
        left.push(format!("guard of {tap}: {error}"));
    }
    let path = run_dir.display();
    let lock = RunFiles::within(run_dir).lock;
    if lock.exists() && !LockFile::is_abandoned(&lock) {
        left.push(format!("directory {path}: another guest has it"));
    } else if let Err(error) = std::fs::remove_dir_all(run_dir)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        // Without its lock too: who died while it removed the directory may have begun with that.
        left.push(format!("directory {path}: {error}"));
    }
    let scrubbed = disks.map(Disks::scrub).transpose().unwrap_or_else(|error| {
        left.push(format!("disk: it may not be scrubbed: {error}"));
        None
    });
    left.extend(cell.map(Cell::tear_down).into_iter().flatten());
    Unwound {
        leftovers: left,
        scrubbed,
    }
}
