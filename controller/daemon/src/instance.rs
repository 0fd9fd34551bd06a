//! One omertad for each socket: the lock, and the socket itself.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use thiserror::Error;

/// Why omertad cannot have its socket.
#[derive(Debug, Error)]
pub(crate) enum InstanceError {
    #[error("another omertad{} serves {}: use that one, stop it, or give this one another --socket",
        pid.as_ref().map(|pid| format!(" (pid {pid})")).unwrap_or_default(), socket.display())]
    Running {
        socket: PathBuf,
        pid: Option<String>,
    },
    #[error("{} exists and is not a socket: move it away or give another --socket", .0.display())]
    NotASocket(PathBuf),
    #[error("another program serves {}: give another --socket", .0.display())]
    Foreign(PathBuf),
    #[error("socket path {} is too long: unix sockets allow 107 bytes; give a shorter --socket", .0.display())]
    TooLong(PathBuf),
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl InstanceError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// The right to serve a socket, held until dropped, which removes the socket and the lock.
#[derive(Debug)]
pub(crate) struct Instance {
    socket: PathBuf,
    lock_path: PathBuf,
    _lock: Flock<File>,
}

impl Instance {
    /// Takes the lock beside the socket. Makes the socket's directory (mode 0700) if it is not
    /// there.
    pub(crate) fn claim(socket: &Path) -> Result<Self, InstanceError> {
        if socket.as_os_str().len() > 107 {
            return Err(InstanceError::TooLong(socket.to_owned()));
        }
        if let Some(directory) = socket.parent().filter(|directory| !directory.exists()) {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(InstanceError::io("create", directory))?;
        }
        let mut lock_path = socket.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = lock(&lock_path, socket)?;
        Ok(Self {
            socket: socket.to_owned(),
            lock_path,
            _lock: lock,
        })
    }

    /// Listens on the socket, mode 0600, in place of one that a dead omertad left.
    pub(crate) fn listen(&self) -> Result<UnixListener, InstanceError> {
        match std::fs::symlink_metadata(&self.socket) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(InstanceError::NotASocket(self.socket.clone()));
            }
            Ok(_) if UnixStream::connect(&self.socket).is_ok() => {
                return Err(InstanceError::Foreign(self.socket.clone()));
            }
            Ok(_) => std::fs::remove_file(&self.socket)
                .map_err(InstanceError::io("remove the stale socket", &self.socket))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(InstanceError::io("look at", &self.socket)(source)),
        }
        // The socket must never be open to others, not even before a chmod.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(&self.socket);
        umask(before);
        let listener = bound.map_err(InstanceError::io("listen on", &self.socket))?;
        std::fs::set_permissions(&self.socket, Permissions::from_mode(0o600))
            .map_err(InstanceError::io("restrict", &self.socket))?;
        listener
            .set_nonblocking(true)
            .map_err(InstanceError::io("set up", &self.socket))?;
        Ok(listener)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        for path in [&self.socket, &self.lock_path] {
            if let Err(error) = std::fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "left behind");
            }
        }
    }
}

fn lock(path: &Path, socket: &Path) -> Result<Flock<File>, InstanceError> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(path)
            .map_err(InstanceError::io("open", path))?;
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                let read = file.read_to_string(&mut pid);
                let pid = Some(pid.trim().to_owned())
                    .filter(|pid| read.is_ok() && pid.parse::<u32>().is_ok());
                return Err(InstanceError::Running {
                    socket: socket.to_owned(),
                    pid,
                });
            }
            Err((_, errno)) => return Err(InstanceError::io("lock", path)(errno.into())),
        };
        // Another omertad may have removed the file between our opening and our locking it; the
        // lock would then be on a file that nobody else can see.
        let ours = lock
            .metadata()
            .map_err(InstanceError::io("look at", path))?;
        match std::fs::metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
            _ => continue,
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(InstanceError::io("write", path))?;
        return Ok(lock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_claim_is_refused_with_socket_and_pid_until_the_first_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/omertad.sock");
        let first = Instance::claim(&socket).unwrap();
        let listener = first.listen().unwrap();
        let error = Instance::claim(&socket).unwrap_err().to_string();
        assert!(
            error.contains(&format!("(pid {})", std::process::id())),
            "{error}"
        );
        assert!(error.contains(&socket.display().to_string()), "{error}");
        drop((first, listener));
        assert_eq!(
            std::fs::read_dir(socket.parent().unwrap()).unwrap().count(),
            0
        );
        Instance::claim(&socket).unwrap().listen().unwrap();
    }

    #[test]
    fn stale_socket_is_replaced_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("omertad.sock");
        drop(UnixListener::bind(&socket).unwrap());
        let instance = Instance::claim(&socket).unwrap();
        let listener = instance.listen().unwrap();
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = instance.listen().unwrap_err();
        assert!(matches!(error, InstanceError::Foreign(_)), "{error}");
        drop(listener);
        std::fs::remove_file(&socket).unwrap();
        std::fs::write(&socket, b"mine").unwrap();
        let error = instance.listen().unwrap_err();
        assert!(matches!(error, InstanceError::NotASocket(_)), "{error}");
    }

    #[test]
    fn overlong_path_is_refused() {
        let error = Instance::claim(Path::new(&format!("/tmp/{}", "x".repeat(110)))).unwrap_err();
        assert!(matches!(error, InstanceError::TooLong(_)));
    }
}
