//! The directory of one guest: sockets and logs, which QEMU has by descriptors alone. Made at launch, locked while
//! in use, removed at the end.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::console_log::ConsoleLog;
use crate::{Ended, LockError, LockFile, PathError};

/// The files within a run directory.
#[derive(Clone, Debug)]
pub(crate) struct RunFiles {
    /// Held locked while the directory is in use.
    pub(crate) lock: PathBuf,
    /// QMP's socket.
    pub(crate) qmp: PathBuf,
    /// The serial console's socket.
    pub(crate) console: PathBuf,
    /// What the serial console has printed.
    pub(crate) console_log: PathBuf,
    /// The control port's socket.
    pub(crate) control: PathBuf,
    /// The socket of the agent's port.
    pub(crate) agent: PathBuf,
    /// What QEMU prints.
    pub(crate) qemu_log: PathBuf,
}

impl RunFiles {
    /// The files of `directory`, whether they exist or not.
    pub(crate) fn within(directory: &Path) -> Self {
        Self {
            lock: directory.join("lock"),
            qmp: directory.join("qmp.sock"),
            console: directory.join("console.sock"),
            console_log: directory.join("console.log"),
            control: directory.join("control.sock"),
            agent: directory.join("agent.sock"),
            qemu_log: directory.join("qemu.log"),
        }
    }
}

/// Why a run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Another launcher holds it.
    #[error("{} is in use by another guest; end that one first", .0.display())]
    InUse(PathBuf),
    /// Its lock cannot be had for another reason.
    #[error(transparent)]
    Lock(LockError),
    /// It exists and is not a guest's run directory.
    #[error("{} exists and is not a guest's run directory; move it away", .0.display())]
    Foreign(PathBuf),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// What QEMU speaks through, open: it can reach none of the files by their paths.
#[derive(Debug)]
pub(crate) struct Channels {
    /// QMP's socket, listening.
    pub(crate) qmp: OwnedFd,
    /// The serial console's socket, listening.
    pub(crate) console: OwnedFd,
    /// For what the serial console prints.
    pub(crate) console_log: OwnedFd,
    /// The control port's socket, listening.
    pub(crate) control: OwnedFd,
    /// The socket of the agent's port, listening, where there is one.
    pub(crate) agent: Option<OwnedFd>,
    /// For what QEMU prints.
    pub(crate) qemu_log: File,
}

/// A run directory that is ours until it is dropped, which removes it.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    files: RunFiles,
    /// None once it is left to others.
    lock: Option<LockFile>,
}

impl RunDir {
    /// Makes `path` (mode 0700). A directory that a crashed launcher left behind is emptied and used.
    pub(crate) fn create(path: &Path) -> Result<Self, RunDirError> {
        let files = RunFiles::within(path);
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !is_stale_run_dir(path, &files) {
                    return Err(RunDirError::Foreign(path.to_owned()));
                }
            }
            Err(error) => return Err(PathError::of("create", path)(error).into()),
        }
        let lock = LockFile::acquire(&files.lock).map_err(|error| {
            // Not ours, but nobody's if it is empty: one that is in use holds its lock.
            let _ = fs::remove_dir(path);
            match error {
                LockError::Held { .. } => RunDirError::InUse(path.to_owned()),
                error => RunDirError::Lock(error),
            }
        })?;
        // From here on the directory is ours, and goes when `run_dir` does.
        let run_dir = Self {
            path: path.to_owned(),
            files,
            lock: Some(lock),
        };
        run_dir.remove_stale_files()?;
        Ok(run_dir)
    }

    /// The directory of a guest whose launcher is dead, with all that is in it.
    pub(crate) fn adopt(path: &Path) -> Result<Self, RunDirError> {
        let files = RunFiles::within(path);
        if !fs::symlink_metadata(path).is_ok_and(|entry| entry.is_dir()) || !files.lock.is_file() {
            return Err(RunDirError::Foreign(path.to_owned()));
        }
        let lock = LockFile::acquire(&files.lock).map_err(|error| match error {
            LockError::Held { .. } => RunDirError::InUse(path.to_owned()),
            error => RunDirError::Lock(error),
        })?;
        Ok(Self {
            path: path.to_owned(),
            files,
            lock: Some(lock),
        })
    }

    /// Makes and opens what QEMU is to speak through, `with_agent` also what the guest's agent does.
    pub(crate) fn open_channels(&self, with_agent: bool) -> Result<Channels, RunDirError> {
        let listen =
            |path: &PathBuf| UnixListener::bind(path).map_err(PathError::of("listen on", path));
        let log = |path: &PathBuf| {
            let mut how = OpenOptions::new();
            how.create_new(true).append(true).mode(0o600);
            how.open(path).map_err(PathError::of("create", path))
        };
        Ok(Channels {
            qmp: listen(&self.files.qmp)?.into(),
            console: listen(&self.files.console)?.into(),
            console_log: log(&self.files.console_log)?.into(),
            control: listen(&self.files.control)?.into(),
            agent: with_agent
                .then(|| listen(&self.files.agent).map(Into::into))
                .transpose()?,
            qemu_log: log(&self.files.qemu_log)?,
        })
    }

    pub(crate) fn files(&self) -> &RunFiles {
        &self.files
    }

    /// The end of what the serial console has printed.
    pub(crate) fn end_of_console(&self) -> Vec<u8> {
        let path = &self.files.console_log;
        let end = ConsoleLog::at(path).end(Ended::MAX_CONSOLE_BYTES);
        end.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "cannot keep the console log's end");
            }
            Vec::new()
        })
    }

    /// Removes it and tells whether it is gone.
    pub(crate) fn remove(self) -> bool {
        let path = self.path.clone();
        drop(self);
        !path.exists()
    }

    /// Leaves it where it is, for whoever takes it.
    pub(crate) fn let_go(mut self) {
        self.lock = None;
    }

    /// Leaves it where it is, and locked for as long as this process lives.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }

    fn remove_stale_files(&self) -> Result<(), RunDirError> {
        let RunFiles {
            lock: _,
            qmp,
            console,
            console_log,
            control,
            agent,
            qemu_log,
        } = &self.files;
        let log = ConsoleLog::at(console_log);
        let (before, copying) = (log.before(), log.copying());
        for file in [
            qmp,
            console,
            console_log,
            &before,
            &copying,
            control,
            agent,
            qemu_log,
        ] {
            match fs::remove_file(file) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(PathError::of("remove", file)(error).into()),
            }
        }
        Ok(())
    }
}

/// Whether an existing path is what a launcher leaves behind when it is killed: a directory with a
/// lock file, or one that it had no time to put anything into.
fn is_stale_run_dir(path: &Path, files: &RunFiles) -> bool {
    fs::symlink_metadata(path).is_ok_and(|entry| entry.is_dir())
        && (files.lock.is_file() || fs::read_dir(path).is_ok_and(|mut all| all.next().is_none()))
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.lock.is_none() {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::error!(path = %self.path.display(), %error, "cannot remove the run directory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_private_and_goes_when_dropped() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("web-1");
        let run_dir = RunDir::create(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let channels = run_dir.open_channels(true).unwrap();
        let log = fs::metadata(&run_dir.files().console_log).unwrap();
        assert_eq!(log.permissions().mode() & 0o777, 0o600);
        drop(channels);
        drop(run_dir);
        assert!(!path.exists());
    }

    #[test]
    fn one_directory_serves_one_guest() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("web-1");
        let first = RunDir::create(&path).unwrap();
        assert!(matches!(RunDir::create(&path), Err(RunDirError::InUse(_))));
        assert!(
            first.files().lock.exists(),
            "the refused one must not touch the first's files"
        );
    }

    #[test]
    fn a_crashed_launchers_directory_is_taken_over() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("web-1");
        fs::create_dir(&path).unwrap();
        let files = RunFiles::within(&path);
        for file in [&files.lock, &files.qmp, &files.console_log] {
            fs::write(file, "old").unwrap();
        }
        let run_dir = RunDir::create(&path).unwrap();
        assert!(!run_dir.files().console_log.exists());
        run_dir.open_channels(true).unwrap();
    }

    /// A file system of so many pages and so many inodes, seen by the calling thread alone.
    fn tiny_file_system(at: &Path, pages: usize, inodes: usize) -> nix::Result<()> {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let options = format!("size={},nr_inodes={inodes}", pages * 4096);
        let flags = MsFlags::empty();
        mount(
            Some("tiny"),
            at,
            Some("tmpfs"),
            flags,
            Some(options.as_str()),
        )
    }

    /// Room for the file system's root and for the directory or neither; then for directory and lock,
    /// but not for what is in the lock.
    #[test]
    fn a_full_file_system_is_left_as_it_was() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: to mount a file system takes root");
            return;
        }
        for (pages, taken, inodes) in [(9, 0, 1), (9, 0, 2), (1, 1, 9)] {
            let parent = tempfile::tempdir().unwrap();
            let at = parent.path().to_owned();
            let tried = std::thread::spawn(move || {
                tiny_file_system(&at, pages, inodes).unwrap();
                if taken > 0 {
                    fs::write(at.join("taken"), vec![0; taken * 4096]).unwrap();
                }
                let error = RunDir::create(&at.join("web-1")).unwrap_err();
                let lock = LockFile::acquire(&at.join("daemon.lock")).map(LockFile::remove);
                fs::remove_file(at.join("taken")).ok();
                let left: Vec<_> = fs::read_dir(&at)
                    .unwrap()
                    .map(|e| e.unwrap().path())
                    .collect();
                (error, lock, left)
            });
            let (error, lock, left) = tried.join().unwrap();
            let case = format!("{pages} pages, {taken} taken, {inodes} inodes: {error}");
            assert!(left.is_empty(), "{case}: left {left:?}");
            assert!(error.to_string().contains("room"), "{case}");
            // The root alone, or no page for the pid: the lock cannot be had either.
            assert_eq!(lock.is_err(), inodes == 1 || taken == 1, "{case}");
        }
    }

    #[test]
    fn what_is_not_a_run_directory_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("web-1");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("precious"), "data").unwrap();
        assert!(matches!(
            RunDir::create(&path),
            Err(RunDirError::Foreign(_))
        ));
        assert!(path.join("precious").exists());
        let absent = parent.path().join("absent").join("web-1");
        assert!(matches!(
            RunDir::create(&absent),
            Err(RunDirError::Io { .. })
        ));
    }
}
