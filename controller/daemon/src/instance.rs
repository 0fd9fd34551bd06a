//! One omertad for each socket and each run directory: the locks, and the socket itself.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;
use omerta_vm_launcher::{LockError, LockFile, PathError};
use thiserror::Error;

use crate::made_directories::MadeDirectories;

/// The lock of a run directory; no guest's name has a dot.
const RUN_DIR_LOCK: &str = "omertad.lock";

/// Why omertad cannot have its socket or its run directory.
#[derive(Debug, Error)]
pub(crate) enum InstanceError {
    #[error("another omertad{} uses {}: use that one, stop it, or give this one another {option}",
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path.display())]
    Running {
        path: PathBuf,
        pid: Option<u32>,
        option: &'static str,
    },
    #[error(transparent)]
    Lock(LockError),
    #[error("{} exists and is not a socket: move it away or give another --socket", .0.display())]
    NotASocket(PathBuf),
    #[error("another program serves {}: give another --socket", .0.display())]
    Foreign(PathBuf),
    #[error("socket path {} is too long: unix sockets allow 107 bytes; give a shorter --socket", .0.display())]
    TooLong(PathBuf),
    #[error("{path} belongs to another user or others may write into it, who could then lead a guest's files elsewhere: `chown root {path}; chmod go-w {path}`, or give another --run-dir", path = .0.display())]
    NotPrivate(PathBuf),
    #[error(transparent)]
    Io(#[from] PathError),
}

/// The right to serve a socket and to make guests in a run directory, held until dropped, which
/// removes the socket, the locks, and what directories it made for them.
#[derive(Debug)]
pub(crate) struct Instance {
    socket: PathBuf,
    /// Whether the socket is this process's.
    bound: AtomicBool,
    locks: Vec<LockFile>,
    /// Dropped after the locks are removed.
    directories: Vec<MadeDirectories>,
}

impl Instance {
    /// Takes the lock beside the socket and that in the run directory. Makes either's directory
    /// (mode 0700) if it is not there.
    pub(crate) fn claim(socket: &Path, run_dir: &Path) -> Result<Self, InstanceError> {
        if socket.as_os_str().len() > 107 {
            return Err(InstanceError::TooLong(socket.to_owned()));
        }
        let mut lock_path = socket.as_os_str().to_owned();
        lock_path.push(".lock");
        let mut instance = Self {
            socket: socket.to_owned(),
            bound: AtomicBool::new(false),
            locks: Vec::new(),
            directories: Vec::new(),
        };
        instance.lock(Path::new(&lock_path), socket, "--socket")?;
        if let Ok(found) = std::fs::metadata(run_dir)
            && (found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0)
        {
            return Err(InstanceError::NotPrivate(run_dir.to_owned()));
        }
        instance.lock(&run_dir.join(RUN_DIR_LOCK), run_dir, "--run-dir")?;
        Ok(instance)
    }

    fn lock(&mut self, lock: &Path, of: &Path, option: &'static str) -> Result<(), InstanceError> {
        if let Some(directory) = lock.parent() {
            let made =
                MadeDirectories::make(directory).map_err(PathError::of("create", directory))?;
            self.directories.push(made);
        }
        let lock = LockFile::acquire(lock).map_err(|error| match error {
            LockError::Held { pid, .. } => InstanceError::Running {
                path: of.to_owned(),
                pid,
                option,
            },
            error => InstanceError::Lock(error),
        })?;
        self.locks.push(lock);
        Ok(())
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
                .map_err(PathError::of("remove the stale socket", &self.socket))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(PathError::of("look at", &self.socket)(error).into()),
        }
        // The socket must never be open to others, not even before a chmod.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(&self.socket);
        umask(before);
        let listener = bound.map_err(PathError::of("listen on", &self.socket))?;
        self.bound.store(true, Ordering::Relaxed);
        std::fs::set_permissions(&self.socket, Permissions::from_mode(0o600))
            .map_err(PathError::of("restrict", &self.socket))?;
        listener
            .set_nonblocking(true)
            .map_err(PathError::of("set up", &self.socket))?;
        Ok(listener)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // Only what this process has bound is its to remove.
        if self.bound.load(Ordering::Relaxed)
            && let Err(error) = std::fs::remove_file(&self.socket)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.socket.display(), %error, "left behind");
        }
        for lock in self.locks.drain(..) {
            lock.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_claim_is_refused_with_path_and_pid_until_the_first_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let (socket, run_dir) = (at("socket/omertad.sock"), at("run"));
        let first = Instance::claim(&socket, &run_dir).unwrap();
        let listener = first.listen().unwrap();
        let pid = format!("(pid {})", std::process::id());
        for (second, shared, option) in [
            ((&socket, &at("run2")), &socket, "--socket"),
            (
                (&at("socket2/omertad.sock"), &run_dir),
                &run_dir,
                "--run-dir",
            ),
        ] {
            let error = Instance::claim(second.0, second.1).unwrap_err().to_string();
            let shared = shared.display().to_string();
            for part in [pid.as_str(), &shared, option] {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
        assert!(
            socket.exists(),
            "a refused one removes nothing of the first"
        );
        drop((first, listener));
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 0, "what it made, a refused one too, it removes");
        Instance::claim(&socket, &run_dir)
            .unwrap()
            .listen()
            .unwrap();
    }

    #[test]
    fn stale_socket_is_replaced_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("omertad.sock");
        drop(UnixListener::bind(&socket).unwrap());
        let instance = Instance::claim(&socket, directory.path()).unwrap();
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
    fn what_is_refused_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        std::fs::write(&path, b"mine").unwrap();
        let instance = Instance::claim(&path, directory.path()).unwrap();
        instance.listen().unwrap_err();
        drop(instance);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn run_directory_that_others_may_write_into_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("omertad.sock");
        let run_dir = directory.path().join("run");
        std::fs::create_dir(&run_dir).unwrap();
        for mode in [0o777, 0o770] {
            std::fs::set_permissions(&run_dir, Permissions::from_mode(mode)).unwrap();
            let error = Instance::claim(&socket, &run_dir).unwrap_err();
            assert!(matches!(error, InstanceError::NotPrivate(_)), "{error}");
        }
        std::fs::set_permissions(&run_dir, Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(&run_dir, Some(65_534), None).unwrap();
        let error = Instance::claim(&socket, &run_dir).unwrap_err().to_string();
        assert!(
            error.contains("chown root") && error.contains("--run-dir"),
            "{error}"
        );
        std::os::unix::fs::chown(&run_dir, Some(0), None).unwrap();
        Instance::claim(&socket, &run_dir).unwrap();
    }

    #[test]
    fn overlong_path_is_refused() {
        let socket = format!("/tmp/{}", "x".repeat(110));
        let error = Instance::claim(Path::new(&socket), Path::new("/tmp")).unwrap_err();
        assert!(matches!(error, InstanceError::TooLong(_)));
    }
}
