//! What a crashed omertad left behind.

use std::io;
use std::path::Path;

use omerta_dataplane::Guard;
use omerta_vm_launcher::{GuestName, LockFile};

use crate::failure::report;
use crate::tap_name::tap_name;

/// The file that a living guest's launcher holds locked.
const LOCK: &str = "lock";

/// Removes what is left of guests whose omertad died: the pins of guards whose interface is gone
/// with it, and run directories. What is in use is left alone; what cannot be removed is logged
/// and stands in nobody's way but that guest's.
pub(crate) fn sweep(run_dir: &Path) {
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
        {
            remove(&name, &entry.path());
        }
    }
}

fn remove(name: &GuestName, directory: &Path) {
    let interface = tap_name(name.as_str());
    match Guard::remove_stale(&interface) {
        Ok(true) => tracing::info!(%name, interface, "removed the guard that a crash left behind"),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%name, interface, error = report(&error), "cannot remove a guard")
        }
    }
    match std::fs::remove_dir_all(directory) {
        Ok(()) => {
            tracing::info!(%name, path = %directory.display(), "removed what a crash left behind")
        }
        Err(error) => tracing::warn!(%name, path = %directory.display(), %error, "cannot remove"),
    }
}
