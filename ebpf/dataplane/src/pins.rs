//! The pins of one guard: `/sys/fs/bpf/omerta/<network namespace>/<interface>/`.
//!
//! A directory of pins is made beside its place and renamed to it, and renamed aside before it is
//! removed, so that what stands at a guard's place is whole at every instant. A process that dies
//! in between leaves a directory aside, whose programs may still judge. The next command puts a
//! whole one in its place, removes one of which nothing judges, and leaves the rest to a command
//! about that very interface. Who is at work on an interface's pins holds its [`Lock`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use omerta_verdict::Direction;

use crate::GuardError;
use crate::bpffs::{failed, namespace_directory, root, shown};
use crate::clsact;
use crate::link::{self, LinkInfo};
use crate::links;
use crate::living;
use crate::lock::Lock;
use crate::notes;
use crate::redirect::LINK_PIN;
use crate::shared::{self, is_programs};
use crate::standing::{Standing, look};

/// The pins of a guard besides its maps'.
const OTHER_PINS: [&str; 16] = [
    notes::CLSACT,
    notes::GROUP,
    notes::IDENTITY,
    notes::LAYOUT,
    "link_egress",
    "link_ingress",
    "link_redirect",
    // Of earlier builds, whose guards had programs of their own.
    "mark",
    notes::NAMESPACE,
    notes::OWNER,
    notes::PEERS,
    notes::PLACE,
    "program_egress",
    "program_ingress",
    "program_redirect",
    notes::PROGRAMS,
];
/// Before the name of a pin that an upgrade is about to put in the place of that one.
const NEXT: &str = "next_";
/// Between the interface's name and a number, in the name of a directory that stands aside. No
/// encoded name of an interface contains it.
const ASIDE: &str = "%aside";
/// Between the interface's name and its index, likewise, where another interface that was renamed
/// keeps its guard under that name.
const INDEX: &str = "%if";
/// After the interface's name, likewise, in the name of a [`Lock`].
pub const LOCK: &str = "%lock";

/// One directory of pins.
#[derive(Clone, Debug, PartialEq, Eq)]
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

    /// The place instead of this one for the interface of `ifindex`.
    pub fn beside(&self, ifindex: u32) -> Self {
        let mut path = self.directory.clone().into_os_string();
        path.push(format!("{INDEX}{ifindex}"));
        Self {
            directory: path.into(),
        }
    }

    /// The place that these pins, which stand aside, were made for or were at.
    pub fn place(&self) -> Self {
        let name = self.directory.file_name().unwrap_or_default();
        let name = name.to_string_lossy();
        let place = name.split_once(ASIDE).map_or(&*name, |(place, _)| place);
        Self {
            directory: self.directory.with_file_name(place),
        }
    }

    /// All pins of this thread's network namespace, by the name of the interface that they were
    /// made for.
    pub fn all() -> Result<Vec<(String, Self)>, GuardError> {
        Ok(directories()?
            .into_iter()
            .filter(|(name, _)| !name.contains(ASIDE) && !name.contains(LOCK))
            .filter(|(name, _)| !is_programs(name))
            .map(|(name, pins)| (decode(&name), pins))
            .collect())
    }

    /// What stands aside in this thread's network namespace, likewise.
    pub fn aside() -> Result<Vec<(String, Self)>, GuardError> {
        Ok(directories()?
            .into_iter()
            .filter_map(|(name, pins)| Some((decode(name.split_once(ASIDE)?.0), pins)))
            .collect())
    }

    /// The names whose locks are held, or were by a process that died.
    pub fn locked() -> Result<Vec<String>, GuardError> {
        Ok(directories()?
            .into_iter()
            .filter_map(|(name, _)| Some(decode(name.split_once(LOCK)?.0)))
            .collect())
    }

    /// The name of the interface whose guard has `place` among the programs in `programs`.
    pub fn at_place(programs: &Path, place: u32) -> Option<String> {
        let mut all = directories_in(programs.parent()?).ok()?.into_iter();
        let is_there = |pins: &Self| {
            let seats = [pins.next_seat(), pins.seat()].into_iter();
            let mut seats = seats.filter_map(|seat| seat.ok().flatten());
            seats.any(|seat| seat.place == place && seat.directory(pins.namespace()) == programs)
        };
        all.find_map(|(_, pins)| is_there(&pins).then(|| pins.made_for()))
    }

    /// The name of the interface that these pins were made for.
    pub fn made_for(&self) -> String {
        let place = self.place();
        decode(
            &place
                .directory
                .file_name()
                .unwrap_or_default()
                .to_string_lossy(),
        )
    }

    /// Waits for the lock of these pins.
    pub fn lock(&self) -> Result<Lock, GuardError> {
        Lock::of(&self.made_for())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The directory of the network namespace that these pins are in.
    pub fn namespace(&self) -> &Path {
        self.directory.parent().unwrap_or(&self.directory)
    }

    pub fn exist(&self) -> bool {
        self.directory.is_dir()
    }

    /// The pinned link of `direction`.
    pub fn link(&self, direction: Direction) -> Result<Option<LinkInfo>, GuardError> {
        let path = self.link_path(direction);
        is_pin(&path)?
            .then(|| link::info(&path))
            .transpose()
            .map_err(failed("read the link", &path))
    }

    /// Whether there are links and none is on an interface.
    fn is_of_gone_interface(&self) -> Result<bool, GuardError> {
        let mut links = 0;
        for direction in Direction::ALL {
            match self.link(direction)? {
                Some(link) if link.ifindex == 0 => links += 1,
                Some(_) => return Ok(false),
                None => {}
            }
        }
        Ok(links > 0)
    }

    /// The id of the guard's program of `direction`.
    pub fn program(&self, direction: Direction) -> Result<Option<u32>, GuardError> {
        self.program_at(&self.program_path(direction))
    }

    /// The ids of the guard's own programs of `direction`: two while it is upgraded, until one of them
    /// has taken the other's place.
    pub fn programs(&self, direction: Direction) -> Result<Vec<u32>, GuardError> {
        let path = self.program_path(direction);
        // In this order: the second may take the first one's place meanwhile.
        let (next, first) = (self.program_at(&self.next(&path))?, self.program_at(&path)?);
        Ok(first.into_iter().chain(next).collect())
    }

    /// The id of the program pinned at `path`, where one is.
    pub fn program_at(&self, path: &Path) -> Result<Option<u32>, GuardError> {
        if !is_pin(path)? {
            return Ok(None);
        }
        match link::program_id(path) {
            Ok(program) => Ok(Some(program)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read the program", path)(error)),
        }
    }

    /// Where what is to take the place of the pin at `path` waits.
    pub fn next(&self, path: &Path) -> PathBuf {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        self.path(&format!("{NEXT}{name}"))
    }

    /// The place for which what is at `path` waits.
    pub fn place_of_next(&self, path: &Path) -> PathBuf {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        self.path(name.strip_prefix(NEXT).unwrap_or(&name))
    }

    /// All that waits to take other pins' places.
    pub fn all_next(&self) -> Result<Vec<PathBuf>, GuardError> {
        let is_next = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            name.as_encoded_bytes().starts_with(NEXT.as_bytes())
        };
        Ok(self.entries()?.into_iter().filter(is_next).collect())
    }

    pub fn program_path(&self, direction: Direction) -> PathBuf {
        self.path(match direction {
            Direction::Egress => "program_egress",
            Direction::Ingress => "program_ingress",
        })
    }

    pub fn link_path(&self, direction: Direction) -> PathBuf {
        self.path(match direction {
            Direction::Egress => "link_egress",
            Direction::Ingress => "link_ingress",
        })
    }

    /// What tells this guard's program or link of `direction` from every other guard's.
    pub fn identity(&self, direction: Direction) -> Result<Option<u32>, GuardError> {
        match self.filters()? {
            Some(_) => match self.first_programs()? {
                Some(first) => Ok(Some(first[direction as usize])),
                None => self.program(direction),
            },
            None => Ok(self.link(direction)?.map(|link| link.id)),
        }
    }

    /// An empty directory aside from this place, on which [`Pins::put_in_place`] acts.
    pub fn create_aside(&self) -> Result<Self, GuardError> {
        if let Some(parent) = self.directory.parent() {
            fs::create_dir_all(parent).map_err(failed("create", parent))?;
        }
        for number in 0_u32.. {
            let directory = self.numbered_aside(number);
            match fs::create_dir(&directory) {
                Ok(()) => return Ok(Self { directory }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed("create", &directory)(error)),
            }
        }
        Err(failed("create", &self.directory)(
            io::ErrorKind::AlreadyExists.into(),
        ))
    }

    fn numbered_aside(&self, number: u32) -> PathBuf {
        let mut path = self.directory.clone().into_os_string();
        path.push(format!("{ASIDE}{number}"));
        path.into()
    }

    /// Puts these pins at `place`, at once; what was there stands aside instead.
    pub fn put_in_place(&self, place: &Self) -> Result<(), GuardError> {
        let flags = if place.exist() {
            RenameFlags::RENAME_EXCHANGE
        } else {
            RenameFlags::RENAME_NOREPLACE
        };
        self.rename(place, flags)
    }

    fn rename(&self, to: &Self, flags: RenameFlags) -> Result<(), GuardError> {
        renameat2(AT_FDCWD, &self.directory, AT_FDCWD, &to.directory, flags)
            .map_err(|errno| failed("rename", &self.directory)(errno.into()))
    }

    /// Removes every pin: at once from its place, then one by one.
    pub fn remove(&self) -> Result<(), GuardError> {
        if !self.exist() {
            return Ok(());
        }
        self.refuse_foreign()?;
        let aside = self.create_aside()?;
        // Over the empty directory.
        self.rename(&aside, RenameFlags::empty())?;
        aside.remove_aside()
    }

    /// Removes what stands aside; filters and links first, so that no program runs without its
    /// maps' pins, then its place among the programs that judge for many, and the notes of that last.
    pub fn remove_aside(&self) -> Result<(), GuardError> {
        self.leave_group()?;
        self.remove_filters()?;
        let mut paths = self.entries()?;
        let rank = |path: &PathBuf| match path.file_name().unwrap_or_default().as_encoded_bytes() {
            // What redirects goes before what judges.
            name if name == LINK_PIN.as_bytes() => 0,
            name if name.starts_with(b"link_") => 1,
            name if name.ends_with(notes::PLACE.as_bytes()) => 3,
            _ => 2,
        };
        paths.sort_by_key(rank);
        let (links, others) = paths.split_at(paths.partition_point(|path| rank(path) < 2));
        let remove = |paths: &[PathBuf]| {
            paths
                .iter()
                .try_for_each(|path| fs::remove_file(path).map_err(failed("remove", path)))
        };
        remove(links)?;
        for seat in [self.next_seat()?, self.seat()?].into_iter().flatten() {
            seat.leave(self.namespace())?;
        }
        remove(others)?;
        fs::remove_dir(&self.directory).map_err(failed("remove", &self.directory))
    }

    /// Takes the interface out of the group that it is in as a guarded one, before it is guarded no more.
    fn leave_group(&self) -> Result<(), GuardError> {
        let Some(group) = self.group()? else {
            return Ok(());
        };
        let index = match self.filters()? {
            Some(filters) => filters.ifindex,
            None => self.link(Direction::Egress)?.map_or(0, |link| link.ifindex),
        };
        let left = links::in_group(index, group).and_then(|is_in| match is_in {
            true => links::set_group(index, 0),
            false => Ok(()),
        });
        match left {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => Err(GuardError::System {
                action: "take out of its group",
                interface: self.made_for(),
                source: error,
            }),
            _ => Ok(()),
        }
    }

    /// Removes the guard's filters, and the qdisc that it made for them unless others use it.
    fn remove_filters(&self) -> Result<(), GuardError> {
        let Some(filters) = self.filters()? else {
            return Ok(());
        };
        let failed = |source| GuardError::System {
            action: "remove the filters",
            interface: self.made_for(),
            source,
        };
        let mut any = false;
        for direction in Direction::ALL {
            for program in self.programs(direction)? {
                any |= clsact::remove(filters.ifindex, direction, program).map_err(failed)?;
            }
        }
        // Where there was none, the index may be another interface's by now.
        if any && filters.made_qdisc {
            clsact::remove_unused_qdisc(filters.ifindex).map_err(failed)?;
        }
        Ok(())
    }

    /// Fails where something stands among the pins that no guard put there.
    pub fn refuse_foreign(&self) -> Result<(), GuardError> {
        for path in self.entries()? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !is_known(name.strip_prefix(NEXT).unwrap_or(&name)) || path.is_dir() {
                return Err(GuardError::Foreign { path: shown(&path) });
            }
        }
        Ok(())
    }

    fn entries(&self) -> Result<Vec<PathBuf>, GuardError> {
        read(&self.directory)
    }
}

/// Whether a guard's pin may have this name. Maps of any version of the programs are named in capitals.
fn is_known(name: &str) -> bool {
    let is_map = name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    is_map || OTHER_PINS.contains(&name)
}

/// Whether something is pinned at `path`; a directory or symbolic link is nobody's pin.
pub fn is_pin(path: &Path) -> Result<bool, GuardError> {
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(found.is_file()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("look at", path)(error)),
    }
}

/// The directories of this thread's network namespace and their encoded names, sorted.
fn directories() -> Result<Vec<(String, Pins)>, GuardError> {
    directories_in(&namespace_directory()?)
}

/// Removes the pins of guards whose network namespaces are gone, and their interfaces: nobody can come
/// back to them. What somebody is at work on is left alone. Gives how many there were.
pub fn remove_of_gone_namespaces() -> Result<usize, GuardError> {
    let mut removed = 0;
    let living = living::namespaces();
    let own = namespace_directory()?;
    for namespace in read(&root()?)? {
        let name = namespace.file_name().unwrap_or_default().to_string_lossy();
        let inode = name.parse().ok();
        let is_gone = inode.is_some_and(|inode| !living.contains(&inode));
        let is_own = namespace == own;
        if !(is_gone || is_own) || !namespace.is_dir() {
            continue;
        }
        for (name, pins) in directories_in(&namespace)? {
            if name.contains(LOCK) || is_programs(&name) {
                continue;
            }
            let Some(_lock) = Lock::try_in(namespace.clone(), &pins.made_for())? else {
                continue;
            };
            if !pins.exist() {
                continue;
            }
            // Filters went with their interface, and that with its namespace. (Where that is held in a way that
            // nobody can see, as by a socket, they judge on without pins.)
            let judges_nothing = match is_own {
                true => pins.is_of_gone_namespace()? && look(&pins)?.standing == Standing::Gone,
                false if pins.filters()?.is_some() => !inode.is_some_and(living::is_held),
                false => pins.is_of_gone_interface()?,
            };
            if !judges_nothing {
                continue;
            }
            match name.contains(ASIDE) {
                true => pins.remove_aside()?,
                false => pins.remove()?,
            }
            removed += 1;
        }
        shared::sweep(&namespace)?;
    }
    Ok(removed)
}

fn directories_in(directory: &Path) -> Result<Vec<(String, Pins)>, GuardError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("read", directory)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("read", directory))?;
        // bpffs tells it with the name.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let directory = entry.path();
            found.push((name, Pins { directory }));
        }
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

/// What is in a directory, which may be gone.
pub fn read(directory: &Path) -> Result<Vec<PathBuf>, GuardError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        // It went between two calls.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("read", directory)(error)),
    };
    entries
        .map(|entry| Ok(entry.map_err(failed("read", directory))?.path()))
        .collect()
}

/// bpffs refuses names with dots, which interfaces may have (VLANs).
pub fn encode(interface: &str) -> String {
    interface.replace('%', "%25").replace('.', "%2e")
}

fn decode(name: &str) -> String {
    let name = name.split_once(INDEX).map_or(name, |(name, _)| name);
    name.replace("%2e", ".").replace("%25", "%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_round_trip_without_dots() {
        for name in [
            "tap0", "eth0.100", "a%b", "%2e", "a.%.b", "a%aside0", "a%if1", "a%lock",
        ] {
            assert!(!encode(name).contains('.'));
            assert!(!encode(name).contains(INDEX));
            assert!(!encode(name).contains(ASIDE));
            assert!(!encode(name).contains(LOCK));
            assert_eq!(decode(&encode(name)), name);
        }
    }
}
