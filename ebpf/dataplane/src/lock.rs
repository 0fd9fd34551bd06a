//! Who may change one interface's guard now.
//!
//! A lock is a directory beside the pins, held by flock(2), so it ends with its holder. Each
//! interface has its own: whoever hangs while it changes one guard holds no other up.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::GuardError;
use crate::bpffs::{failed, namespace_directory, remove_anchor, shown};
use crate::pins::{LOCK, encode};

/// How long a command waits for another that changes the same guard: filling the largest
/// allowlist takes some seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Holds every other change of one interface's guard off until it is dropped.
#[derive(Debug)]
pub struct Lock {
    interface: String,
    directory: PathBuf,
    // Closed last: who watches the namespace's directory is told by it that a change is done.
    _file: File,
}

impl Lock {
    /// Waits for the lock of the guard that was attached under the name `interface`.
    pub fn of(interface: &str) -> Result<Self, GuardError> {
        Self::until(namespace_directory()?, interface, Instant::now() + PATIENCE)
    }

    /// As [`Lock::of`], but `None` where somebody else is at work on that guard.
    pub fn try_of(interface: &str) -> Result<Option<Self>, GuardError> {
        Self::try_in(namespace_directory()?, interface)
    }

    /// As [`Lock::try_of`], of a guard whose namespace has its pins in `namespace`.
    pub fn try_in(namespace: PathBuf, interface: &str) -> Result<Option<Self>, GuardError> {
        match Self::until(namespace, interface, Instant::now()) {
            Ok(lock) => Ok(Some(lock)),
            Err(GuardError::Busy { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether this is the lock of the guard that was attached under the name `interface`.
    pub fn is_of(&self, interface: &str) -> bool {
        self.interface == interface
    }

    fn until(namespace: PathBuf, interface: &str, deadline: Instant) -> Result<Self, GuardError> {
        let directory = namespace.join(format!("{}{LOCK}", encode(interface)));
        let busy = || GuardError::Busy {
            interface: interface.to_owned(),
            path: shown(&directory),
        };
        let mut tried = false;
        loop {
            // Others may remove what is made here as often as it is made.
            if tried && Instant::now() >= deadline {
                return Err(busy());
            }
            tried = true;
            let made = match directory.parent() {
                Some(parent) => fs::create_dir_all(parent),
                None => Ok(()),
            };
            match made.and_then(|()| fs::create_dir(&directory)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // The namespace's directory went with its last guard.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                made => made.map_err(failed("create", &directory))?,
            }
            let file = match File::open(&directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(failed("open", &directory))?,
            };
            loop {
                match file.try_lock() {
                    Ok(()) => break,
                    Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                        thread::sleep(Duration::from_millis(1));
                    }
                    Err(TryLockError::WouldBlock) => return Err(busy()),
                    Err(TryLockError::Error(source)) => {
                        return Err(failed("lock", &directory)(source));
                    }
                }
            }
            // Its last holder removed it: it locks nobody out any more.
            let held = file.metadata().map_err(failed("look at", &directory))?;
            let is_held = |found: fs::Metadata| found.ino() == held.ino();
            if fs::symlink_metadata(&directory).is_ok_and(is_held) {
                return Ok(Self {
                    interface: interface.to_owned(),
                    directory,
                    _file: file,
                });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // What stays is empty and locks nobody out.
        let _ = fs::remove_dir(&self.directory);
        if let Some(parent) = self.directory.parent() {
            remove_empty(parent);
        }
    }
}

/// The namespace's directory goes with its last guard, and so does the second mount of bpffs.
pub fn remove_empty(namespace: &Path) {
    if fs::remove_dir(namespace).is_ok() {
        let _ = remove_anchor();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "helpers of tests")]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// A directory that somebody removed takes no lock, however often it is tried.
    #[test]
    fn a_lock_that_cannot_be_made_is_given_up() {
        let path = std::env::temp_dir().join(format!("omerta-lock-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let removed = File::open(&path).unwrap();
        fs::remove_dir(&path).unwrap();
        let namespace = PathBuf::from(format!("/proc/self/fd/{}", removed.as_raw_fd()));
        for patience in [Duration::ZERO, Duration::from_millis(20)] {
            let lock = Lock::until(namespace.clone(), "guest", Instant::now() + patience);
            assert!(matches!(lock, Err(GuardError::Busy { .. })), "{lock:?}");
        }
        assert!(Lock::try_in(namespace, "guest").unwrap().is_none());
    }
}
