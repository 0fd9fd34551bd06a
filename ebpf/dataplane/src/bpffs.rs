//! bpffs, where guards are pinned.
//!
//! The path is taken in the outermost mount namespace within reach, because a command run by
//! `ip netns exec` has a /sys of its own: what it pinned there would vanish with it, and the guard
//! too.

use std::fs::{self, File};
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::GuardError;

const MOUNT_POINT: &str = "/sys/fs/bpf";

/// What is pinned for this thread's network namespace is below it. It need not exist.
pub fn namespace_directory() -> Result<PathBuf, GuardError> {
    let path = Path::new("/proc/thread-self/ns/net");
    let inode = fs::metadata(path).map_err(failed("read", path))?.ino();
    Ok(root()?.join(inode.to_string()))
}

/// Omerta's directory on bpffs, made if need be and never removed.
pub fn root() -> Result<PathBuf, GuardError> {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(root) = ROOT.get() {
        return Ok(root.clone());
    }
    let mounted = outer_mount_point()?;
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
    Ok(ROOT.get_or_init(|| root).clone())
}

/// bpffs as the outermost mount namespace within reach has it, mounted if need be.
fn outer_mount_point() -> Result<PathBuf, GuardError> {
    let own = Path::new(MOUNT_POINT);
    let outer = outer_process();
    // Held while mounting: two processes that both mount would hide each other's pins.
    let covered = File::open(own).map_err(failed("open", own))?;
    covered.lock().map_err(failed("lock", own))?;
    let Some(outer) = outer else {
        if !is_bpffs(own)? {
            mount(
                Some("bpf"),
                own,
                Some("bpf"),
                MsFlags::empty(),
                Some("mode=0700"),
            )
            .map_err(|errno| failed("mount bpffs at", own)(errno.into()))?;
        }
        return Ok(own.to_owned());
    };
    let path = PathBuf::from(format!("/proc/{outer}/root{MOUNT_POINT}"));
    if !is_bpffs(&path)? {
        // Joining a mount namespace is refused to a process with threads; nsenter has none.
        let status = Command::new("nsenter")
            .arg(format!("--mount=/proc/{outer}/ns/mnt"))
            .args(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", MOUNT_POINT])
            .status();
        status
            .and_then(|status| {
                status
                    .success()
                    .then_some(())
                    .ok_or_else(|| io::Error::other(status.to_string()))
            })
            .map_err(failed("mount bpffs at", &path))?;
    }
    // The other process may end; an open directory stays.
    let directory = File::open(&path).map_err(failed("open", &path))?;
    Ok(PathBuf::from(format!(
        "/proc/self/fd/{}",
        directory.into_raw_fd()
    )))
}

/// The outermost process within reach whose mount namespace is not this one's: init, or where
/// init is out of reach (containers) the eldest ancestor that is not.
fn outer_process() -> Option<u32> {
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
