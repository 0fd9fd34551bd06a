//! The users that QEMUs run as: numbers that nobody else on the host has, one for each guest.

use std::fmt;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::JailError;
use super::cgroup::{Cgroups, MakeError};
use super::users;
use crate::{LockError, LockFile, PathError};

/// Where every launcher of this host has its reservations, a locked file for each user. The unit
/// may write there (`StateDirectory`).
const DIRECTORY: &str = "/var/lib/omerta/guest-uids";

/// How long another launcher holds a user that it finds in use.
const PASSING: Duration = Duration::from_secs(1);

/// How often a directory that goes meanwhile is made again.
const TRIES: u32 = 8;

/// The numbers of users, from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    first: u32,
    last: u32,
}

/// Why a range cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{}` is no range of users: write FIRST-LAST, both {least} to {most}, as in {default}",
    .0.escape_default(), least = UidRange::LEAST, most = UidRange::MOST, default = UidRange::default()
)]
pub struct UidRangeError(String);

impl UidRange {
    /// Below are the users of the system, of people, and `nobody`.
    const LEAST: u32 = 65_536;
    /// Above, programs take them for negative.
    const MOST: u32 = i32::MAX as u32;

    /// Whether one of them is from `first` to `last`.
    pub const fn overlaps(&self, first: u32, last: u32) -> bool {
        self.first <= last && first <= self.last
    }
}

impl Default for UidRange {
    /// A part that systemd leaves unused, above those of its containers:
    /// <https://systemd.io/UIDS-GIDS/>.
    fn default() -> Self {
        Self {
            first: 1_900_000_000,
            last: 1_900_065_535,
        }
    }
}

impl fmt::Display for UidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for UidRange {
    type Err = UidRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_user = |uid: &u32| (Self::LEAST..=Self::MOST).contains(uid);
        let number = |text: &str| text.parse().ok().filter(is_user);
        text.split_once('-')
            .and_then(|(first, last)| Some((number(first)?, number(last)?)))
            .filter(|(first, last)| first <= last)
            .map(|(first, last)| Self { first, last })
            .ok_or_else(|| UidRangeError(text.to_owned()))
    }
}

/// A user that is one guest's, until given back or until this process ends.
#[derive(Debug)]
pub(super) struct Reservation {
    uid: u32,
    lock: LockFile,
}

impl Reservation {
    /// Takes the first free user for the guest with this run directory, and what `make` makes for it:
    /// where that finds that a process of the user's is still there, a dead launcher's, the next one is
    /// tried.
    pub(super) fn take(
        range: UidRange,
        run_dir: &Path,
        make: impl Fn(u32) -> Result<Cgroups, MakeError>,
    ) -> Result<(Self, Cgroups), JailError> {
        for uid in range.first..=range.last {
            let lock = match lock(uid) {
                Ok(lock) => lock,
                Err(LockError::Held { .. }) => continue,
                Err(LockError::Io(error)) => return Err(error.into()),
            };
            let taken = Self { uid, lock };
            // Also where no cgroup tells: a dead launcher's guest may live on, to be taken over.
            if users::has_any(uid).unwrap_or(true) {
                taken.leave();
                continue;
            }
            match make(uid) {
                Ok(mut cgroups) => {
                    // Before any process is: whoever finds one finds whose it is.
                    if let Err(error) = taken.lock.write_note(&note(run_dir)) {
                        cgroups.remove();
                        taken.give_back();
                        return Err(error.into());
                    }
                    return Ok((taken, cgroups));
                }
                Err(MakeError::InUse) => taken.leave(),
                Err(MakeError::Jail(error)) => {
                    taken.leave();
                    return Err(error);
                }
            }
        }
        Err(JailError::NoUid(range))
    }

    /// The reservation that a dead launcher left of the guest with this run directory. It gives a user
    /// back before it forgets the guest, and whoever has the user then is another.
    pub(super) fn adopt(uid: u32, run_dir: &Path) -> Result<Self, JailError> {
        let end = Instant::now() + PASSING;
        let lock = loop {
            match lock(uid) {
                Ok(lock) => break lock,
                // Perhaps by one that looks for a free user, and finds that this is none.
                Err(LockError::Held { .. }) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(LockError::Held { .. }) => return Err(JailError::UidHeld(uid)),
                Err(LockError::Io(error)) => return Err(error.into()),
            }
        };
        let found = Self { uid, lock };
        match found.lock.note() {
            Ok(theirs) if theirs == note(run_dir) => Ok(found),
            Ok(_) => {
                found.leave();
                Err(JailError::UidHeld(uid))
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn uid(&self) -> u32 {
        self.uid
    }

    pub(super) fn give_back(self) {
        self.lock.remove();
        // The last one leaves nothing.
        let _ = fs::remove_dir(DIRECTORY);
    }

    /// Lets go of one that may be a dead launcher's guest's, who is to find it as it was.
    fn leave(self) {
        if self.lock.note().is_ok_and(|note| note.is_empty()) {
            self.give_back();
        }
    }

    pub(super) fn keep(self) {
        std::mem::forget(self);
    }
}

/// Locks a user's file, in a directory that another may be removing as empty.
fn lock(uid: u32) -> Result<LockFile, LockError> {
    let directory = Path::new(DIRECTORY);
    let attempt = || {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(PathError::of("create", directory))?;
        LockFile::acquire(&place(uid))
    };
    for _ in 0..TRIES {
        match attempt() {
            Err(LockError::Io(_)) if !directory.exists() => {}
            done => return done,
        }
    }
    attempt()
}

/// What tells one guest's reservation from another's of the same number.
fn note(run_dir: &Path) -> String {
    run_dir
        .as_os_str()
        .as_encoded_bytes()
        .escape_ascii()
        .to_string()
}

fn place(uid: u32) -> PathBuf {
    Path::new(DIRECTORY).join(uid.to_string())
}

/// Gives back the users of dead launchers of which `remove` has removed what was left.
pub(super) fn sweep(range: UidRange, remove: impl Fn(u32) -> bool) {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            tracing::warn!(path = DIRECTORY, %error, "cannot look for users left behind");
            return;
        }
    };
    for entry in entries.flatten() {
        let uid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(uid) = uid.filter(|uid| (range.first..=range.last).contains(uid))
            && let Ok(lock) = LockFile::acquire(&place(uid))
            && !users::has_any(uid).unwrap_or(true)
            && remove(uid)
        {
            lock.remove();
        }
    }
    // Where it is empty: the last one leaves nothing.
    let _ = fs::remove_dir(DIRECTORY);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dead launcher may have given a user back and not yet forgotten the guest: the next guest of that
    /// user is not taken for it, and not killed.
    #[test]
    fn user_that_another_guest_has_since_is_not_the_first_ones() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: to reserve users takes root");
            return;
        }
        let uid = 1_899_900_000 + std::process::id() % 90_000;
        let range = UidRange {
            first: uid,
            last: uid,
        };
        let take = |run_dir: &str| {
            let none = |uid| Ok(Cgroups::of(uid, Some(&[])).unwrap());
            Reservation::take(range, Path::new(run_dir), none).map(|(taken, _)| taken)
        };
        let adopt = |run_dir: &str| Reservation::adopt(uid, Path::new(run_dir));
        let is_held = |found| matches!(found, Err(JailError::UidHeld(_)));

        take("/run/first").unwrap().give_back();
        assert!(is_held(adopt("/run/first")), "given back");
        // The launcher dies.
        drop(take("/run/second").unwrap());
        assert!(is_held(adopt("/run/first")), "another's");
        // Who looks for a free user leaves it as it is.
        let mut living = std::process::Command::new("sleep");
        let living = std::os::unix::process::CommandExt::uid(living.arg("60"), uid).spawn();
        let mut living = living.unwrap();
        assert!(matches!(take("/run/third"), Err(JailError::NoUid(_))));
        sweep(range, |_| true);
        let second = adopt("/run/second").unwrap();
        living.kill().unwrap();
        living.wait().unwrap();
        second.give_back();
        assert!(!place(uid).exists());
    }

    #[test]
    fn range_is_parsed_as_it_is_shown() {
        let range = UidRange::default();
        assert_eq!(range.to_string().parse(), Ok(range));
        assert_eq!(
            "65536-65536".parse::<UidRange>().unwrap().to_string(),
            "65536-65536"
        );
    }

    #[test]
    fn users_of_others_are_refused() {
        for text in [
            "",
            "70000",
            "0-10",
            "1000-70000",
            "70001-70000",
            "70000-4294967295",
            "70000-x",
        ] {
            let error = text.parse::<UidRange>().unwrap_err().to_string();
            assert!(error.contains("FIRST-LAST"), "{error}");
        }
    }
}
