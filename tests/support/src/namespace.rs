//! A network namespace that lives as long as its value.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::{StageError, interface};

const DIRECTORY: &str = "/run/netns";

/// Tells apart the namespaces that one process makes with the same prefix.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace, named under `/run/netns` so that `ip -n NAME` and
/// `nsenter --net=/run/netns/NAME` find it. Unmounted and unlinked on drop; the kernel removes it
/// with its interfaces once no process is left in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: Arc<File>,
}

impl Namespace {
    /// Makes a namespace named `PREFIX-PID-N`, with `lo` up. What another test's namespace has left pinned under the
    /// number that this one has now is nobody's, and removed.
    ///
    /// # Errors
    /// Without root, or where the name cannot be bound under `/run/netns`.
    pub fn new(prefix: &str) -> Result<Self, StageError> {
        let namespace = Self::with_left_overs(prefix)?;
        let pins = format!("/sys/fs/bpf/omerta/{}", namespace.inode()?);
        // Mostly there is nothing.
        let _ = fs::remove_dir_all(pins);
        Ok(namespace)
    }

    /// As [`Namespace::new`], and leaves what is pinned.
    ///
    /// # Errors
    /// As [`Namespace::new`].
    pub fn with_left_overs(prefix: &str) -> Result<Self, StageError> {
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{prefix}-{}-{serial}", std::process::id());
        let failed = |action| {
            let name = name.clone();
            move |source| StageError::Namespace {
                action,
                name,
                source,
            }
        };
        fs::create_dir_all(DIRECTORY).map_err(failed("name"))?;
        let path = Path::new(DIRECTORY).join(&name);
        File::create_new(&path).map_err(failed("name"))?;
        let handle = on_thread(|| bind_new_namespace(&path)).inspect_err(|_| {
            // Nothing was mounted, so only the name is left to take back.
            let _ = fs::remove_file(&path);
        });
        let namespace = Self {
            handle: Arc::new(handle.map_err(failed("make"))?),
            name,
        };
        namespace.enter(|| interface::bring_up("lo"))??;
        Ok(namespace)
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is bound.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// The number by which the kernel tells namespaces apart.
    ///
    /// # Errors
    /// Where the kernel does not answer for an open handle.
    pub fn inode(&self) -> Result<u64, StageError> {
        let failed = |source| StageError::Namespace {
            action: "identify",
            name: self.name.clone(),
            source,
        };
        Ok(self.handle.metadata().map_err(failed)?.ino())
    }

    /// Runs `work` on a thread of its own inside the namespace. A panic in `work` goes on in the
    /// caller.
    ///
    /// # Errors
    /// Where the namespace cannot be entered; `work` has not run then.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, StageError> {
        let failed = |source: nix::Error| StageError::Namespace {
            action: "enter",
            name: self.name.clone(),
            source: source.into(),
        };
        on_thread(|| {
            setns(self.handle.as_fd(), CloneFlags::CLONE_NEWNET).map_err(failed)?;
            Ok(work())
        })
    }

    /// A command that will run inside the namespace. The mounts are the caller's, so bpffs stays
    /// visible, which `ip netns exec` would hide.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let handle = Arc::clone(&self.handle);
        // SAFETY: the closure runs between fork and exec and only makes the setns system call on
        // a descriptor that the closure itself keeps open; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || {
                setns(handle.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
            });
        }
        command
    }

    /// Runs `ip` inside the namespace with arguments separated by blanks.
    ///
    /// # Errors
    /// Where `ip` is missing or refuses.
    pub fn ip(&self, arguments: &str) -> Result<(), StageError> {
        interface::run_ip(self.command("ip"), arguments)
    }

    /// Switches IPv6 off for all interfaces, present and coming, so that captures see no router
    /// solicitations, listener reports or address probes from the stage itself.
    ///
    /// # Errors
    /// Where the settings cannot be written. A kernel without IPv6 is no error.
    pub fn disable_ipv6(&self) -> Result<(), StageError> {
        for scope in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
            if Path::new(&path).exists() {
                self.set(path, "1")?;
            }
        }
        Ok(())
    }

    /// Lets the namespace forward IPv4 between its interfaces.
    ///
    /// # Errors
    /// Where the setting cannot be written.
    pub fn enable_forwarding(&self) -> Result<(), StageError> {
        self.set("/proc/sys/net/ipv4/ip_forward", "1")
    }

    /// Writes a setting below /proc/sys/net, as the namespace sees it.
    ///
    /// # Errors
    /// Where there is no such setting, or the kernel refuses the value.
    pub fn set(&self, path: impl Into<String>, value: &'static str) -> Result<(), StageError> {
        let path = path.into();
        // /proc/sys/net shows the namespace of the task that opens it.
        self.enter(|| fs::write(&path, value))?
            .map_err(|source| StageError::Setting {
                path,
                value,
                source,
            })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let path = self.path();
        // A drop cannot report; what is left behind shows under /run/netns.
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&path);
    }
}

/// Moves the calling thread into a new namespace and binds that to `path`.
fn bind_new_namespace(path: &Path) -> Result<File, io::Error> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let own = "/proc/thread-self/ns/net";
    let handle = File::open(own)?;
    mount(
        Some(own),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    Ok(handle)
}

/// Namespaces belong to threads: what changes one runs on a thread that ends with the change.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(cause) => panic::resume_unwind(cause),
    })
}
