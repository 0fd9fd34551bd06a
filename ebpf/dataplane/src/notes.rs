//! What is known of a guard besides its links, programs and maps: symbolic links among the pins. Each is
//! whole at once, says what it says by where it leads to, and goes with the pins.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use omerta_verdict::Direction;

use crate::bpffs::failed;
use crate::layout::Layout;
use crate::living;
pub use crate::note_text::Filters;
use crate::note_text::numbers;
use crate::pins::Pins;
use crate::shared::Seat;
use crate::{GuardError, Owner};

pub const OWNER: &str = "owner";
/// The cookie of the network namespace that the guard was made in: the namespace's inode may be
/// another's by now.
pub const NAMESPACE: &str = "namespace";
/// Present where the guard is attached by filters: their interface's index.
pub const CLSACT: &str = "clsact";
/// The ids of the programs that the guard was attached with, where it is attached by filters and has
/// others by now.
pub const IDENTITY: &str = "identity";
/// How the maps are to be read: a [`Layout`].
pub const LAYOUT: &str = "layout";
/// The build of the programs.
pub const PROGRAMS: &str = "programs";
/// The group that the interface is in for as long as it is guarded, by which a fence lets it through.
pub const GROUP: &str = "group";
/// Where the guard is found by programs that judge for many: a [`Seat`].
pub const PLACE: &str = "place";
/// The indices of the veths whose peers are handed frames, where something is redirected.
pub const PEERS: &str = "peers";

impl Pins {
    /// Writes a note that is not there yet.
    pub fn set_note(&self, name: &str, text: &str) -> Result<(), GuardError> {
        set(&self.path(name), text)
    }

    /// Writes what is to take a note's place when an upgrade is done.
    pub fn set_next_note(&self, name: &str, text: &str) -> Result<(), GuardError> {
        set(&self.next(&self.path(name)), text)
    }

    /// What a note says, where there is one.
    pub fn note(&self, name: &str) -> Result<Option<String>, GuardError> {
        let path = self.path(name);
        match fs::read_link(&path) {
            Ok(text) => match text.into_os_string().into_string() {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(self.unreadable(name, "this is not text")),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    fn unreadable(&self, name: &str, why: &'static str) -> GuardError {
        failed("read", &self.path(name))(io::Error::other(why))
    }

    /// Records, before any filter is there, where the guard's filters will be; as the owner.
    pub fn set_filters(&self, filters: Filters) -> Result<(), GuardError> {
        self.set_note(CLSACT, &filters.to_string())
    }

    /// Where the guard's filters are, if it is attached by filters.
    pub fn filters(&self) -> Result<Option<Filters>, GuardError> {
        match self.note(CLSACT)? {
            None => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|why| self.unreadable(CLSACT, why)),
        }
    }

    /// The programs that the guard was attached with, if others have taken their places since.
    pub fn first_programs(&self) -> Result<Option<[u32; 2]>, GuardError> {
        let Some(text) = self.note(IDENTITY)? else {
            return Ok(None);
        };
        match numbers(&text).as_deref() {
            Some([egress, ingress]) => Ok(Some([*egress, *ingress])),
            _ => Err(self.unreadable(IDENTITY, "these are not two programs' ids")),
        }
    }

    /// Records which programs the guard was attached with, before others take their places.
    pub fn keep_identity(&self) -> Result<(), GuardError> {
        if self.filters()?.is_none() || self.first_programs()?.is_some() {
            return Ok(());
        }
        let of = |direction| Ok::<_, GuardError>(self.program(direction)?.unwrap_or(0));
        let (egress, ingress) = (of(Direction::Egress)?, of(Direction::Ingress)?);
        self.set_note(IDENTITY, &format!("{egress},{ingress}"))
    }

    /// How the guard's maps are to be read; `None` where none says so.
    pub fn layout(&self) -> Result<Option<Layout>, GuardError> {
        match self.note(LAYOUT)? {
            None => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|why| self.unreadable(LAYOUT, why)),
        }
    }

    /// Where the guard is found by the programs that judge it; `None` where none says so.
    pub fn seat(&self) -> Result<Option<Seat>, GuardError> {
        self.seat_noted(PLACE)
    }

    /// Where the programs of an upgrade find it that is under way.
    pub fn next_seat(&self) -> Result<Option<Seat>, GuardError> {
        let next = self.next(&self.path(PLACE));
        self.seat_noted(&next.file_name().unwrap_or_default().to_string_lossy())
    }

    fn seat_noted(&self, name: &str) -> Result<Option<Seat>, GuardError> {
        match self.note(name)? {
            None => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|why| self.unreadable(name, why)),
        }
    }

    /// The group that the interface is in for as long as it is guarded.
    pub fn group(&self) -> Result<Option<u32>, GuardError> {
        match self.note(GROUP)? {
            None => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|_| self.unreadable(GROUP, "this is no group's number")),
        }
    }

    /// The indices of the veths whose peers are handed frames.
    pub fn peers(&self) -> Result<Vec<u32>, GuardError> {
        match self.note(PEERS)? {
            None => Ok(Vec::new()),
            Some(text) => numbers(&text)
                .ok_or_else(|| self.unreadable(PEERS, "these are not interfaces' indices")),
        }
    }

    /// Records which network namespace the guard is made in.
    pub fn set_namespace(&self) -> Result<(), GuardError> {
        let path = self.path(NAMESPACE);
        let cookie = living::cookie().map_err(failed("ask for the cookie for", &path))?;
        self.set_note(NAMESPACE, &cookie.to_string())
    }

    /// Whether the guard was made in a network namespace that is gone, and whose inode is this
    /// thread's by now.
    pub fn is_of_gone_namespace(&self) -> Result<bool, GuardError> {
        let path = self.path(NAMESPACE);
        let own = living::cookie().map_err(failed("ask for the cookie beside", &path))?;
        Ok(self
            .note(NAMESPACE)?
            .is_some_and(|made_in| made_in != own.to_string()))
    }

    /// Records whose the guard is.
    pub fn set_owner(&self, owner: &Owner) -> Result<(), GuardError> {
        self.set_note(OWNER, owner.as_str())
    }

    /// Whose the guard is.
    pub fn owner(&self) -> Result<Option<Owner>, GuardError> {
        match self.note(OWNER)? {
            None => Ok(None),
            Some(name) => name
                .parse()
                .map(Some)
                .map_err(|_| self.unreadable(OWNER, "this is no owner's name")),
        }
    }
}

fn set(path: &Path, text: &str) -> Result<(), GuardError> {
    symlink(text, path).map_err(failed("create", path))
}
