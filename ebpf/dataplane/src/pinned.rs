//! What is pinned for this network namespace, and where it is in force.

use crate::pins::Pins;
use crate::standing::{Look, look};
use crate::{Guard, GuardError, Owner, Standing, interface};

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
        let _lock = Pins::lock()?;
        recover()?;
        let mut found = Vec::new();
        for (name, pins) in Pins::all()?.into_iter().chain(Pins::aside()?) {
            let seen = look(&pins)?;
            found.push(PinnedGuard {
                interface: seen.interface.unwrap_or(name),
                owner: pins.owner().ok().flatten(),
                standing: seen.standing,
            });
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

    /// Removes what is pinned for `interface` where its guard is not whole, and what a process
    /// left that died while it attached or removed a guard: whoever owned it where nothing of it
    /// judges, else only where it is nobody's or `acting`'s. A whole guard is left alone, and
    /// refused where it is in force on an interface that was renamed or moved. Returns whether
    /// anything of `interface`'s was removed.
    pub fn remove_stale(interface: &str, acting: Option<&Owner>) -> Result<bool, GuardError> {
        let _lock = Pins::lock()?;
        recover()?;
        let aside = remove_aside(interface, acting)?;
        let ifindex = interface::index(interface).unwrap_or(0);
        let Some((pins, found)) = find(interface, ifindex)? else {
            return Ok(aside);
        };
        if found.standing.is_whole() && found.is_on(interface, ifindex) {
            return Ok(aside);
        }
        if found.standing != Standing::Gone {
            refuse_owned(interface, &pins, acting)?;
        }
        refuse_elsewhere(interface, &found)?;
        pins.remove()?;
        Ok(true)
    }
}

/// Puts a whole guard that stands aside, because the process died that attached or removed it, in
/// its place, unless there is another. Callers hold the lock.
pub fn recover() -> Result<(), GuardError> {
    for (_, pins) in Pins::aside()? {
        let place = pins.place();
        if look(&pins)?.standing.is_whole() && !place.exist() {
            pins.put_in_place(&place)?;
        }
    }
    Ok(())
}

/// Removes what stands aside: of any interface where nothing of it judges any more, and whatever
/// it does for `interface`, unless it is another's than `acting`. Tells whether there was anything
/// of `interface`'s. Callers hold the lock, so nobody is at work on it.
pub fn remove_aside(interface: &str, acting: Option<&Owner>) -> Result<bool, GuardError> {
    let mut any = false;
    for (name, pins) in Pins::aside()? {
        let ours = name == interface;
        if look(&pins)?.standing != Standing::Gone {
            if !ours {
                continue;
            }
            refuse_owned(interface, &pins, acting)?;
        }
        pins.remove_aside()?;
        any |= ours;
    }
    Ok(any)
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
    for (name, pins) in Pins::all()? {
        let found = look(&pins)?;
        if found.is_on(interface, ifindex) {
            return Ok(Some((pins, found)));
        }
        if name == interface && found.standing == Standing::Gone {
            left_over = Some((pins, found));
        }
    }
    Ok(left_over.or_else(|| own.exist().then_some((own, own_found))))
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
