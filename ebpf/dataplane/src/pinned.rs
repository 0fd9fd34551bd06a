//! What is pinned for this network namespace, and where it is in force.

use omerta_verdict::Direction;

use crate::attach::attached;
use crate::pins::Pins;
use crate::{Guard, GuardError, Owner, interface};

/// What is pinned for one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedGuard {
    /// The interface's name: that of now where the guard is in force, else the name that it was
    /// attached under.
    pub interface: String,
    /// Whose the guard is.
    pub owner: Option<Owner>,
    /// Whether the guard is in force. [`Guard::remove_stale`] removes what is not.
    pub in_force: bool,
}

impl Guard {
    /// Everything that is pinned for this network namespace, in force or left over, sorted by
    /// interface.
    pub fn pinned() -> Result<Vec<PinnedGuard>, GuardError> {
        let _lock = Pins::lock()?;
        let mut found = Vec::new();
        for (name, pins) in Pins::all()? {
            let home = home(&pins)?;
            found.push(PinnedGuard {
                in_force: home.is_some(),
                interface: home.unwrap_or(name),
                owner: pins.owner()?,
            });
        }
        for (interface, pins) in Pins::aside()? {
            if found.iter().all(|guard| guard.interface != interface) {
                found.push(PinnedGuard {
                    in_force: false,
                    interface,
                    owner: pins.owner()?,
                });
            }
        }
        found.sort_by(|a, b| a.interface.cmp(&b.interface));
        Ok(found)
    }

    /// The interfaces of this network namespace whose guard is in force, sorted by name.
    pub fn list() -> Result<Vec<String>, GuardError> {
        let pinned = Self::pinned()?.into_iter();
        Ok(pinned
            .filter(|guard| guard.in_force)
            .map(|guard| guard.interface)
            .collect())
    }

    /// Removes what is pinned for `interface` where that interface no longer exists or its guard
    /// is not in force, whoever owned it, and what a process left that died while it attached or
    /// removed a guard. A guard in force is left alone, and refused where it is in force on an
    /// interface that was renamed or moved. Returns whether anything of `interface`'s was removed.
    pub fn remove_stale(interface: &str) -> Result<bool, GuardError> {
        let _lock = Pins::lock()?;
        let aside = remove_aside()?.iter().any(|name| name == interface);
        let pins = Pins::of(interface)?;
        if !pins.exist() || home(&pins)?.is_some_and(|home| home == interface) {
            return Ok(aside);
        }
        refuse_elsewhere(interface, &pins)?;
        pins.remove()?;
        Ok(true)
    }
}

/// Removes what stands aside for any interface, and tells for which. Callers hold the lock, so
/// nobody is at work on it.
pub fn remove_aside() -> Result<Vec<String>, GuardError> {
    let mut removed = Vec::new();
    for (name, pins) in Pins::aside()? {
        pins.remove_aside()?;
        removed.push(name);
    }
    Ok(removed)
}

/// The pins of the guard that is in force on `interface`, whatever that was called when it was
/// attached; else those under its name, if there are any.
pub fn find(interface: &str, ifindex: u32) -> Result<Option<Pins>, GuardError> {
    let own = Pins::of(interface)?;
    if is_in_force(interface, ifindex, &own)? {
        return Ok(Some(own));
    }
    for (_, pins) in Pins::all()? {
        if is_in_force(interface, ifindex, &pins)? {
            return Ok(Some(pins));
        }
    }
    Ok(own.exist().then_some(own))
}

/// Whether both links of `pins` run their programs on `interface`; what cannot be found out is an
/// error, never "no".
pub fn is_in_force(interface: &str, ifindex: u32, pins: &Pins) -> Result<bool, GuardError> {
    for direction in Direction::ALL {
        let Some(link) = pins.link(direction)? else {
            return Ok(false);
        };
        // Another namespace's interface may have the same index, so the program decides.
        if link.ifindex != ifindex || !attached(interface, direction)?.contains(&link.program_id) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The interface of this network namespace on which the guard of `pins` is in force.
fn home(pins: &Pins) -> Result<Option<String>, GuardError> {
    let Some(link) = pins.link(Direction::Egress)? else {
        return Ok(None);
    };
    let Some(name) = interface::name(link.ifindex) else {
        return Ok(None);
    };
    Ok(is_in_force(&name, link.ifindex, pins)?.then_some(name))
}

/// Fails where a pinned link is attached to anything but `interface`: removing its pin would open
/// an interface that nobody named.
pub fn refuse_elsewhere(interface: &str, pins: &Pins) -> Result<(), GuardError> {
    for direction in Direction::ALL {
        let Some(link) = pins.link(direction)? else {
            continue;
        };
        // 0 where the interface is gone.
        if link.ifindex == 0 {
            continue;
        }
        let now = match interface::name(link.ifindex) {
            Some(name) if attached(&name, direction)?.contains(&link.program_id) => name,
            _ => {
                return Err(GuardError::Elsewhere {
                    interface: interface.to_owned(),
                    ifindex: link.ifindex,
                });
            }
        };
        if now != interface {
            return Err(GuardError::Renamed {
                interface: interface.to_owned(),
                now,
            });
        }
    }
    Ok(())
}
