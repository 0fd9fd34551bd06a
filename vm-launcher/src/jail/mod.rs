//! The jail around each QEMU: what a program that a guest has taken over still finds.
//!
//! [`Jail`] says what the operator lets be weaker, [`Cell`] is all that exists on this host for one
//! guest's jail, and [`entry`] is what QEMU's process does to itself between fork and exec.

mod cgroup;
mod entry;
mod hierarchy;
mod landlock;
mod root;
mod uid;
mod users;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

pub use entry::Step;
pub(crate) use entry::{Entry, MAX_DESCRIPTORS, MAX_LOG_BYTES, confine};
pub(crate) use root::{CONFIG, INITRD, KERNEL, Root};
pub use uid::{UidRange, UidRangeError};

use crate::command::QEMU;
use crate::{Accel, ImageError, PathError, Spec};
use cgroup::{Cgroups, Limits};
use uid::Reservation;

/// A part of the jail that not every host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The cgroup's limit of processor time.
    Cpu,
    /// The cgroup's limit of memory.
    Memory,
    /// The cgroup's limit of processes and threads.
    Pids,
    /// The cgroup's limit of reading and writing.
    Io,
    /// Landlock.
    Landlock,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Cpu,
        Self::Memory,
        Self::Pids,
        Self::Io,
        Self::Landlock,
    ];

    /// The word that the configuration uses.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Io => "io",
            Self::Landlock => "landlock",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that names no part of the jail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no part of the jail: write cpu, memory, pids, io or landlock", .0.escape_default())]
pub struct PartError(String);

impl FromStr for Part {
    type Err = PartError;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|part| part.word() == word)
            .ok_or_else(|| PartError(word.to_owned()))
    }
}

/// Which parts this host lacks, with what to do about each. Looks, and changes nothing: whether omertad
/// may use what the host has, its unit decides.
///
/// # Errors
/// When the host's cgroups cannot be looked at.
pub fn lacking_parts() -> Result<Vec<(Part, &'static str)>, PathError> {
    let mut there = hierarchy::host_parts()?;
    if landlock::is_there() {
        there.insert(Part::Landlock);
    }
    let lacking = Part::ALL.into_iter().filter(|part| !there.contains(part));
    Ok(lacking.map(|part| (part, remedy(part))).collect())
}

/// What the operator decides of the jails of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Jail {
    /// Which users QEMUs run as: each has one of its own, and the group of the same number.
    pub uids: UidRange,
    /// Files and directories that QEMU sees, read-only, beside those of a distribution's package.
    pub paths: Vec<PathBuf>,
    /// What guests may be run without where this host lacks it.
    pub without: BTreeSet<Part>,
}

/// Why a guest has no jail, and so is not run.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// This host lacks a part.
    #[error("the jail lacks its part {part}: {}, or let guests run without by `without = [\"{part}\"]` in [jail]", remedy(*part))]
    Missing {
        /// What is lacking.
        part: Part,
    },
    /// Every user of the range has its guest.
    #[error("every user of {0} runs a guest: give more by `uids` in [jail]")]
    NoUid(UidRange),
    /// The user of a guest that is to be adopted is another launcher's.
    #[error("user {0} is another launcher's: end that one, or its guest")]
    UidHeld(u32),
    /// A process is not where its launcher put it.
    #[error("process {0} is not of its user, or not in its cgroups")]
    Escaped(u32),
    /// A path that QEMU is to see cannot be looked at.
    #[error("{} cannot be put into the jail; mend `paths` in [jail]", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Other users than root may not use KVM.
    #[error(
        "/dev/kvm is for root alone, and QEMU runs as another: `chgrp kvm /dev/kvm; chmod 660 /dev/kvm`"
    )]
    KvmForRootAlone,
    /// The system refused something.
    #[error("cannot {action} for the jail; it takes root, and CAP_SYS_ADMIN in a service")]
    Make {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The system refused something on a path.
    #[error(transparent)]
    Io(#[from] PathError),
}

impl JailError {
    fn make<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Make {
            action,
            source: source.into(),
        }
    }
}

fn remedy(part: Part) -> &'static str {
    match part {
        Part::Cpu | Part::Memory | Part::Pids | Part::Io => {
            "give guests a cgroup with that controller (`omerta-guests.service`, with `Delegate=yes`, beside omertad's unit; or systemd.unified_cgroup_hierarchy=1 on the kernel's command line)"
        }
        Part::Landlock => "add landlock to `lsm=` on the kernel's command line",
    }
}

/// All that exists on this host for one guest's jail, beside its root and the process in it. Gone
/// when it is dropped.
#[derive(Debug)]
pub(crate) struct Cell {
    uid: u32,
    /// Until it is given back or kept.
    reservation: Option<Reservation>,
    cgroups: Cgroups,
}

impl Cell {
    /// Reserves a user, makes the cgroups with their limits, and fills the root. Waits for the file
    /// system that the image is on.
    pub(crate) fn build(spec: &Spec) -> Result<(Self, Root), CellError> {
        let limits = Limits::of(spec);
        let (reservation, cgroups) = Reservation::take(spec.jail.uids, &spec.run_dir, |uid| {
            Cgroups::make(uid, &limits, &spec.jail.without)
        })?;
        let cell = Self {
            uid: reservation.uid(),
            reservation: Some(reservation),
            cgroups,
        };
        let root = Root::build(spec)?;
        Ok((cell, root))
    }

    /// The cell that a dead launcher left to the QEMU with this run directory, with the cgroups that it
    /// recorded, if it did.
    pub(crate) fn adopt(
        uid: u32,
        run_dir: &Path,
        cgroups: Option<&[PathBuf]>,
    ) -> Result<Self, JailError> {
        Ok(Self {
            uid,
            reservation: Some(Reservation::adopt(uid, run_dir)?),
            cgroups: Cgroups::of(uid, cgroups)?,
        })
    }

    /// The user that QEMU runs as.
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Where its cgroups are.
    pub(crate) fn cgroups(&self) -> &[PathBuf] {
        self.cgroups.directories()
    }

    /// What QEMU's process needs for its way in. `handed` stay open in it.
    pub(crate) fn entry(
        &self,
        spec: &Spec,
        root: &Root,
        handed: Vec<OwnedFd>,
    ) -> Result<Entry, JailError> {
        let landlock = landlock::ruleset(root)?;
        if landlock.is_none() && !spec.jail.without.contains(&Part::Landlock) {
            return Err(JailError::Missing {
                part: Part::Landlock,
            });
        }
        let groups = match spec.accel {
            Accel::Kvm => kvm_groups()?,
            Accel::Tcg => Vec::new(),
        };
        Ok(Entry {
            cgroups: self.cgroups.doors()?,
            root: root.handle()?,
            place: entry::c_path(&spec.run_dir)?,
            binds: root.steps()?,
            uid: self.uid,
            groups,
            landlock,
            // A limit is a process's, not a file's: the logs are held to theirs by the watcher.
            file_bytes: spec.layer.as_ref().map_or(MAX_LOG_BYTES, |layer| {
                layer.layer.max_file_bytes().max(MAX_LOG_BYTES)
            }),
            handed,
            outlives: spec.outlives_launcher,
        })
    }

    /// Kills whatever QEMU has left running, and tells whether nobody is in the jail any more.
    pub(crate) fn kill_rest(&self, patience: Duration) -> bool {
        self.cgroups.kill_all(patience)
    }

    /// Kills whoever is in the jail, also where it has no cgroup, and tells whether nobody is.
    pub(crate) fn kill_everybody(&self, patience: Duration) -> bool {
        users::kill_all(self.uid, patience) && self.cgroups.kill_all(patience)
    }

    /// Removes the cgroups and gives the user back, and tells what could not be removed. The
    /// process in it must be gone.
    pub(crate) fn tear_down(mut self) -> Vec<String> {
        self.undo()
    }

    /// Leaves all as it is, for whoever takes it.
    pub(crate) fn let_go(mut self) {
        drop(self.reservation.take());
    }

    /// Whether a process is in its cgroups, and of its user.
    pub(crate) fn holds(&self, pid: u32) -> bool {
        self.cgroups.hold(pid) && users::is_of(pid, self.uid)
    }

    /// Leaves all as it is, and the user reserved for as long as this process lives.
    pub(crate) fn keep(mut self) {
        if let Some(reservation) = self.reservation.take() {
            reservation.keep();
        }
    }

    fn undo(&mut self) -> Vec<String> {
        let Some(reservation) = self.reservation.take() else {
            return Vec::new();
        };
        let left = self.cgroups.remove();
        if left.is_empty() {
            reservation.give_back();
        } else {
            reservation.keep();
        }
        left
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        for left in self.undo() {
            tracing::error!(left, "left behind");
        }
    }
}

/// Why a cell could not be built: the jail, or what boots in it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CellError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("no {QEMU} on PATH")]
    NoProgram,
}

/// Removes what launchers that are dead have left: reservations, and cgroups that nobody is in.
pub fn sweep_jails(jail: &Jail) {
    uid::sweep(jail.uids, cgroup::remove_empty);
}

/// The groups that QEMU needs to open /dev/kvm.
pub(crate) fn kvm_groups() -> Result<Vec<u32>, JailError> {
    let path = Path::new("/dev/kvm");
    let device = path.metadata().map_err(PathError::of("look at", path))?;
    match device.mode() {
        mode if mode & 0o006 == 0o006 => Ok(Vec::new()),
        mode if mode & 0o060 == 0o060 && device.gid() != 0 => Ok(vec![device.gid()]),
        _ => Err(JailError::KvmForRootAlone),
    }
}

/// Where QEMU is, with every symbolic link followed.
pub fn qemu_program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(QEMU))
        .find_map(|file| {
            let file = file.canonicalize().ok()?;
            let found = file.metadata().ok()?;
            (found.is_file() && found.mode() & 0o111 != 0).then_some(file)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_parsed_from_its_word_and_others_are_refused() {
        for part in Part::ALL {
            assert_eq!(part.word().parse(), Ok(part));
        }
        let error = "cgroup".parse::<Part>().unwrap_err().to_string();
        assert!(error.contains("`cgroup`") && error.contains("landlock"));
    }

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        for part in Part::ALL {
            let line = JailError::Missing { part }.to_string();
            assert!(line.contains(&format!("without = [\"{part}\"]")), "{line}");
            assert!(!line.contains('\n'));
        }
    }
}
