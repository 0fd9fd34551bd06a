//! Whether a guard is still what its owner left: cheap enough to be asked many times a second.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{MsgFlags, recv};
use omerta_verdict::{Direction, Endpoint};

use crate::bpffs::namespace_directory;
use crate::link::{self, LinkInfo};
use crate::state::StateMap;
use crate::store::state_of;
use crate::{Guard, GuardError, Standing, clsact, interface, lease, links, netlink};

/// One of the guard's links, or the program of one of its filters, held open: while it is, the
/// kernel runs a link's program even where the link's pin is removed, and gives the program's id to
/// no other.
#[derive(Debug)]
struct Held {
    direction: Direction,
    object: OwnedFd,
    attached: Attached,
    pin: PathBuf,
    inode: u64,
    /// The hook when it was last found in order; 0 before.
    revision: AtomicU64,
}

#[derive(Debug)]
enum Attached {
    ByLink(LinkInfo),
    ByFilter { program: u32 },
}

impl Held {
    /// What is wrong on the hook of the interface of `ifindex`.
    fn complaint(&self, ifindex: u32) -> io::Result<Option<&'static str>> {
        let place = match self.attached {
            Attached::ByLink(then) => {
                let now = link::info_of(&self.object)?;
                if now.ifindex != ifindex {
                    return Ok(Some("its link was cut"));
                }
                if now.program_id != then.program_id {
                    return Ok(Some("its program was replaced"));
                }
                let hook = link::first_on(ifindex, self.direction)?;
                if hook.program_id == Some(now.program_id) {
                    self.revision.store(hook.revision, Ordering::Relaxed);
                    return Ok(None);
                }
                1
            }
            Attached::ByFilter { program } => {
                match clsact::place(ifindex, self.direction, program)? {
                    Some(place) => place,
                    None => return Ok(Some("its filter was removed or replaced")),
                }
            }
        };
        Ok((place > 0).then_some(Standing::Preceded.why()))
    }

    /// Whether the hook is, to the last change, as it was when it was found in order.
    fn is_untouched(&self, ifindex: u32) -> bool {
        let Attached::ByLink(then) = self.attached else {
            return false;
        };
        let known = self.revision.load(Ordering::Relaxed);
        link::first_on(ifindex, self.direction).is_ok_and(|hook| {
            known != 0 && hook.revision == known && hook.program_id == Some(then.program_id)
        })
    }
}

/// A guard as its owner left it.
pub struct GuardWatch {
    interface: String,
    ifindex: u32,
    held: [Held; 2],
    state: StateMap,
    /// The generation that the owner knows of. Whoever changes the policy in the owner's name holds it meanwhile.
    expected: Mutex<u64>,
}

impl fmt::Debug for GuardWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardWatch")
            .field("interface", &self.interface)
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

impl GuardWatch {
    /// Begins to watch a guard, as it is now.
    ///
    /// # Errors
    /// Where the guard is not in force and first on its hooks.
    pub fn begin(guard: &Guard) -> Result<Self, GuardError> {
        let interface = guard.interface();
        let by_filters = guard.pins.filters()?.is_some();
        let hold = |direction| -> Result<Held, GuardError> {
            let pin = if by_filters {
                guard.pins.program_path(direction)
            } else {
                guard.pins.link_path(direction)
            };
            let hold = || {
                let object = link::open(&pin)?;
                let attached = if by_filters {
                    let program = link::program_id_of(&object)?;
                    Attached::ByFilter { program }
                } else {
                    Attached::ByLink(link::info_of(&object)?)
                };
                Ok((object, attached, fs::symlink_metadata(&pin)?.ino()))
            };
            let (object, attached, inode) = hold().map_err(|source| GuardError::System {
                action: "hold a link or program",
                interface: interface.to_owned(),
                source,
            })?;
            Ok(Held {
                direction,
                object,
                attached,
                pin,
                inode,
                revision: AtomicU64::new(0),
            })
        };
        let state = state_of(interface, &guard.pins)?;
        let watch = Self {
            interface: interface.to_owned(),
            ifindex: guard.ifindex(),
            held: [hold(Direction::Egress)?, hold(Direction::Ingress)?],
            expected: Mutex::new(state.generation()),
            state,
        };
        // What is held now must be what the handle knows: it was not replaced in between.
        guard.verify()?;
        watch.check()?;
        Ok(watch)
    }

    /// Proves that nothing has changed since: the interface has its name, each link or program its
    /// pin, each link its program and its interface, that program is the first on its hook, and no
    /// policy was committed. Some fifteen system calls.
    ///
    /// # Errors
    /// What has changed.
    pub fn check(&self) -> Result<(), GuardError> {
        self.same_interface()?;
        for held in &self.held {
            match fs::symlink_metadata(&held.pin) {
                Ok(pin) if pin.ino() == held.inode => {}
                Ok(_) => {
                    return Err(GuardError::Replaced {
                        interface: self.interface.clone(),
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(self.not_in_force("its pins were removed"));
                }
                Err(error) => return Err(self.failed("read a pin")(error)),
            }
            let complaint = held.complaint(self.ifindex);
            if !matches!(complaint, Ok(None)) {
                // An interface that goes takes along what judged it, and may have gone just now.
                self.same_interface()?;
            }
            if let Some(why) = complaint.map_err(self.failed("ask for the programs"))? {
                return Err(self.not_in_force(why));
            }
        }
        let has_xdp = links::has_xdp(self.ifindex);
        if !matches!(has_xdp, Ok(false)) {
            self.same_interface()?;
        }
        if has_xdp.map_err(self.failed("ask for an XDP program"))? {
            return Err(self.not_in_force(Standing::Preceded.why()));
        }
        match self.expected.try_lock() {
            Ok(expected) => self.same_policy(*expected),
            Err(TryLockError::Poisoned(poisoned)) => self.same_policy(*poisoned.into_inner()),
            // The owner is changing it, and may wait for another's lock, which a check must not. What another has changed
            // meanwhile is found by the next.
            Err(TryLockError::WouldBlock) => Ok(()),
        }
    }

    /// Puts `endpoints` in place of the guard's whole allowlist, in one commit, and takes that policy for its owner's from
    /// then on. Returns the epoch in force.
    ///
    /// # Errors
    /// Where another has changed the policy, or it cannot be changed; nothing has changed then.
    pub fn replace(&self, guard: &Guard, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        self.same_policy(*expected)?;
        let epoch = guard.replace(endpoints)?;
        // One more, or the same where nothing had to change. Anything else is another's doing, and is found by the next check.
        if self.state.generation() == expected.wrapping_add(1) {
            *expected = expected.wrapping_add(1);
        }
        Ok(epoch)
    }

    fn same_policy(&self, expected: u64) -> Result<(), GuardError> {
        if self.state.generation() == expected {
            Ok(())
        } else {
            Err(self.not_in_force("its policy was changed by another"))
        }
    }

    /// Has the guard drop everything when `lease` has passed from now on; `None` is for ever. For the
    /// guard's owner alone, who is one process: no lock is taken, and no system call made.
    ///
    /// # Errors
    /// When there is no clock.
    pub fn renew(&self, lease: Option<Duration>) -> Result<(), GuardError> {
        let word = lease::word(&self.interface, lease)?;
        self.state.set_lease_until_ns(word);
        Ok(())
    }

    /// Whether nothing has changed since it was checked, of which there is no occasion to look: no
    /// program came, went or was exchanged on the hooks of the very interface, and no policy was committed.
    /// Two system calls, which wait for nobody. What the occasions tell (its pins, its name, its namespace) is for whoever
    /// is told. Where it is not so, [`Self::check`] tells what has changed, if anything has that matters.
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        let untouched = |held: &Held| held.is_untouched(self.ifindex);
        let expected = self.expected.try_lock().map(|expected| *expected);
        expected.is_ok_and(|expected| self.state.generation() == expected)
            && self.held.iter().all(untouched)
    }

    /// Proves the same, in full where it is not so.
    ///
    /// # Errors
    /// What has changed.
    pub fn glance(&self) -> Result<(), GuardError> {
        if self.is_untouched() {
            return Ok(());
        }
        self.check()
    }

    fn same_interface(&self) -> Result<(), GuardError> {
        if interface::index(&self.interface)? == self.ifindex {
            Ok(())
        } else {
            Err(self.not_in_force("the interface was re-created"))
        }
    }

    /// When it is time to look: when a pin of the guard was removed or moved, when anybody has done
    /// with a change of any guard of this network namespace, and, for a guard that is attached by
    /// filters, when anybody has changed any filter there. Links that are cut and maps that are written by other means than this
    /// crate's are not told.
    ///
    /// # Errors
    /// When the kernel gives no more inotify instances, or descriptors.
    pub fn occasions(&self) -> Result<Occasions, GuardError> {
        let failed = |errno: Errno| self.failed("watch the pins")(errno.into());
        let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
        let inotify = Inotify::init(flags).map_err(failed)?;
        if let Some(pins) = self.held[0].pin.parent() {
            let removed = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVE_SELF;
            inotify.add_watch(pins, removed).map_err(failed)?;
        }
        // Whoever changes a guard opens its lock, which is in this directory, first and closes it
        // last.
        inotify
            .add_watch(&namespace_directory()?, AddWatchFlags::IN_CLOSE_NOWRITE)
            .map_err(failed)?;
        let filters = match self.held[0].attached {
            Attached::ByLink(_) => None,
            Attached::ByFilter { .. } => {
                Some(netlink::changes().map_err(self.failed("watch the filters"))?)
            }
        };
        let either = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let readable = || EpollEvent::new(EpollFlags::EPOLLIN, 0);
        either.add(&inotify, readable()).map_err(failed)?;
        if let Some(filters) = &filters {
            either.add(filters, readable()).map_err(failed)?;
        }
        Ok(Occasions {
            pins: inotify,
            filters,
            either,
        })
    }

    fn not_in_force(&self, why: &'static str) -> GuardError {
        GuardError::NotInForce {
            interface: self.interface.clone(),
            why,
        }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> GuardError {
        let interface = self.interface.clone();
        move |source| GuardError::System {
            action,
            interface,
            source,
        }
    }
}

/// The occasions to look at one guard. Its descriptor becomes readable with the first that has not
/// been taken.
#[derive(Debug)]
pub struct Occasions {
    pins: Inotify,
    filters: Option<OwnedFd>,
    either: Epoll,
}

impl Occasions {
    /// Takes all that there are; whether there was any.
    ///
    /// # Errors
    /// Where the kernel does not tell any more.
    pub fn take(&self) -> io::Result<bool> {
        let mut any = false;
        loop {
            match self.pins.read_events() {
                Ok(_) => any = true,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let Some(filters) = &self.filters else {
            return Ok(any);
        };
        let mut told = [0; 4096];
        loop {
            match recv(filters.as_raw_fd(), &mut told, MsgFlags::MSG_DONTWAIT) {
                // Where some were lost, it is time to look all the same.
                Ok(_) | Err(Errno::ENOBUFS) => any = true,
                Err(Errno::EAGAIN) => return Ok(any),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Occasions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.either.0.as_fd()
    }
}

impl AsRawFd for Occasions {
    fn as_raw_fd(&self) -> RawFd {
        self.either.0.as_raw_fd()
    }
}
