//! Other programs for a guard, while it judges.
//!
//! The guard's own maps get a place among the new programs, too, so these judge by the same policy, flows
//! and rates, and count on in the same counters. Then programs that lead there take the place of the old ones in
//! the guard's links (`BPF_LINK_UPDATE`) or filters (the same preference and handle), each in one step of the
//! kernel: every frame is judged by the old programs or the new, none by neither.
//!
//! Until that is done the new programs are pinned beside the old ones, as `next_...`: a guard both of
//! whose links run either is whole. A process that dies meanwhile leaves such pins; the next command
//! [`finish`]es what it began: where one link runs its next program, the other does then, and the next
//! pins take the old ones' places; else they are removed. The pin of the next egress program is made first
//! and takes its place last, so it tells whether anything is to be finished.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use omerta_verdict::Direction;

use crate::attach::{entries, pin_at};
use crate::bpf::bpf;
use crate::bpffs::failed;
use crate::layout::Layout;
use crate::map::{self, Put};
use crate::notes;
use crate::object::Programs;
use crate::own::{self, OwnMaps};
use crate::pins::{Pins, is_pin};
use crate::shared::{JUDGES, Shared, Table};
use crate::{Guard, GuardError, clsact, link, redirect};

const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_F_REPLACE: u32 = 1 << 2;

/// `link_update` of `union bpf_attr`.
#[repr(C)]
struct UpdateRequest {
    link: u32,
    new_program: u32,
    flags: u32,
    old_program: u32,
}

/// What becomes of a guard's counters in an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counting {
    /// They count on.
    Continued,
    /// The new programs count other things, from zero.
    Afresh,
}

impl Guard {
    /// Puts this build's programs in the place of the guard's, whichever these are, while it judges: policy,
    /// flows and rates are the same, and each frame is judged by the old programs or the new.
    ///
    /// # Errors
    /// Where the guard judges by a policy that is laid out in another way. The old programs judge on then, as
    /// after every error up to the exchange. Where the second program cannot be exchanged, one direction is
    /// judged by the new one and the other by the old, both by the same policy, until the next command
    /// finishes the upgrade.
    pub fn upgrade(&self) -> Result<Counting, GuardError> {
        let _lock = self.pins.lock()?;
        self.authorise()?;
        finish(self.interface(), &self.pins)?;
        self.judging()?;
        let layout = require_policy(self.interface(), &self.pins)?;
        let counting = match layout.accounts == Layout::of_this_build().accounts {
            true => Counting::Continued,
            false => Counting::Afresh,
        };
        let prepared = prepare(self.interface(), self.ifindex(), &self.pins, counting);
        if let Err(error) = prepared {
            // The error to report is the first; what stays is removed by the next command.
            let _ = forget_next(&self.pins);
            return Err(error);
        }
        put_next_in_force(self.interface(), &self.pins)?;
        self.judging()?;
        Ok(counting)
    }

    /// Whether the guard's programs are those of this build.
    pub fn is_current(&self) -> Result<bool, GuardError> {
        is_current(&self.pins)
    }
}

/// Whether the programs of the guard of `pins` are those of this build.
pub fn is_current(pins: &Pins) -> Result<bool, GuardError> {
    Ok(pins
        .note(notes::PROGRAMS)?
        .is_some_and(|build| build == build_note()))
}

/// The build of this crate's programs, as the guards' pins tell it.
pub fn build_note() -> String {
    format!("{:016x}", Programs::build())
}

/// How the guard's maps are to be read.
///
/// # Errors
/// Where this build cannot read its policy.
pub fn require_policy(interface: &str, pins: &Pins) -> Result<Layout, GuardError> {
    match pins.layout()? {
        Some(layout) if layout.policy == Layout::of_this_build().policy => Ok(layout),
        _ => Err(GuardError::OtherPolicyLayout {
            interface: interface.to_owned(),
        }),
    }
}

/// Fails where this build cannot read the counters and events of the guard of `pins`.
pub fn require_accounts(interface: &str, pins: &Pins) -> Result<(), GuardError> {
    match pins.layout()? {
        Some(layout) if layout.accounts == Layout::of_this_build().accounts => Ok(()),
        _ => Err(GuardError::OtherAccountsLayout {
            interface: interface.to_owned(),
        }),
    }
}

/// Finishes an upgrade that was interrupted. Callers hold the lock of the guard.
pub fn finish(interface: &str, pins: &Pins) -> Result<(), GuardError> {
    if !is_interrupted(pins)? {
        return Ok(());
    }
    // Written when all is prepared; its own place it takes when both links run the next programs.
    let is_prepared = pins.next(&pins.path(notes::PROGRAMS)).is_symlink();
    let runs_next = || Ok(running(pins, Direction::Egress)? == next_of(pins, Direction::Egress)?);
    if is_prepared || runs_next()? {
        put_next_in_force(interface, pins)
    } else {
        forget_next(pins)
    }
}

/// Whether an upgrade of the guard was interrupted, or is under way.
pub fn is_interrupted(pins: &Pins) -> Result<bool, GuardError> {
    Ok(is_pin(&pins.next(&pins.program_path(Direction::Egress)))? || pins.next_seat()?.is_some())
}

/// Pins all that is to take the place of what is there: the note of the new place first, the note of the
/// build last.
fn prepare(
    interface: &str,
    ifindex: u32,
    pins: &Pins,
    counting: Counting,
) -> Result<(), GuardError> {
    let old = pins.seat()?.ok_or_else(|| GuardError::OtherPolicyLayout {
        interface: interface.to_owned(),
    })?;
    let (namespace, owner) = (pins.namespace(), pins.owner()?);
    let note = pins.next(&pins.path(notes::PLACE));
    // The token is in the guard's state, which is the same.
    let (shared, seat) = Shared::seat(
        namespace,
        interface,
        owner.as_ref(),
        ifindex,
        old.token,
        &note,
    )?;
    entries(pins, interface, &shared, &seat, |path| pins.next(&path))?;
    pin_at(&pins.next(&pins.path(JUDGES)), shared.judges())?;
    let own = OwnMaps::open(pins, counting == Counting::Afresh)?;
    if counting == Counting::Afresh {
        own.pin_next_accounts(pins)?;
    }
    let before = old.shared(interface, pins.namespace())?;
    let moved = || {
        for slot in [0, 1] {
            let bank = map::map_in(before.table(Table::Rules), 2 * old.place + slot)?;
            if let Some(bank) = bank {
                map::put(&[Put {
                    table: shared.table(Table::Rules),
                    number: 2 * seat.place + slot,
                    map: bank.as_fd(),
                }])?;
            }
        }
        own.put(&shared, seat.place)
    };
    moved().map_err(|source| GuardError::System {
        action: "put the maps where the new programs find them",
        interface: interface.to_owned(),
        source,
    })?;
    redirect::prepare_next(interface, pins, counting)?;
    pins.keep_identity()?;
    pins.set_next_note(notes::LAYOUT, &Layout::of_this_build().to_string())?;
    pins.set_next_note(notes::PROGRAMS, &build_note())
}

/// Has the next programs judge, then puts their pins in the places of the old ones.
fn put_next_in_force(interface: &str, pins: &Pins) -> Result<(), GuardError> {
    for direction in Direction::ALL {
        if let Some(next) = next_of(pins, direction)?
            && running(pins, direction)?.is_some_and(|program| program != next)
        {
            put(interface, pins, direction)?;
        }
    }
    redirect::put_next_in_force(interface, pins)?;
    leave_old_place(interface, pins)?;
    let [first, last] = [Direction::Egress, Direction::Ingress]
        .map(|direction| pins.next(&pins.program_path(direction)));
    let note = pins.next(&pins.path(notes::PROGRAMS));
    let mut paths = pins.all_next()?;
    // The programs' own first, the note of their build when all else is done, and what tells that there
    // is something to do last.
    paths.sort_by_key(|path| match path {
        path if *path == last => 0,
        path if *path == note => 2,
        path if *path == first => 3,
        _ => 1,
    });
    for path in paths {
        let place = pins.place_of_next(&path);
        fs::rename(&path, &place).map_err(failed("rename", &path))?;
    }
    Ok(())
}

/// Gives the place among the old programs up, which judge nothing any more.
fn leave_old_place(interface: &str, pins: &Pins) -> Result<(), GuardError> {
    let (Some(old), Some(next)) = (pins.seat()?, pins.next_seat()?) else {
        return Ok(());
    };
    if old == next {
        return Ok(());
    }
    // A frame that the old programs began to judge is judged to its end: this waits for it.
    let shared = next.shared(interface, pins.namespace())?;
    let own = OwnMaps::open(pins, false)?;
    own.get(own::STATE)
        .map_err(io::Error::other)
        .and_then(|state| map::set(shared.table(Table::States), next.place, state))
        .map_err(|source| GuardError::System {
            action: "wait for the old programs of",
            interface: interface.to_owned(),
            source,
        })?;
    old.leave(pins.namespace())
}

/// Removes what was prepared, in the other order.
fn forget_next(pins: &Pins) -> Result<(), GuardError> {
    if let Some(next) = pins.next_seat()? {
        next.leave(pins.namespace())?;
    }
    let place = pins.next(&pins.path(notes::PLACE));
    let first = pins.next(&pins.program_path(Direction::Egress));
    let note = pins.next(&pins.path(notes::PROGRAMS));
    let mut paths = pins.all_next()?;
    paths.sort_by_key(|path| match path {
        path if *path == note => 0,
        path if *path == first => 2,
        path if *path == place => 3,
        _ => 1,
    });
    for path in paths {
        fs::remove_file(&path).map_err(failed("remove", &path))?;
    }
    Ok(())
}

/// The id of the next program of `direction`, where its pin has not taken its place yet.
fn next_of(pins: &Pins, direction: Direction) -> Result<Option<u32>, GuardError> {
    pins.program_at(&pins.next(&pins.program_path(direction)))
}

/// The id of the guard's own program that judges `direction`; `None` where the interface is gone, or
/// something that is not the guard's is in the place.
fn running(pins: &Pins, direction: Direction) -> Result<Option<u32>, GuardError> {
    let own = pins.programs(direction)?;
    let Some(filters) = pins.filters()? else {
        let link = pins.link(direction)?.filter(|link| link.ifindex != 0);
        return Ok(link
            .map(|link| link.program_id)
            .filter(|program| own.contains(program)));
    };
    for program in own {
        let place = clsact::place(filters.ifindex, direction, program);
        let failed = |source| GuardError::System {
            action: "ask for the filters",
            interface: pins.made_for(),
            source,
        };
        if place.map_err(failed)?.is_some() {
            return Ok(Some(program));
        }
    }
    Ok(None)
}

/// Has the next program of `direction` judge instead of the old one, which judges until then.
fn put(interface: &str, pins: &Pins, direction: Direction) -> Result<(), GuardError> {
    let old = pins.program_path(direction);
    let new = pins.next(&old);
    let put = || match pins.filters() {
        Ok(Some(filters)) => {
            let new = link::open(&new)?;
            clsact::put(filters.ifindex, direction, new.as_fd(), true)
        }
        _ => update(&pins.link_path(direction), &old, &new),
    };
    put().map_err(|source| GuardError::System {
        action: "put other programs in place",
        interface: interface.to_owned(),
        source,
    })
}

/// Has the link pinned at `link` run the program pinned at `new` instead of the one pinned at `old`, in
/// one step.
pub fn update(link: &Path, old: &Path, new: &Path) -> io::Result<()> {
    let [link, old, new] = [link::open(link)?, link::open(old)?, link::open(new)?];
    let mut request = UpdateRequest {
        link: link.as_raw_fd() as u32,
        new_program: new.as_raw_fd() as u32,
        flags: BPF_F_REPLACE,
        old_program: old.as_raw_fd() as u32,
    };
    // SAFETY: the kernel reads `request`, which outlives the call, as do the descriptors.
    unsafe { bpf(BPF_LINK_UPDATE, &mut request) }.map(drop)
}
