//! Whether a guard is still what its owner left: cheap enough to be asked many times a second.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use aya::maps::{Array, Map, MapData};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use omerta_verdict::Direction;

use crate::bpffs::namespace_directory;
use crate::link::{self, LinkInfo};
use crate::store::map_error;
use crate::{Guard, GuardError, interface};

/// One of the guard's links, held open: while it is, the kernel runs its program even where the
/// link's pin is removed.
#[derive(Debug)]
struct Held {
    direction: Direction,
    link: OwnedFd,
    info: LinkInfo,
    pin: PathBuf,
    inode: u64,
}

/// A guard as its owner left it.
pub struct GuardWatch {
    interface: String,
    ifindex: u32,
    held: [Held; 2],
    generation: Array<MapData, u64>,
    expected: u64,
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
        let hold = |direction| -> Result<Held, GuardError> {
            let pin = guard.pins.link_path(direction);
            let failed = |source| GuardError::System {
                action: "hold a link",
                interface: interface.to_owned(),
                source,
            };
            let link = link::open(&pin).map_err(failed)?;
            let info = link::info_of(&link).map_err(failed)?;
            let inode = fs::symlink_metadata(&pin).map_err(failed)?.ino();
            Ok(Held {
                direction,
                link,
                info,
                pin,
                inode,
            })
        };
        let name = "GENERATION";
        let map = |source| map_error(interface, "read", name, source);
        let generation: Array<MapData, u64> = MapData::from_pin(guard.pins.path(name))
            .and_then(|data| Map::Array(data).try_into())
            .map_err(map)?;
        let watch = Self {
            interface: interface.to_owned(),
            ifindex: guard.ifindex(),
            held: [hold(Direction::Egress)?, hold(Direction::Ingress)?],
            expected: generation.get(&0, 0).map_err(map)?,
            generation,
        };
        // What is held now must be what the handle knows: it was not replaced in between.
        guard.verify()?;
        watch.check()?;
        Ok(watch)
    }

    /// Proves that nothing has changed since: the interface has its name, each link its pin, its
    /// program and its interface, that program is the first on its hook, and no policy was
    /// committed. A dozen system calls.
    ///
    /// # Errors
    /// What has changed.
    pub fn check(&self) -> Result<(), GuardError> {
        if interface::index(&self.interface)? != self.ifindex {
            return Err(self.not_in_force("the interface was re-created"));
        }
        for held in &self.held {
            let info = link::info_of(&held.link).map_err(self.failed("read a link"))?;
            if info.ifindex != self.ifindex {
                return Err(self.not_in_force("its link was cut"));
            }
            if info.program_id != held.info.program_id {
                return Err(self.not_in_force("its program was replaced"));
            }
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
            let first = link::first_on(self.ifindex, held.direction)
                .map_err(self.failed("ask for the programs"))?;
            if first != Some(info.program_id) {
                return Err(self.not_in_force("another program stands before it on the hook"));
            }
        }
        let generation = self
            .generation
            .get(&0, 0)
            .map_err(|source| map_error(&self.interface, "read", "GENERATION", source))?;
        if generation != self.expected {
            return Err(self.not_in_force("its policy was changed by another"));
        }
        Ok(())
    }

    /// A descriptor that becomes readable when it is time to look: when a pin of the guard was
    /// removed or moved, and when anybody has done with a change of any guard of this network namespace. What is read from it
    /// says nothing more. Links that are cut and maps that are written by other means than this
    /// crate's are not told.
    ///
    /// # Errors
    /// When the kernel gives no more inotify instances.
    pub fn occasions(&self) -> Result<OwnedFd, GuardError> {
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
        Ok(inotify.into())
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
