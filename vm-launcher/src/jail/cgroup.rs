//! The cgroups of one guest: how much of the host its QEMU may take.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::hierarchy::{Base, PARTS, Version, bases, own_hierarchies};
use super::{JailError, Part};
use crate::{PathError, Spec};

/// What a guest's cgroup is called, before its user's number.
const PREFIX: &str = "omerta-guest-";

/// Memory that QEMU takes beside its guest's, in MiB: itself, translated code (`tb-size`) and what
/// that hangs on.
const QEMU_MIB: u64 = 256;
/// Threads beside those of the guest's CPUs: QEMU's pool has 64.
const QEMU_THREADS: u64 = 80;
/// What QEMU may take of a CPU beside its guest's, in hundredths.
const QEMU_CPU_PERCENT: u64 = 50;
/// What may be read from and written to the run directory's disk, in bytes a second each.
const DISK_BYTES_PER_SECOND: u64 = 16 << 20;

/// How often a cgroup is tried to be removed, and how long after each: the kernel lets go of a dead
/// process's a moment after it was reaped.
const TRIES: u32 = 50;
const BETWEEN: Duration = Duration::from_millis(2);

/// How much one QEMU may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    memory_bytes: u64,
    cpu_percent: u64,
    threads: u64,
    /// The disk that it writes to, if that is one: major and minor number.
    disk: Option<(u64, u64)>,
}

impl Limits {
    pub(super) fn of(spec: &Spec) -> Self {
        let cpus = u64::from(spec.cpus);
        let guest = u64::from(spec.memory_mib);
        Self {
            // The kernel's tables for the guest's memory grow with it.
            memory_bytes: (guest + guest / 64 + QEMU_MIB) << 20,
            cpu_percent: cpus * 100 + QEMU_CPU_PERCENT,
            threads: cpus + QEMU_THREADS,
            // Where there is both, the disk is what a guest can keep busy.
            disk: match &spec.layer {
                Some(layer) => disk_of(&layer.directory),
                None => spec.run_dir.parent().and_then(disk_of),
            },
        }
    }
}

/// The disk that `path` is on: limits are a disk's, not a partition's. In memory it is on none.
fn disk_of(path: &Path) -> Option<(u64, u64)> {
    let device = path.metadata().ok()?.dev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let entry = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = if entry.join("partition").exists() {
        entry.parent()?.to_owned()
    } else {
        entry
    };
    let number = fs::read_to_string(disk.join("dev")).ok()?;
    let (major, minor) = number.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Why a guest's cgroups could not be made.
#[derive(Debug)]
pub(super) enum MakeError {
    /// Somebody is in them.
    InUse,
    Jail(JailError),
}

impl<E: Into<JailError>> From<E> for MakeError {
    fn from(error: E) -> Self {
        Self::Jail(error.into())
    }
}

/// The cgroups of one guest.
#[derive(Debug)]
pub(super) struct Cgroups {
    directories: Vec<PathBuf>,
    /// How many there were when its process was put into them.
    made: usize,
}

impl Cgroups {
    pub(super) fn make(
        uid: u32,
        limits: &Limits,
        without: &BTreeSet<Part>,
    ) -> Result<Self, MakeError> {
        let bases = bases()?;
        let has = |part: &Part| bases.iter().any(|base| base.parts.contains(part));
        if let Some(part) = PARTS
            .into_iter()
            .find(|part| !has(part) && !without.contains(part))
        {
            return Err(JailError::Missing { part }.into());
        }
        let mut made = Self {
            directories: Vec::new(),
            made: bases.len(),
        };
        let filled = bases
            .iter()
            .try_for_each(|base| made.add(base, uid, limits, without));
        if filled.is_err() {
            made.remove();
        }
        filled.map(|()| made)
    }

    /// Those of a guest that a dead launcher made: the ones that it recorded, wherever this launcher is
    /// itself, or, where it recorded none, the ones that this launcher would make.
    pub(super) fn of(uid: u32, recorded: Option<&[PathBuf]>) -> Result<Self, PathError> {
        let name = name_for(uid);
        let mut directories = match recorded {
            Some(recorded) => recorded.to_vec(),
            None => bases()?
                .into_iter()
                .map(|base| base.directory.join(&name))
                .collect(),
        };
        let made = directories.len();
        directories.retain(|directory| directory.ends_with(&name) && directory.exists());
        Ok(Self { directories, made })
    }

    /// Where they are.
    pub(super) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    fn add(
        &mut self,
        base: &Base,
        uid: u32,
        limits: &Limits,
        without: &BTreeSet<Part>,
    ) -> Result<(), MakeError> {
        let directory = base.directory.join(name_for(uid));
        // One that a dead launcher left has that guest's counts.
        match fs::remove_dir(&directory) {
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                return Err(MakeError::InUse);
            }
            _ => {}
        }
        fs::create_dir(&directory).map_err(PathError::of("create", &directory))?;
        self.directories.push(directory.clone());
        for part in &base.parts {
            for (file, value) in settings(base.version, *part, limits) {
                match fs::write(directory.join(file.name), value) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_optional => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        if !without.contains(part) {
                            return Err(JailError::Missing { part: *part }.into());
                        }
                    }
                    Err(error) => {
                        return Err(
                            PathError::of("write", &directory.join(file.name))(error).into()
                        );
                    }
                }
            }
        }
        Ok(())
    }

    /// The files by which a process joins.
    pub(super) fn doors(&self) -> Result<Vec<OwnedFd>, PathError> {
        let door = |directory: &PathBuf| {
            let path = directory.join("cgroup.procs");
            let opened = OpenOptions::new().write(true).open(&path);
            opened
                .map(OwnedFd::from)
                .map_err(PathError::of("open", &path))
        };
        self.directories.iter().map(door).collect()
    }

    /// Whether a process is in all of them.
    pub(super) fn hold(&self, pid: u32) -> bool {
        let has = |directory: &PathBuf| {
            let inside = fs::read_to_string(directory.join("cgroup.procs"));
            inside.is_ok_and(|all| all.lines().any(|line| line.parse() == Ok(pid)))
        };
        // One that is not there any more holds nobody.
        self.made == self.directories.len() && self.directories.iter().all(has)
    }

    /// Kills everybody in them, and tells whether nobody is left after `patience` at most.
    pub(super) fn kill_all(&self, patience: Duration) -> bool {
        // Who is in one is in all of them.
        let list = self.directories.first();
        let Some(list) = list.map(|first| first.join("cgroup.procs")) else {
            return true;
        };
        let end = Instant::now() + patience;
        loop {
            let Ok(inside) = fs::read_to_string(&list) else {
                return false;
            };
            let pids: Vec<i32> = inside
                .lines()
                .filter_map(|line| line.parse().ok())
                .collect();
            if pids.is_empty() {
                return true;
            }
            for pid in pids.into_iter().filter(|pid| *pid > 0) {
                // One that has ended since is nobody else yet: pids are given out in turn.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(BETWEEN);
        }
    }

    /// Removes them, and tells what stays.
    pub(super) fn remove(&mut self) -> Vec<String> {
        let mut directories = self.directories.drain(..);
        directories
            .by_ref()
            .filter_map(|path| removed(&path))
            .collect()
    }
}

/// Removes a cgroup, or tells why not.
fn removed(path: &Path) -> Option<String> {
    let mut last = None;
    for _ in 0..TRIES {
        match fs::remove_dir(path) {
            Ok(()) => return None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => last = Some(format!("cgroup {}: {error}", path.display())),
        }
        std::thread::sleep(BETWEEN);
    }
    last
}

/// What a guest's cgroup is called. Its user is nobody else's, so no other cgroup of this host is.
fn name_for(uid: u32) -> String {
    format!("{PREFIX}{uid}")
}

/// Removes the cgroups of a dead launcher's guest, and tells whether none is left. Of where that launcher
/// was nothing is known, so they are looked for everywhere.
pub(super) fn remove_empty(uid: u32) -> bool {
    let Ok(own) = own_hierarchies() else {
        return false;
    };
    let mut found = Vec::new();
    let all_looked_at = own
        .iter()
        .all(|own| find(&own.mount, &name_for(uid), &mut found).is_ok());
    all_looked_at
        && found.iter().all(|path| {
            let gone = fs::remove_dir(path);
            gone.is_ok() || gone.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        })
}

/// Adds all cgroups of that name below `directory`.
fn find(directory: &Path, name: &str, found: &mut Vec<PathBuf>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        // One that has gone meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        if entry.file_name() == name {
            found.push(entry.path());
        } else {
            find(&entry.path(), name, found)?;
        }
    }
    Ok(())
}

/// A file of a cgroup. Without an optional one less is held, and the part all the same.
struct Setting {
    name: &'static str,
    is_optional: bool,
}

fn settings(version: Version, part: Part, limits: &Limits) -> Vec<(Setting, String)> {
    let needed = |name| Setting {
        name,
        is_optional: false,
    };
    let optional = |name| Setting {
        name,
        is_optional: true,
    };
    /// In microseconds.
    const PERIOD: u64 = 100_000;
    let memory = limits.memory_bytes.to_string();
    let quota = limits.cpu_percent * PERIOD / 100;
    let rate = DISK_BYTES_PER_SECOND;
    match (version, part) {
        (Version::Two, Part::Memory) => vec![
            (needed("memory.max"), memory),
            // A guest's memory has its keys, which no disk shall have.
            (optional("memory.swap.max"), "0".into()),
            (needed("memory.oom.group"), "1".into()),
        ],
        (Version::Two, Part::Cpu) => vec![(needed("cpu.max"), format!("{quota} {PERIOD}"))],
        (Version::Two, Part::Io) => limits.disk.map_or_else(Vec::new, |(major, minor)| {
            let value = format!("{major}:{minor} rbps={rate} wbps={rate}");
            vec![(needed("io.max"), value)]
        }),
        (Version::One, Part::Memory) => vec![
            (needed("memory.limit_in_bytes"), memory.clone()),
            (optional("memory.memsw.limit_in_bytes"), memory),
        ],
        (Version::One, Part::Cpu) => vec![
            (needed("cpu.cfs_period_us"), PERIOD.to_string()),
            (needed("cpu.cfs_quota_us"), quota.to_string()),
        ],
        (Version::One, Part::Io) => limits.disk.map_or_else(Vec::new, |(major, minor)| {
            let value = format!("{major}:{minor} {rate}");
            vec![
                (needed("blkio.throttle.read_bps_device"), value.clone()),
                (needed("blkio.throttle.write_bps_device"), value),
            ]
        }),
        (_, Part::Pids) => vec![(needed("pids.max"), limits.threads.to_string())],
        (_, Part::Landlock) => Vec::new(),
    }
}
