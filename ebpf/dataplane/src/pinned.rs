//! What is pinned for this network namespace, and where it is in force.

use crate::attach::is_filtered;
use crate::bpffs::namespace_directory;
use crate::lock::Lock;
use crate::pins::{self, Pins};
use crate::standing::{Look, look};
use crate::{Guard, GuardError, Owner, Standing, interface, shared};

/// What is pinned for one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedGuard {
    /// The interface's name: that of now where a program of the guard judges, else the name that
    /// it was attached under.
    pub interface: String,
    /// Whose the guard is; `None` also where that cannot be read.
    pub owner: Option<Owner>,
    /// How it stands. [`Guard::remove_stale`] removes what is [`Standing::Gone`].
    pub standing: Standing,
}

impl Guard {
    /// Everything that is pinned for this network namespace, in force or left over, sorted by
    /// interface.
    pub fn pinned() -> Result<Vec<PinnedGuard>, GuardError> {
        for name in Pins::locked()? {
            // What a process left that died goes with the lock.
            drop(Lock::try_of(&name)?);
        }
        shared::sweep(&namespace_directory()?)?;
        let mut found = Vec::new();
        for (_, pins) in Pins::aside()? {
            // Who is at work on it has not done yet.
            if let Some(lock) = Lock::try_of(&pins.made_for())? {
                put_back(&pins)?;
                if pins.exist() {
                    found.push(PinnedGuard::of(&pins)?);
                }
                drop(lock);
            }
        }
        for (_, pins) in Pins::all()? {
            let mut seen = PinnedGuard::of(&pins)?;
            // Of another namespace, which had the number before: the next sweep removes it.
            if seen.standing == Standing::Gone && pins.is_of_gone_namespace()? {
                continue;
            }
            if !seen.standing.is_whole()
                && let Some(_lock) = Lock::try_of(&pins.made_for())?
            {
                // It may have been exchanged while it was looked at.
                if !pins.exist() {
                    continue;
                }
                seen = PinnedGuard::of(&pins)?;
            }
            found.push(seen);
        }
        found.sort_by(|a, b| a.interface.cmp(&b.interface));
        Ok(found)
    }

    /// The interfaces of this network namespace on which a whole guard judges, sorted by name.
    pub fn list() -> Result<Vec<String>, GuardError> {
        let pinned = Self::pinned()?.into_iter();
        Ok(pinned
            .filter(|guard| guard.standing.is_whole())
            .map(|guard| guard.interface)
            .collect())
    }

    /// Removes what is pinned for guards whose network namespaces are gone, which no other call reaches.
    /// Gives how many there were.
    pub fn sweep_gone_namespaces() -> Result<usize, GuardError> {
        pins::remove_of_gone_namespaces()
    }

    /// Removes what is pinned for `interface` where its guard is not whole, and what a process
    /// left that died while it attached or removed a guard: whoever owned it where nothing of it
    /// judges, else only where it is nobody's or `acting`'s. A whole guard is left alone, and
    /// refused where it is in force on an interface that was renamed or moved. Returns whether
    /// anything of `interface`'s was removed.
    pub fn remove_stale(interface: &str, acting: Option<&Owner>) -> Result<bool, GuardError> {
        let lock = Lock::of(interface)?;
        recover(&lock)?;
        let aside = remove_aside(&lock, interface, acting)?;
        let ifindex = interface::index(interface).unwrap_or(0);
        let Some((pins, found)) = find(interface, ifindex)? else {
            return Ok(aside);
        };
        let made_for = pins.made_for();
        if !lock.is_of(&made_for) {
            // The interface was renamed; its guard is removed under its own lock.
            drop(lock);
            let _lock = Lock::of(&made_for)?;
            let found = look(&pins)?;
            return Ok(remove_found(interface, ifindex, &pins, &found, acting)? || aside);
        }
        Ok(remove_found(interface, ifindex, &pins, &found, acting)? || aside)
    }
}

impl PinnedGuard {
    fn of(pins: &Pins) -> Result<Self, GuardError> {
        let seen = look(pins)?;
        Ok(Self {
            interface: seen.interface.unwrap_or_else(|| pins.made_for()),
            owner: pins.owner().ok().flatten(),
            standing: seen.standing,
        })
    }
}

/// Removes the pins that were `found` for `interface`, unless they are a whole guard's or
/// somebody else's. Callers hold their lock.
fn remove_found(
    interface: &str,
    ifindex: u32,
    pins: &Pins,
    found: &Look,
    acting: Option<&Owner>,
) -> Result<bool, GuardError> {
    if found.standing.is_whole() && found.is_on(interface, ifindex) {
        return Ok(false);
    }
    if found.standing != Standing::Gone {
        refuse_owned(interface, pins, acting)?;
    }
    refuse_elsewhere(interface, found)?;
    pins.remove()?;
    Ok(true)
}

/// Puts whole guards that stand aside, because the process died that attached or removed them, in
/// their places, unless there are others: those of `held`, and those that nobody is at work on.
pub fn recover(held: &Lock) -> Result<(), GuardError> {
    for_each_aside(held, |_, pins| put_back(pins))
}

fn put_back(pins: &Pins) -> Result<(), GuardError> {
    let place = pins.place();
    if look(pins)?.standing.is_whole() && !place.exist() {
        pins.put_in_place(&place)?;
    }
    Ok(())
}

/// Removes what stands aside: of any interface where nothing of it judges any more, and whatever
/// it does for `interface`, unless it is another's than `acting`. Tells whether there was anything
/// of `interface`'s. What others are at work on is left alone.
pub fn remove_aside(
    held: &Lock,
    interface: &str,
    acting: Option<&Owner>,
) -> Result<bool, GuardError> {
    let mut any = false;
    for_each_aside(held, |name, pins| {
        let ours = name == interface;
        if look(pins)?.standing != Standing::Gone {
            if !ours {
                return Ok(());
            }
            refuse_owned(interface, pins, acting)?;
        }
        pins.remove_aside()?;
        any |= ours;
        Ok(())
    })?;
    Ok(any)
}

/// Does `work` on each directory that stands aside and that nobody else is at work on.
fn for_each_aside(
    held: &Lock,
    mut work: impl FnMut(&str, &Pins) -> Result<(), GuardError>,
) -> Result<(), GuardError> {
    for (name, pins) in Pins::aside()? {
        let mut _lock = None;
        if !held.is_of(&pins.made_for()) {
            _lock = Lock::try_of(&pins.made_for())?;
            // It may have gone before the lock was taken.
            if _lock.is_none() || !pins.exist() {
                continue;
            }
        }
        work(&name, &pins)?;
    }
    Ok(())
}

fn refuse_owned(interface: &str, pins: &Pins, acting: Option<&Owner>) -> Result<(), GuardError> {
    match pins.owner()? {
        Some(owner) if acting != Some(&owner) => Err(GuardError::Owned {
            interface: interface.to_owned(),
            owner,
        }),
        _ => Ok(()),
    }
}

/// The pins of the guard of which a program judges on `interface`, whatever that was called when
/// it was attached; else those under its name, if there are any. With them, how they stand.
pub fn find(interface: &str, ifindex: u32) -> Result<Option<(Pins, Look)>, GuardError> {
    let own = Pins::of(interface)?;
    let own_found = look(&own)?;
    if own_found.is_on(interface, ifindex) {
        return Ok(Some((own, own_found)));
    }
    let mut left_over = None;
    // Of an interface that is gone, only what is left over is found.
    let may_be_renamed = ifindex != 0 && is_filtered(interface, ifindex)?;
    for (name, pins) in Pins::all()? {
        if !may_be_renamed && name != interface {
            continue;
        }
        let found = look(&pins)?;
        if found.is_on(interface, ifindex) {
            return Ok(Some((pins, found)));
        }
        if name == interface && found.standing == Standing::Gone {
            left_over = Some((pins, found));
        }
    }
    if left_over.is_none() && own.exist() {
        left_over = Some((own, own_found));
    }
    let is_ours = |(pins, found): &(Pins, Look)| -> Result<bool, GuardError> {
        Ok(found.standing != Standing::Gone || !pins.is_of_gone_namespace()?)
    };
    match left_over {
        Some(left) if is_ours(&left)? => Ok(Some(left)),
        _ => Ok(None),
    }
}

/// Fails where what was `found` judges on anything but `interface`: removing its pins would open
/// an interface that nobody named.
pub fn refuse_elsewhere(interface: &str, found: &Look) -> Result<(), GuardError> {
    let interface = interface.to_owned();
    match (found.standing, &found.interface) {
        (Standing::Gone, _) => Ok(()),
        (Standing::Elsewhere, _) | (_, None) => Err(GuardError::Elsewhere {
            interface,
            ifindex: found.ifindex,
        }),
        (_, Some(now)) if *now != interface => Err(GuardError::Renamed {
            interface,
            now: now.clone(),
        }),
        _ => Ok(()),
    }
}
