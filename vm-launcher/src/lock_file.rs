//! A file that one process holds locked, with its pid in it, for as long as it lives.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
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

/// A lock that is ours until dropped, or until this process ends, however it ends. The file stays
/// unless [`LockFile::remove`] is called.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    _lock: Flock<File>,
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
            let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((mut file, Errno::EWOULDBLOCK)) => {
                    let mut pid = String::new();
                    let read = file.read_to_string(&mut pid);
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
            let written = lock
                .set_len(0)
                .and_then(|()| lock.rewind())
                .and_then(|()| writeln!(lock, "{}", std::process::id()));
            let ours = Self {
                path: path.to_owned(),
                _lock: lock,
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
