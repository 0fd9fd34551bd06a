//! What QEMU's process does to itself between fork and exec, to be in its jail when QEMU begins.
//!
//! The child of a process with threads may do little: another thread may have held any lock. So all
//! is prepared before the fork, and what runs after makes system calls and allocates nothing.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, pivot_root, write};
use rustix::mount::{MoveMountFlags, move_mount};

use super::JailError;

/// The most that QEMU may write into any one file, in bytes, where the guest has no disk: the console
/// log is the guest's to fill, the host's disk is not.
pub(crate) const MAX_LOG_BYTES: u64 = 16 << 20;

/// The most descriptors that QEMU may have open.
pub(crate) const MAX_DESCRIPTORS: u32 = 1024;

/// Half of all memory, as the kernel's choice of whom to kill reckons (proc_pid_oom_score_adj(5)).
const OOM_SCORE: &[u8] = b"500";

/// Above all capabilities that a kernel may have: `_LINUX_CAPABILITY_U32S_3` words.
const CAPABILITIES: libc::c_ulong = 64;

/// A path of the host's, where it is to be in the jail, and by which flags.
#[derive(Debug)]
pub(super) struct BindStep {
    pub(super) source: CString,
    pub(super) place: CString,
    pub(super) flags: MsFlags,
}

/// All that the way into the jail takes.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Each cgroup's file of processes.
    pub(super) cgroups: Vec<OwnedFd>,
    /// The jail's root, mounted nowhere.
    pub(super) root: OwnedFd,
    /// A directory of the host's over which the root is put on the way.
    pub(super) place: CString,
    pub(super) binds: Vec<BindStep>,
    pub(super) uid: u32,
    /// Beside the user's own.
    pub(super) groups: Vec<libc::gid_t>,
    pub(super) landlock: Option<OwnedFd>,
    /// The most that QEMU may write into any one file, in bytes.
    pub(super) file_bytes: u64,
    /// What stays open, under the same numbers.
    pub(super) handed: Vec<OwnedFd>,
    /// Whether QEMU lives on when the launcher dies.
    pub(super) outlives: bool,
}

/// Where on the way in something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Closing what is not QEMU's.
    Descriptors,
    /// Joining the cgroups.
    Cgroups,
    /// Resource limits.
    Limits,
    /// New namespaces.
    Namespaces,
    /// Putting the root together.
    Mounts,
    /// Making it the root.
    Pivot,
    /// Another user, without capabilities.
    Privileges,
    /// Dying with the launcher.
    Parent,
    /// Landlock.
    Landlock,
}

impl Step {
    const ALL: [Self; 9] = [
        Self::Descriptors,
        Self::Cgroups,
        Self::Limits,
        Self::Namespaces,
        Self::Mounts,
        Self::Pivot,
        Self::Privileges,
        Self::Parent,
        Self::Landlock,
    ];

    /// The step that a child told of by [`Entry::enter`].
    pub(crate) fn told(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u8 == byte)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => "close the launcher's descriptors",
            Self::Cgroups => "join its cgroups",
            Self::Namespaces => {
                "make namespaces (CAP_SYS_ADMIN; `RestrictNamespaces=` of the unit)"
            }
            Self::Mounts => "mount what it sees (CAP_SYS_ADMIN)",
            Self::Pivot => "change its root (CAP_SYS_ADMIN)",
            Self::Limits => "set its resource limits",
            Self::Privileges => {
                "become its user without capabilities (CAP_SETUID, CAP_SETGID, CAP_SETPCAP)"
            }
            Self::Parent => "be bound to the launcher's life",
            Self::Landlock => "enter Landlock",
        })
    }
}

impl Entry {
    /// Runs in the child. Where a step fails, its number is written to `told`.
    pub(crate) fn enter(&self, parent: u32, told: BorrowedFd<'_>) -> io::Result<()> {
        self.walk(parent).map_err(|(step, errno)| {
            // The parent does without, if it must.
            let _ = write(told, &[step as u8]);
            errno.into()
        })
    }

    fn walk(&self, parent: u32) -> Result<(), (Step, Errno)> {
        let at = |step| move |errno| (step, errno);
        // Until it is its user's, by whom it is found, it dies with the launcher in any case.
        die_with(parent).map_err(at(Step::Parent))?;
        close_all_on_exec().map_err(at(Step::Descriptors))?;
        for cgroup in &self.cgroups {
            write(cgroup, b"0").map_err(at(Step::Cgroups))?;
        }
        limit(self.file_bytes).map_err(at(Step::Limits))?;
        let namespaces = CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS;
        unshare(namespaces).map_err(at(Step::Namespaces))?;
        self.mount().map_err(at(Step::Mounts))?;
        change_root().map_err(at(Step::Pivot))?;
        self.drop_privileges().map_err(at(Step::Privileges))?;
        // The change of user has undone it.
        if !self.outlives {
            die_with(parent).map_err(at(Step::Parent))?;
        }
        if let Some(rules) = &self.landlock {
            // SAFETY: a descriptor and flags; no pointer is passed.
            let entered =
                unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) };
            Errno::result(entered).map_err(at(Step::Landlock))?;
        }
        for handed in &self.handed {
            keep_on_exec(handed.as_raw_fd()).map_err(at(Step::Descriptors))?;
        }
        Ok(())
    }

    /// Puts the root together in the new namespace, from where nothing gets to the host's.
    fn mount(&self) -> nix::Result<()> {
        const NONE: Option<&std::ffi::CStr> = None;
        let place = self.place.as_c_str();
        mount(
            NONE,
            c"/",
            NONE,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            NONE,
        )?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(self.root.as_fd(), c"", rustix::fs::CWD, place, flags)
            .map_err(|error| Errno::from_raw(error.raw_os_error()))?;
        // A mount of its own on the same files: the launcher can still write, QEMU cannot.
        mount(Some(place), place, NONE, MsFlags::MS_BIND, NONE)?;
        chdir(place)?;
        let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
        for bind in &self.binds {
            let place = bind.place.as_c_str();
            mount(
                Some(bind.source.as_c_str()),
                place,
                NONE,
                MsFlags::MS_BIND,
                NONE,
            )?;
            mount(NONE, place, NONE, remount | bind.flags, NONE)?;
        }
        let inert =
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(NONE, c".", NONE, remount | inert, NONE)
    }

    /// Becomes its user. Root's capabilities go with the last of root's numbers, and nothing that is
    /// executed gives any back.
    fn drop_privileges(&self) -> nix::Result<()> {
        for capability in 0..CAPABILITIES {
            match prctl(libc::PR_CAPBSET_DROP, capability) {
                Err(Errno::EINVAL) => break, // the kernel has no more
                dropped => dropped?,
            }
        }
        let (groups, uid) = (&self.groups, self.uid);
        // System calls, not libc's functions: those would tell all threads, which the child lacks.
        // SAFETY: `groups` outlives the call.
        Errno::result(unsafe {
            libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr())
        })?;
        // SAFETY: numbers only.
        Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, uid, uid, uid) })?;
        // SAFETY: numbers only.
        Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
        prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong,
        )?;
        clear_capabilities()?;
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
    }
}

/// What a probe's QEMU does in place of entering a jail.
pub(crate) fn confine(parent: u32) -> io::Result<()> {
    die_with(parent)?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    limit(MAX_LOG_BYTES)?;
    Ok(close_all_on_exec()?)
}

/// Also what others have opened without close-on-exec.
fn close_all_on_exec() -> nix::Result<()> {
    // SAFETY: numbers only.
    let closed = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    Errno::result(closed).map(drop)
}

fn keep_on_exec(fd: RawFd) -> nix::Result<()> {
    // SAFETY: the entry holds `fd` open.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).map(drop)
}

/// Makes the current directory the root and lets go of the old one.
fn change_root() -> nix::Result<()> {
    pivot_root(c".", c".")?;
    umount2(c".", MntFlags::MNT_DETACH)?;
    chdir(c"/")
}

fn limit(file_bytes: u64) -> nix::Result<()> {
    // Where the host itself runs out of memory, a guest goes before anything of the host's.
    let score = open(
        c"/proc/self/oom_score_adj",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    write(score, OOM_SCORE)?;
    // After the last file is opened: a launcher with many guests has more open than QEMU may have.
    for (resource, most) in [
        (Resource::RLIMIT_FSIZE, file_bytes),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS.into()),
    ] {
        // What this process has less of cannot be raised again.
        let most = most.min(getrlimit(resource)?.1);
        setrlimit(resource, most, most)?;
    }
    // At the limit a write shall fail, not kill the guest. Ignored signals stay so over exec.
    // SAFETY: SIG_IGN is a valid disposition for SIGXFSZ.
    if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(Errno::last());
    }
    Ok(())
}

fn clear_capabilities() -> nix::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
    const VERSION: u32 = 0x2008_0522;
    let header = [VERSION, 0];
    let none = [0u32; 6];
    // SAFETY: the header is two words, and version 3 reads three words twice; both outlive the call.
    let cleared = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    Errno::result(cleared).map(drop)
}

fn die_with(parent: u32) -> nix::Result<()> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?;
    // The parent may have died before the line above took effect.
    if nix::unistd::getppid().as_raw() as u32 == parent {
        Ok(())
    } else {
        Err(Errno::ESRCH)
    }
}

fn prctl(option: libc::c_int, argument: libc::c_ulong) -> nix::Result<()> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: numbers only; what an option does not use must be 0.
    Errno::result(unsafe { libc::prctl(option, argument, NONE, NONE, NONE) }).map(drop)
}

/// `path` for a system call.
pub(super) fn c_path(path: &Path) -> Result<CString, JailError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(JailError::make("use a path with a zero byte"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_told_by_its_number() {
        for step in Step::ALL {
            assert_eq!(Step::told(step as u8), Some(step));
        }
        assert_eq!(Step::told(200), None);
    }
}
