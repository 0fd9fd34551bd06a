//! Where guards are pinned: `/sys/fs/bpf/omerta/<network namespace>/<interface>/`.
//!
//! The path is taken in the outermost mount namespace within reach, because a command run by
//! `ip netns exec` has a /sys of its own: what it pinned there would vanish with it, and the guard
//! too.

use std::fs::{self, File};
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::{GuardError, Owner};

const MOUNT_POINT: &str = "/sys/fs/bpf";
const OWNER: &str = "owner";

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
        fs::create_dir_all(&self.directory).map_err(failed("create", &self.directory))
    }

    /// Records whose the guard is, as a symbolic link: it is whole at once, and goes with the pins.
    pub fn set_owner(&self, owner: &Owner) -> Result<(), GuardError> {
        let path = self.path(OWNER);
        symlink(owner.as_str(), &path).map_err(failed("create", &path))
    }

    /// Whose the guard is.
    pub fn owner(&self) -> Result<Option<Owner>, GuardError> {
        let path = self.path(OWNER);
        match fs::read_link(&path) {
            Ok(name) => {
                let owner = name.to_str().and_then(|name| name.parse().ok());
                owner.map(Some).ok_or_else(|| {
                    failed("read", &path)(io::Error::other("this is no owner's name"))
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Removes every pin; the links' first, so that no program runs without its maps' pins.
    pub fn remove(&self) -> Result<(), GuardError> {
        if !self.exist() {
            return Ok(());
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed("read", &self.directory))? {
            paths.push(entry.map_err(failed("read", &self.directory))?.path());
        }
        let is_link = |path: &PathBuf| {
            path.file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"link_"))
        };
        paths.sort_by_key(|path| !is_link(path));
        for path in paths {
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
        // The root is never removed, so everybody locks the same inode.
        let file = File::open(&root).map_err(failed("open", &root))?;
        file.lock().map_err(failed("lock", &root))?;
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
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(root) = ROOT.get() {
        return Ok(root.clone());
    }
    let root = outer_mount_point()?.join("omerta");
    match fs::create_dir(&root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed("create", &root)(error));
        }
        _ => {}
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
