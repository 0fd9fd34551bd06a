//! What a crashed omertad left behind.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use omerta_dataplane::{Guard, PinnedGuard, Standing};
use omerta_vm_launcher::{GuestName, LockFile};

use crate::failure::report;

/// The file that a living guest's launcher holds locked.
const LOCK: &str = "lock";

/// In whose name omertad attaches its guards.
pub(crate) const OWNER: &str = "omertad";

/// Removes what is left of guests whose omertad died and of which the store says nothing: the pins of its guards whose interface is
/// gone, whatever run directory that omertad had, and run directories. What is in use is left
/// alone; what cannot be removed is logged and stands in nobody's way but that guest's.
pub(crate) fn sweep(run_dir: &Path, living: &BTreeSet<String>) {
    sweep_guards(living);
    sweep_directories(run_dir);
}

fn sweep_guards(living: &BTreeSet<String>) {
    match Guard::sweep_gone_namespaces() {
        Ok(0) => {}
        Ok(guards) => tracing::info!(guards, "removed guards of namespaces that are gone"),
        Err(error) => tracing::warn!(
            error = report(&error),
            "cannot remove guards of namespaces that are gone"
        ),
    }
    let pinned = match Guard::pinned() {
        Ok(pinned) => pinned,
        Err(error) => {
            tracing::warn!(error = report(&error), "cannot look for guards left behind");
            return;
        }
    };
    for PinnedGuard {
        interface,
        owner,
        standing,
    } in pinned
    {
        if owner.is_none_or(|owner| owner.as_str() != OWNER) || living.contains(&interface) {
            continue;
        }
        if standing != Standing::Gone {
            // Whoever has its tap open may still send; to remove it would let them.
            tracing::warn!(interface, "left a guard alone whose interface is in use");
            continue;
        }
        match Guard::remove_stale(&interface, None) {
            Ok(_) => tracing::info!(interface, "removed the guard that a crash left behind"),
            Err(error) => {
                tracing::warn!(interface, error = report(&error), "cannot remove a guard");
            }
        }
    }
}

fn sweep_directories(run_dir: &Path) {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %run_dir.display(), %error, "cannot look for leftovers");
            }
            return;
        }
    };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let name = file_name
            .to_str()
            .and_then(|name| name.parse::<GuestName>().ok());
        if let Some(name) = name
            && LockFile::is_abandoned(&entry.path().join(LOCK))
            && !is_in_use(&entry.path())
        {
            remove(&name, &entry.path());
        }
    }
}

/// Whether a QEMU has the directory for its own, which outlives the omertad that held the lock.
fn is_in_use(directory: &Path) -> bool {
    let wanted = [b"OMERTA_RUN_DIR=", directory.as_os_str().as_bytes()].concat();
    let has = |process: std::fs::DirEntry| {
        let environment = std::fs::read(process.path().join("environ"));
        environment.is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == wanted))
    };
    // What cannot be looked at is not removed.
    std::fs::read_dir("/proc").map_or(true, |all| all.flatten().any(has))
}

fn remove(name: &GuestName, directory: &Path) {
    match std::fs::remove_dir_all(directory) {
        Ok(()) => {
            tracing::info!(%name, path = %directory.display(), "removed what a crash left behind")
        }
        Err(error) => tracing::warn!(%name, path = %directory.display(), %error, "cannot remove"),
    }
}
