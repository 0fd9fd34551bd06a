//! Where guards are pinned: `/sys/fs/bpf/omerta/<network namespace>/<interface>/`.
//!
//! The path is taken through `/proc/1/root`, because a command run by `ip netns exec` has a /sys
//! of its own: what it pinned there would vanish with it, and the guard too.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::GuardError;

const MOUNT_POINT: &str = "/sys/fs/bpf";
const MOUNT_POINT_OF_INIT: &str = "/proc/1/root/sys/fs/bpf";

/// The pins of one interface's guard.
#[derive(Clone, Debug)]
pub struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// The place of `interface`'s pins in this thread's network namespace. Nothing is created.
    pub fn of(interface: &str) -> Result<Self, GuardError> {
        Ok(Self {
            directory: namespace_directory()?.join(encode(interface)),
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn exist(&self) -> bool {
        self.directory.is_dir()
    }

    pub fn create(&self) -> Result<(), GuardError> {
        fs::create_dir(&self.directory).map_err(failed("create", &self.directory))
    }

    /// Removes every pin; the links' first, so that no program runs without its maps' pins.
    pub fn remove(&self) -> Result<(), GuardError> {
        if !self.exist() {
            return Ok(());
        }
        for entry in fs::read_dir(&self.directory).map_err(failed("read", &self.directory))? {
            let path = entry.map_err(failed("read", &self.directory))?.path();
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
        fs::remove_dir(&self.directory).map_err(failed("remove", &self.directory))?;
        // The namespace's directory goes with its last guard.
        if let Some(parent) = self.directory.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    /// Holds every other change of this namespace's guards off until the lock is dropped.
    pub fn lock(&self) -> Result<File, GuardError> {
        let root = root()?;
        fs::create_dir_all(self.directory.parent().unwrap_or(&root))
            .map_err(failed("create", &self.directory))?;
        // The root is never removed, so everybody locks the same inode.
        let file = File::open(&root).map_err(failed("open", &root))?;
        file.lock().map_err(failed("lock", &root))?;
        // Another process may have removed the empty directory before the lock was ours.
        fs::create_dir_all(self.directory.parent().unwrap_or(&root))
            .map_err(failed("create", &self.directory))?;
        Ok(file)
    }
}

/// The interfaces of this thread's network namespace that have pins.
pub fn pinned_interfaces() -> Result<Vec<String>, GuardError> {
    let directory = namespace_directory()?;
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).map_err(failed("read", &directory))? {
        let entry = entry.map_err(failed("read", &directory))?;
        names.push(decode(&entry.file_name().to_string_lossy()));
    }
    names.sort();
    Ok(names)
}

fn namespace_directory() -> Result<PathBuf, GuardError> {
    let path = Path::new("/proc/thread-self/ns/net");
    let inode = fs::metadata(path).map_err(failed("read", path))?.ino();
    Ok(root()?.join(inode.to_string()))
}

fn root() -> Result<PathBuf, GuardError> {
    let mount_point = Path::new(MOUNT_POINT_OF_INIT);
    let mounted = statfs(mount_point)
        .map_err(|errno| failed("read", mount_point)(errno.into()))?
        .filesystem_type()
        == BPF_FS_MAGIC;
    if !mounted {
        mount_bpffs()?;
    }
    let root = mount_point.join("omerta");
    match fs::create_dir(&root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("create", &root)(error))
        }
        _ => Ok(root),
    }
}

/// Mounts bpffs where init sees it, so that it outlives this process.
fn mount_bpffs() -> Result<(), GuardError> {
    let path = Path::new(MOUNT_POINT);
    let same =
        fs::read_link("/proc/thread-self/ns/mnt").ok() == fs::read_link("/proc/1/ns/mnt").ok();
    let result = if same {
        mount(
            Some("bpf"),
            path,
            Some("bpf"),
            MsFlags::empty(),
            Some("mode=0700"),
        )
        .map_err(Into::into)
    } else {
        // Joining a mount namespace is refused to a process with threads; nsenter has none.
        Command::new("nsenter")
            .args([
                "--mount=/proc/1/ns/mnt",
                "mount",
                "-t",
                "bpf",
                "-o",
                "mode=0700",
                "bpf",
                MOUNT_POINT,
            ])
            .status()
            .and_then(|status| {
                status
                    .success()
                    .then_some(())
                    .ok_or_else(|| io::Error::other(status.to_string()))
            })
    };
    result.map_err(failed("mount bpffs at", path))
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> GuardError + 'a {
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => GuardError::NotPermitted,
        _ => GuardError::Bpffs {
            action,
            path: path.to_owned(),
            source,
        },
    }
}

/// bpffs refuses names with dots, which interfaces may have (VLANs).
fn encode(interface: &str) -> String {
    interface.replace('%', "%25").replace('.', "%2e")
}

fn decode(name: &str) -> String {
    name.replace("%2e", ".").replace("%25", "%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_round_trip_without_dots() {
        for name in ["tap0", "eth0.100", "a%b", "%2e", "a.%.b"] {
            assert!(!encode(name).contains('.'));
            assert_eq!(decode(&encode(name)), name);
        }
    }
}
