//! A file that one process holds locked, with its pid in it and what it is for, for as long as it lives.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Why a lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("{} is locked by {}", path.display(), holder(*pid))]
    Held {
        /// The lock's file.
        path: PathBuf,
        /// Who holds it, where the file tells.
        pid: Option<u32>,
    },
    /// The system refused.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// The system refused something on a path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}; its directory must be there, have room and be writable", path.display())]
pub struct PathError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl PathError {
    /// The error of `action` on `path`, given what the system said.
    pub fn of(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self {
            action,
            path,
            source,
        }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("pid {pid}"))
}

/// How long the first line is, the pid's: one that is written over another's leaves the rest as it is.
const PID_LINE: usize = 11;

/// What a note is read of at most: a path.
const MAX_NOTE: u64 = 4_096;

/// A lock that is ours until dropped, or until this process ends, however it ends. The file stays
/// unless [`LockFile::remove`] is called, with the note that its last holder left.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    lock: Flock<File>,
}

impl LockFile {
    /// Locks the file at `path`, made with mode 0600 where it is not there.
    ///
    /// # Errors
    /// When another holds it, or the system refuses.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)
                .map_err(PathError::of("open", path))?;
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((file, Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    let read = file.take(PID_LINE as u64).read_to_string(&mut pid);
                    return Err(LockError::Held {
                        path: path.to_owned(),
                        pid: read.ok().and_then(|_| pid.trim().parse().ok()),
                    });
                }
                Err((_, errno)) => return Err(PathError::of("lock", path)(errno.into()).into()),
            };
            // Another may have removed the file between our opening and our locking it; the lock
            // would then be on a file that nobody else can see.
            let ours = lock.metadata().map_err(PathError::of("look at", path))?;
            match fs::metadata(path) {
                Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
                _ => continue,
            }
            let pid = format!("{:<width$}\n", std::process::id(), width = PID_LINE - 1);
            let written = lock.write_all_at(pid.as_bytes(), 0);
            let ours = Self {
                path: path.to_owned(),
                lock,
            };
            return match written {
                Ok(()) => Ok(ours),
                Err(source) => {
                    ours.remove();
                    Err(PathError::of("write", path)(source).into())
                }
            };
        }
    }

    /// What [`LockFile::write_note`] wrote last, also a holder's before; empty where nobody did.
    ///
    /// # Errors
    /// When the system refuses, or what is there is no text.
    pub fn note(&self) -> Result<String, PathError> {
        let read = || {
            let mut note = vec![0; self.lock.metadata()?.len().min(MAX_NOTE) as usize];
            let length = self.lock.read_at(&mut note, PID_LINE as u64)?;
            note.truncate(length);
            String::from_utf8(note).map_err(io::Error::other)
        };
        read().map_err(PathError::of("read", &self.path))
    }

    /// Writes what the lock is for, which stays in the file when this process ends.
    ///
    /// # Errors
    /// When the system refuses. Then there is another note, or a part of this one.
    pub fn write_note(&self, note: &str) -> Result<(), PathError> {
        let start = PID_LINE as u64;
        self.lock
            .set_len(start)
            .and_then(|()| self.lock.write_all_at(note.as_bytes(), start))
            .map_err(PathError::of("write", &self.path))
    }

    /// Whether there is a lock file at `path` that nobody holds: who made it is dead.
    pub fn is_abandoned(path: &Path) -> bool {
        File::open(path)
            .is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok())
    }

    /// Removes the file and lets go of the lock, in this order.
    pub fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_is_refused_with_the_holders_pid_until_the_first_lets_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        assert!(!LockFile::is_abandoned(&path), "there is none");
        let first = LockFile::acquire(&path).unwrap();
        assert!(!LockFile::is_abandoned(&path));
        match LockFile::acquire(&path).unwrap_err() {
            LockError::Held { pid, .. } => assert_eq!(pid, Some(std::process::id())),
            error => panic!("{error}"),
        }
        drop(first);
        assert!(LockFile::is_abandoned(&path));
        LockFile::acquire(&path).unwrap().remove();
        assert!(!path.exists());
    }

    #[test]
    fn note_outlives_who_wrote_it_until_another_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let lock = LockFile::acquire(&path).unwrap();
        assert_eq!(lock.note().unwrap(), "");
        lock.write_note("/run/a guest\nof two lines").unwrap();
        drop(lock);
        let lock = LockFile::acquire(&path).unwrap();
        assert_eq!(lock.note().unwrap(), "/run/a guest\nof two lines");
        lock.write_note("b").unwrap();
        drop(lock);
        assert_eq!(LockFile::acquire(&path).unwrap().note().unwrap(), "b");
    }

    #[test]
    fn symlink_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("precious");
        fs::write(&target, "data").unwrap();
        let path = directory.path().join("lock");
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(matches!(
            LockFile::acquire(&path),
            Err(LockError::Io { .. })
        ));
        assert_eq!(fs::read_to_string(&target).unwrap(), "data");
    }
}
