//! The programs that judge for all guards of an owner in a network namespace: they are loaded once, and
//! pinned in a directory beside the guards'. Each guard has a place in their tables.
//!
//! A guard's note of its place is written before the place is claimed, and the claim is removed after
//! the tables are emptied, so that what a process left that died can be found and removed: by the
//! guard's pins, or as a directory of programs without a claim. Nobody waits here for anybody else: a
//! directory is made whole beside its place, a claim is one symbolic link, and only who removes a
//! directory must be alone with it.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Map, MapData, PerCpuArray};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use omerta_verdict::{Direction, FixedInputs, GUARDS};

use crate::bpffs::{failed, namespace_directory, shown};
use crate::counters::Count;
use crate::layout::Digest;
use crate::lock::remove_empty;
use crate::map::{self, BPF_MAP_TYPE_PROG_ARRAY, Shape};
use crate::object::{self, Loaded, program_name};
use crate::pins::read;
use crate::store::map_error;
use crate::upgrade::build_note;
use crate::{DiagnosticStream, Guard, GuardError, Owner, link};

/// Before the names of directories of programs. No interface's name has this character.
pub const PROGRAMS: &str = ":programs";
/// After the name of one that is not whole, or not any more.
const UNFINISHED: &str = "%unfinished";
/// Before a place's number, in the name of a claim.
const CLAIM: &str = "place_";
/// The pin of the programs' own array.
pub const JUDGES: &str = "JUDGES";
/// What programs count of interfaces whose guards are gone from their places.
const UNGUARDED: &str = "UNGUARDED";
const MARK: &str = "mark";
/// How many directories of one owner's programs there may be.
const MOST_DIRECTORIES: u32 = 8;
/// How long somebody may be about to remove programs, which takes microseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// A map of maps, which holds those of each guard in the guard's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    States,
    Lives,
    Counters,
    Events,
    Flows,
    FlowPlaces,
    /// Two places for each guard: its slots'.
    Rules,
}

impl Table {
    const ALL: [Self; 7] = [
        Self::States,
        Self::Lives,
        Self::Counters,
        Self::Events,
        Self::Flows,
        Self::FlowPlaces,
        Self::Rules,
    ];

    /// What `make` makes of each, in their order.
    fn each<T, E>(make: impl Fn(Self) -> Result<T, E>) -> Result<[T; 7], E> {
        let [a, b, c, d, e, f, g] = Self::ALL.map(make);
        Ok([a?, b?, c?, d?, e?, f?, g?])
    }

    /// As the programs call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::States => "STATES",
            Self::Lives => "LIVES",
            Self::Counters => "COUNTERS",
            Self::Events => "EVENTS",
            Self::Flows => "FLOWS",
            Self::FlowPlaces => "FLOW_PLACES",
            Self::Rules => "RULES",
        }
    }
}

/// The programs' tables, and the array by which a guard's own programs get to them. Where nobody holds that
/// or has it pinned any more, the kernel empties it, and everything is dropped.
#[derive(Debug)]
pub struct Shared {
    tables: [OwnedFd; 7],
    judges: OwnedFd,
}

/// Which place is a guard's, among whose programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The name of the programs' directory.
    programs: String,
    pub place: u32,
    /// Tells the guard from any other that had the place, or has it.
    pub token: u32,
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.programs, self.place, self.token)
    }
}

impl FromStr for Seat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const PROBLEM: &str = "this is no place among programs";
        let mut parts = text.split(' ');
        let (Some(programs), Some(place), Some(token), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(PROBLEM);
        };
        let place = place.parse().map_err(|_| PROBLEM)?;
        if !is_programs(programs) || programs.contains('/') || place as usize >= GUARDS {
            return Err(PROBLEM);
        }
        Ok(Self {
            programs: programs.to_owned(),
            place,
            token: token.parse().map_err(|_| PROBLEM)?,
        })
    }
}

/// Whether a directory of that name holds programs, and no guard.
pub fn is_programs(name: &str) -> bool {
    name.starts_with(PROGRAMS)
}

/// The name of the directory of this build's programs for the guards of `owner`. There is more than one
/// where they judge for more guards than one has places for, or somebody hangs who is about to remove one.
fn directory_name(owner: Option<&Owner>, number: u32) -> String {
    // An owner's name may have what bpffs refuses.
    let owner = owner.map_or(0, |owner| {
        let mut digest = Digest::new();
        digest.add(owner.as_str().as_bytes());
        digest.value()
    });
    format!("{PROGRAMS}-{}-{owner:016x}-{number}", build_note())
}

impl Shared {
    /// Those of an object that was loaded, which lives as long as they do.
    pub fn of(ebpf: &Ebpf) -> io::Result<Self> {
        let table = |table: Table| match ebpf.map(table.name()) {
            Some(Map::ArrayOfMaps(map)) => map.fd().as_fd().try_clone_to_owned(),
            _ => Err(io::Error::other("a table is missing")),
        };
        let judges = map::create(&Shape {
            name: JUDGES,
            map_type: BPF_MAP_TYPE_PROG_ARRAY,
            key: size_of::<u32>(),
            value: size_of::<u32>(),
            entries: Direction::ALL.len() as u32,
            flags: 0,
        })?;
        Ok(Self {
            tables: Table::each(table)?,
            judges,
        })
    }

    pub fn table(&self, table: Table) -> BorrowedFd<'_> {
        self.tables[table as usize].as_fd()
    }

    pub fn judges(&self) -> BorrowedFd<'_> {
        self.judges.as_fd()
    }

    /// Gives the guard of `token` a place among the programs of this build in `namespace`, which are loaded
    /// where they are not there yet. `first` is tried before other places; which it is, is noted at `note`.
    pub fn seat(
        namespace: &Path,
        interface: &str,
        owner: Option<&Owner>,
        first: u32,
        token: u32,
        note: &Path,
    ) -> Result<(Self, Seat), GuardError> {
        for number in 0..MOST_DIRECTORIES {
            let programs = directory_name(owner, number);
            let directory = namespace.join(&programs);
            let Some(_kept) = keep(interface, &directory)? else {
                continue;
            };
            let shared = Self::open(&directory)?;
            let places = GUARDS as u32;
            for place in (0..places).map(|after| first.wrapping_add(after) % places) {
                let seat = Seat {
                    programs: programs.clone(),
                    place,
                    token,
                };
                if seat.take(&directory, note)? {
                    return Ok((shared, seat));
                }
            }
        }
        Err(GuardError::Config {
            problem: format!(
                "{interface} cannot be guarded: {} interfaces of this network namespace are already",
                GUARDS * MOST_DIRECTORIES as usize
            ),
        })
    }

    fn open(directory: &Path) -> Result<Self, GuardError> {
        let open = |name: &str| {
            let path = directory.join(name);
            link::open(&path).map_err(failed("open", &path))
        };
        Ok(Self {
            tables: Table::each(|table| open(table.name()))?,
            judges: open(JUDGES)?,
        })
    }

    /// Loads the programs and pins them in `directory`, at once, unless others are there by then.
    fn load(interface: &str, directory: &Path) -> Result<(), GuardError> {
        let mark = mark_of_namespace(directory)?;
        let Loaded { mut ebpf, .. } = object::load(interface, FixedInputs::NONE, mark)?;
        let failed_to = |source| GuardError::System {
            action: "keep the programs",
            interface: interface.to_owned(),
            source,
        };
        let shared = Self::of(&ebpf).map_err(failed_to)?;
        let unfinished = unfinished(directory)?;
        fs::create_dir_all(&unfinished).map_err(failed("create", &unfinished))?;
        // Locked, so that nobody takes it for what a dead process left.
        let file = File::open(&unfinished).map_err(failed("open", &unfinished))?;
        file.lock_shared().map_err(failed("lock", &unfinished))?;
        let pin = |fd: BorrowedFd<'_>, name: &str| {
            let path = unfinished.join(name);
            link::pin(fd, &path).map_err(failed("pin", &path))
        };
        for table in Table::ALL {
            pin(shared.table(table), table.name())?;
        }
        pin(shared.judges(), JUDGES)?;
        if let Some(Map::PerCpuArray(counts)) = ebpf.map(UNGUARDED) {
            pin(counts.fd().as_fd(), UNGUARDED)?;
        }
        for direction in Direction::ALL {
            let program = object::program(&mut ebpf, direction, interface)?;
            let fd = program.fd().map_err(|error| {
                GuardError::of_program(program_name(direction), interface, error)
            })?;
            pin(fd.as_fd(), program_name(direction))?;
            map::set(shared.judges(), direction as u32, fd.as_fd()).map_err(failed_to)?;
        }
        let note = unfinished.join(MARK);
        symlink(mark.to_string(), &note).map_err(failed("create", &note))?;
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(AT_FDCWD, &unfinished, AT_FDCWD, directory, flags) {
            Ok(()) => Ok(()),
            Err(Errno::EEXIST) => remove(&unfinished),
            Err(errno) => Err(failed("rename", &unfinished)(errno.into())),
        }
    }
}

/// The directory of programs, which are loaded where they are not there, open and locked: they are not
/// removed as long as it is. `None` where somebody hangs who is about to remove them.
fn keep(interface: &str, directory: &Path) -> Result<Option<File>, GuardError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if !directory.is_dir() {
            Shared::load(interface, directory)?;
        }
        let file = match File::open(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.map_err(failed("open", directory))?,
        };
        match file.try_lock_shared() {
            Ok(()) if is_at(&file, directory) => return Ok(Some(file)),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Ok(None),
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            Err(TryLockError::Error(source)) => return Err(failed("lock", directory)(source)),
        }
    }
}

/// Whether `file` is what is at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let held = file.metadata().map(|held| held.ino());
    let found = fs::symlink_metadata(path).map(|found| found.ino());
    matches!((held, found), (Ok(held), Ok(found)) if held == found)
}

/// Keeps the programs of this build for an owner's guards in a network namespace loaded, so that the next
/// guard need not load them, until it is dropped.
#[derive(Debug)]
pub struct Prepared {
    directory: PathBuf,
    /// Locked for reading.
    kept: Option<File>,
}

impl Prepared {
    /// Those of this thread's network namespace, for the guards of `owner`.
    pub fn new(owner: Option<&Owner>) -> Result<Self, GuardError> {
        let namespace = namespace_directory()?;
        for number in 0..MOST_DIRECTORIES {
            let directory = namespace.join(directory_name(owner, number));
            if let Some(kept) = keep("new guards", &directory)? {
                return Ok(Self {
                    directory,
                    kept: Some(kept),
                });
            }
        }
        let busy = io::Error::from(io::ErrorKind::ResourceBusy);
        Err(failed("lock programs in", &namespace)(busy))
    }

    /// What the programs say of their own failures. What one stream has read no other sees.
    pub fn diagnostics(&self) -> Result<DiagnosticStream, GuardError> {
        DiagnosticStream::of(self.directory.clone())
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.kept = None;
        // What cannot be removed now goes with the next guard, or with the next sweep.
        let _ = remove_unused(&self.directory);
        if let Some(namespace) = self.directory.parent() {
            remove_empty(namespace);
        }
    }
}

impl Seat {
    fn claim(&self, directory: &Path) -> PathBuf {
        directory.join(format!("{CLAIM}{}", self.place))
    }

    /// Claims the place and notes so at `note`; false where it is another's.
    fn take(&self, directory: &Path, note: &Path) -> Result<bool, GuardError> {
        let claim = self.claim(directory);
        if fs::symlink_metadata(&claim).is_ok() {
            return Ok(false);
        }
        // Noted first, so that a claim is always found.
        symlink(self.to_string(), note).map_err(failed("create", note))?;
        match symlink(self.token.to_string(), &claim) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(note).map_err(failed("remove", note))?;
                Ok(false)
            }
            Err(error) => Err(failed("create", &claim)(error)),
        }
    }

    /// The tables that the place is in. `interface` is for messages only.
    pub fn shared(&self, interface: &str, namespace: &Path) -> Result<Shared, GuardError> {
        let shared = Shared::open(&self.directory(namespace));
        self.require_claim(interface, namespace)?;
        shared
    }

    /// One of them.
    pub fn table(
        &self,
        interface: &str,
        namespace: &Path,
        table: Table,
    ) -> Result<OwnedFd, GuardError> {
        let path = self.directory(namespace).join(table.name());
        let opened = link::open(&path);
        self.require_claim(interface, namespace)?;
        opened.map_err(failed("open", &path))
    }

    /// Fails where the directory is not the one that the guard has its place in: somebody has removed that, and
    /// another guard may have the same place in one of the same name. Asked after its pins were opened.
    fn require_claim(&self, interface: &str, namespace: &Path) -> Result<(), GuardError> {
        let directory = self.directory(namespace);
        match self.is_claimed(&directory)? {
            true => Ok(()),
            false => Err(GuardError::ProgramsLost {
                interface: interface.to_owned(),
                path: shown(&directory),
            }),
        }
    }

    /// Whether the place is this very guard's.
    fn is_claimed(&self, directory: &Path) -> Result<bool, GuardError> {
        let claim = self.claim(directory);
        match fs::read_link(&claim) {
            Ok(token) => Ok(token.as_os_str() == self.token.to_string().as_str()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("read", &claim)(error)),
        }
    }

    /// Where the programs are pinned.
    pub fn directory(&self, namespace: &Path) -> PathBuf {
        namespace.join(&self.programs)
    }

    /// Gives the place up, whose guard judges nothing any more. The programs go with the last guard that they
    /// judge for.
    pub fn leave(&self, namespace: &Path) -> Result<(), GuardError> {
        let directory = self.directory(namespace);
        let claim = self.claim(&directory);
        if self.is_claimed(&directory)? {
            let shared = Shared::open(&directory)?;
            let all: Vec<_> = Table::ALL
                .into_iter()
                .flat_map(|table| match table {
                    Table::Rules => vec![(table, 2 * self.place), (table, 2 * self.place + 1)],
                    _ => vec![(table, self.place)],
                })
                .map(|(table, number)| (shared.table(table), number))
                .collect();
            map::take_out(&all).map_err(failed("empty a place of", &directory))?;
            fs::remove_file(&claim).map_err(failed("remove", &claim))?;
        }
        remove_unused(&directory)
    }
}

/// Removes programs that no guard is judged by, unless somebody keeps them for guards to come.
fn remove_unused(directory: &Path) -> Result<(), GuardError> {
    let file = match File::open(directory) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("open", directory)(error)),
    };
    match file.try_lock() {
        Ok(()) if is_at(&file, directory) => {}
        Ok(()) | Err(TryLockError::WouldBlock) => return Ok(()),
        Err(TryLockError::Error(source)) => return Err(failed("lock", directory)(source)),
    }
    for path in read(directory)? {
        let name = path.file_name().unwrap_or_default();
        if name.as_encoded_bytes().starts_with(CLAIM.as_bytes()) {
            return Ok(());
        }
    }
    let unfinished = unfinished(directory)?;
    fs::rename(directory, &unfinished).map_err(failed("rename", directory))?;
    remove(&unfinished)
}

/// A name for what is not whole, or not any more.
fn unfinished(directory: &Path) -> Result<PathBuf, GuardError> {
    let number = object::secret().map_err(failed("make a name beside", directory))?;
    let mut path = directory.as_os_str().to_owned();
    path.push(format!("{UNFINISHED}{number}"));
    Ok(path.into())
}

fn remove(directory: &Path) -> Result<(), GuardError> {
    for path in read(directory)? {
        fs::remove_file(&path).map_err(failed("remove", &path))?;
    }
    fs::remove_dir(directory).map_err(failed("remove", directory))
}

/// Removes what a process left that died: programs without a claim, and what is not whole. What somebody is
/// at work on is left alone.
pub fn sweep(namespace: &Path) -> Result<(), GuardError> {
    for directory in directories(namespace)? {
        let name = directory.file_name().unwrap_or_default().to_string_lossy();
        if !name.contains(UNFINISHED) {
            remove_unused(&directory)?;
            continue;
        }
        // Others may remove it at the same time.
        let file = File::open(&directory);
        if file.is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = remove(&directory);
        }
    }
    Ok(())
}

impl Guard {
    /// What came from or for interfaces of this network namespace of which a guard's program is left, and
    /// the guard is not. All of it was dropped.
    pub fn unguarded() -> Result<Count, GuardError> {
        let mut sum = Count::default();
        for directory in directories(&namespace_directory()?)? {
            let path = directory.join(UNGUARDED);
            let map = match MapData::from_pin(&path) {
                Ok(map) => map,
                // It goes with the last guard, or is not whole yet.
                Err(_) if !path.exists() => continue,
                Err(source) => return Err(map_error("guards", "open", UNGUARDED, source)),
            };
            let counts: PerCpuArray<MapData, Count> = Map::PerCpuArray(map)
                .try_into()
                .map_err(|source| map_error("guards", "open", UNGUARDED, source))?;
            let counts = counts.get(&0, 0);
            let counts = counts.map_err(|e| map_error("guards", "read", UNGUARDED, e))?;
            for count in counts.iter() {
                sum += *count;
            }
        }
        Ok(sum)
    }
}

/// The directories of programs of a network namespace.
fn directories(namespace: &Path) -> Result<Vec<PathBuf>, GuardError> {
    let mut found = read(namespace)?;
    found.retain(|path| is_programs(&path.file_name().unwrap_or_default().to_string_lossy()));
    Ok(found)
}

/// By what the guards of the namespace know their own answers: all programs use the same, so that an
/// upgrade loses none that is on its way.
fn mark_of_namespace(directory: &Path) -> Result<u32, GuardError> {
    for other in directories(directory.parent().unwrap_or(directory))? {
        let note = fs::read_link(other.join(MARK)).unwrap_or_default();
        if let Some(Ok(mark)) = note.to_str().map(str::parse) {
            return Ok(mark);
        }
    }
    object::secret().map_err(failed("make a mark for", directory))
}
