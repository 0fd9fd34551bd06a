//! Network namespaces, by a descriptor: one lives as long as a descriptor, a thread or an interface's driver has it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// That of this thread.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn of_this_thread() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(Self)
    }

    /// Gives this thread a new one, which has no interface but a `lo` that is down. It never comes back from there, and
    /// threads that it begins are there too.
    ///
    /// # Errors
    /// Where the kernel refuses; the thread is where it was, or in a new one that nobody knows.
    pub fn for_this_thread() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Self::of_this_thread()
    }

    /// Does `work` there, on a thread of its own, and waits for it.
    ///
    /// # Errors
    /// Where it cannot be entered; nothing is done then.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let enter = || {
            setns(self.as_fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        std::thread::scope(|threads| {
            let thread = std::thread::Builder::new().spawn_scoped(threads, enter)?;
            let broken = |_| io::Error::other("the work there broke off: see the log");
            thread.join().map_err(broken)?
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Namespace {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
