//! bpffs, where guards are pinned.
//!
//! The path is taken in the outermost mount namespace within reach, because a command run by
//! `ip netns exec` has a /sys of its own: what it pinned there would vanish with it, and the guard
//! too.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::GuardError;

const MOUNT_POINT: &str = "/sys/fs/bpf";
/// A second mount of the same bpffs. What is pinned lives as long as one of them, so whoever unmounts
/// the first does not open every tap.
const ANCHOR: &str = "/run/omerta-bpf";

/// How long one process waits for another that mounts. It takes milliseconds: one that takes longer
/// hangs, and holds nobody up for it.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a mount in another mount namespace may take, where it is a process's work.
const MOUNTING: Duration = Duration::from_secs(10);

/// What is pinned for this thread's network namespace is below it. It need not exist.
pub fn namespace_directory() -> Result<PathBuf, GuardError> {
    let path = Path::new("/proc/thread-self/ns/net");
    let inode = fs::metadata(path).map_err(failed("read", path))?.ino();
    Ok(root()?.join(inode.to_string()))
}

/// Omerta's directory on bpffs, made if need be and never removed.
pub fn root() -> Result<PathBuf, GuardError> {
    static ROOT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut known = ROOT.lock().unwrap_or_else(PoisonError::into_inner);
    // bpffs may have been unmounted since.
    if let Some(root) = known.as_ref().filter(|root| root.is_dir()) {
        return Ok(root.clone());
    }
    let mounted = Mounts::outermost().mounted()?;
    let root = mounted.join("omerta");
    match fs::DirBuilder::new().mode(0o700).create(&root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed("create", &root)(error));
        }
        _ => {}
    }
    // Whoever may rename or remove a directory of pins may take its guards away.
    const OTHERS_WRITE: u32 = 0o022;
    const STICKY: u32 = 0o1000;
    for (path, excused) in [(root.as_path(), 0), (mounted.as_path(), STICKY)] {
        let found = fs::symlink_metadata(path.join(".")).map_err(failed("look at", path))?;
        let mode = found.mode();
        if found.uid() != 0 || (mode & OTHERS_WRITE != 0 && mode & excused == 0) {
            return Err(GuardError::Untrusted { path: shown(path) });
        }
    }
    Ok(known.insert(root).clone())
}

/// Mounts bpffs a second time, so that what is pinned outlives an unmounting of the first. Callers
/// hold a lock in the namespace's directory.
pub fn anchor() -> Result<(), GuardError> {
    root()?;
    let mounts = Mounts::outermost();
    let _turn = mounts.turn(PATIENCE)?;
    if mounts.is_anchored()? {
        return Ok(());
    }
    let anchor = mounts.path(ANCHOR);
    fs::create_dir_all(&anchor).map_err(failed("create", &anchor))?;
    mounts.mount_again(MOUNT_POINT, ANCHOR)
}

/// Takes the second mount away where nothing is pinned any more.
pub fn remove_anchor() -> Result<(), GuardError> {
    let root = root()?;
    let mounts = Mounts::outermost();
    // Where another is at it, it stays: whoever removes the next last guard comes by.
    let Some(_turn) = mounts.turn(Duration::ZERO)? else {
        return Ok(());
    };
    let is_empty = |mut entries: fs::ReadDir| entries.next().is_none();
    if fs::read_dir(&root).is_ok_and(is_empty) && mounts.is_anchored()? {
        mounts.unmount(ANCHOR)?;
        let anchor = mounts.path(ANCHOR);
        fs::remove_dir(&anchor).map_err(failed("remove", &anchor))?;
    }
    Ok(())
}

/// The mounts of the outermost mount namespace within reach.
struct Mounts {
    /// A process in it, where this one is not.
    outer: Option<u32>,
}

impl Mounts {
    fn outermost() -> Self {
        Self {
            outer: outer_process(),
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        match self.outer {
            Some(outer) => format!("/proc/{outer}/root{path}").into(),
            None => path.into(),
        }
    }

    /// Held while mounting: two processes that both mount would hide each other's pins. `None` where
    /// another has not let go of it within `patience`.
    fn turn(&self, patience: Duration) -> Result<Option<File>, GuardError> {
        let path = self.path(MOUNT_POINT);
        let file = File::open(&path).map_err(failed("open", &path))?;
        let deadline = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(error) => return Err(failed("lock", &path)(error.into())),
            }
        }
    }

    fn is_anchored(&self) -> Result<bool, GuardError> {
        let anchor = self.path(ANCHOR);
        match fs::exists(&anchor) {
            Ok(true) => is_bpffs(&anchor),
            Ok(false) => Ok(false),
            Err(error) => Err(failed("look at", &anchor)(error)),
        }
    }

    /// bpffs, mounted if need be: the one of which there is a second mount, where there is one.
    fn mounted(&self) -> Result<PathBuf, GuardError> {
        let _turn = self.turn(PATIENCE)?;
        let (mut place, anchor) = (self.path(MOUNT_POINT), self.path(ANCHOR));
        let is_anchored = self.is_anchored()?;
        if !is_bpffs(&place)? {
            if is_anchored {
                self.mount_again(ANCHOR, MOUNT_POINT)?;
            } else {
                self.mount_new(MOUNT_POINT)?;
            }
        }
        let device = |path: &Path| Ok(fs::metadata(path).map_err(failed("look at", path))?.dev());
        // Another bpffs was mounted in the place of the one that was unmounted.
        if is_anchored && device(&anchor)? != device(&place)? {
            place = anchor;
        }
        if self.outer.is_none() {
            return Ok(place);
        }
        // The other process may end; an open directory stays.
        let directory = File::open(&place).map_err(failed("open", &place))?;
        Ok(PathBuf::from(format!(
            "/proc/self/fd/{}",
            directory.into_raw_fd()
        )))
    }

    fn mount_new(&self, at: &str) -> Result<(), GuardError> {
        match self.outer {
            Some(_) => self.within("mount", &["-t", "bpf", "-o", "mode=0700", "bpf", at]),
            None => {
                let none = MsFlags::empty();
                mount(Some("bpf"), at, Some("bpf"), none, Some("mode=0700")).map_err(Into::into)
            }
        }
        .map_err(failed("mount bpffs at", Path::new(at)))
    }

    fn mount_again(&self, from: &str, at: &str) -> Result<(), GuardError> {
        match self.outer {
            Some(_) => self.within("mount", &["--bind", from, at]),
            None => {
                let (kind, data) = (None::<&str>, None::<&str>);
                mount(Some(from), at, kind, MsFlags::MS_BIND, data).map_err(Into::into)
            }
        }
        .map_err(failed("mount bpffs at", Path::new(at)))
    }

    fn unmount(&self, at: &str) -> Result<(), GuardError> {
        match self.outer {
            Some(_) => self.within("umount", &["-l", at]),
            None => umount2(at, MntFlags::MNT_DETACH).map_err(Into::into),
        }
        .map_err(failed("unmount", Path::new(at)))
    }

    /// Runs `program` in the outermost mount namespace. Joining one is refused to a process with
    /// threads; nsenter has none.
    fn within(&self, program: &str, arguments: &[&str]) -> io::Result<()> {
        let outer = self.outer.unwrap_or(1);
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount=/proc/{outer}/ns/mnt"))
            .arg(program)
            .args(arguments);
        let status = ended_within(MOUNTING, command)?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!("{program}: {status}")))
        }
    }
}

/// Runs `command`, and kills it where it has not ended within `patience`.
fn ended_within(patience: Duration, mut command: Command) -> io::Result<ExitStatus> {
    let deadline = Instant::now() + patience;
    let mut child = command.spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            break;
        }
        thread::sleep(Duration::from_millis(1));
    }
    let name = command.get_program().to_string_lossy();
    let problem = format!("{name} has not ended in {patience:?} and was killed");
    child.kill()?;
    // Where the kernel itself hangs it goes on hanging: nobody waits for that.
    thread::spawn(move || child.wait());
    Err(io::Error::new(io::ErrorKind::TimedOut, problem))
}

/// The outermost process within reach whose mount namespace is not this one's: init, or where
/// init is out of reach (containers) the eldest ancestor that is not. Guards are pinned in its mounts.
pub fn outer_process() -> Option<u32> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let own = namespace("thread-self")?;
    let mut eldest = None;
    let mut pid = std::os::unix::process::parent_id();
    while pid > 1 && namespace(&pid.to_string()).is_some() {
        eldest = Some(pid);
        pid = parent_of(pid)?;
    }
    let outer = if namespace("1").is_some() { 1 } else { eldest? };
    (namespace(&outer.to_string())? != own).then_some(outer)
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))?
        .trim()
        .parse()
        .ok()
}

fn is_bpffs(path: &Path) -> Result<bool, GuardError> {
    let kind = statfs(path)
        .map_err(|errno| failed("read", path)(errno.into()))?
        .filesystem_type();
    Ok(kind == BPF_FS_MAGIC)
}

pub fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> GuardError + 'a {
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => GuardError::NotPermitted,
        _ => GuardError::Bpffs {
            action,
            path: shown(path),
            source,
        },
    }
}

/// `path` as the outer mount namespace has it, instead of the descriptor that this process holds.
pub fn shown(path: &Path) -> PathBuf {
    let mut parts = path.strip_prefix("/proc/self/fd").unwrap_or(path).iter();
    if parts.as_path() == path {
        return path.to_owned();
    }
    parts.next();
    Path::new(MOUNT_POINT).join(parts.as_path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_hangs_is_given_up() {
        let mut hangs = Command::new("sleep");
        hangs.arg("infinity");
        let given_up = ended_within(Duration::from_millis(10), hangs).map_err(|e| e.kind());
        assert_eq!(given_up, Err(io::ErrorKind::TimedOut));
    }

    #[test]
    fn how_a_mount_ends_is_told() {
        for (program, success) in [("true", true), ("false", false)] {
            let status = ended_within(MOUNTING, Command::new(program));
            assert_eq!(status.ok().map(|status| status.success()), Some(success));
        }
    }

    #[test]
    fn paths_below_a_held_descriptor_are_shown_by_their_own_names() {
        for (path, wanted) in [
            ("/proc/self/fd/7/omerta/1/tap0", "/sys/fs/bpf/omerta/1/tap0"),
            ("/sys/fs/bpf/omerta/1/tap0", "/sys/fs/bpf/omerta/1/tap0"),
            ("/proc/1/ns/net", "/proc/1/ns/net"),
        ] {
            assert_eq!(shown(Path::new(path)), Path::new(wanted));
        }
    }
}
