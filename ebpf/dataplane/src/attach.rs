//! Attaching a guard: at every instant the interface is as it was, or guarded with its pins whole.
//! Where the process is killed between the two hooks, one direction is judged and no guard is in
//! force yet. Links end with their maker then; filters (on kernels without TCX) stay, known by the
//! pins that were made before them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::{SchedClassifier, TcAttachType};
use omerta_verdict::{Direction, Mode};

use crate::bpffs::{anchor, failed};
use crate::clsact::{self, Qdisc};
use crate::hold::Enforced;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::notes::{self, Filters};
use crate::object::{program_name, secret};
use crate::own::OwnMaps;
use crate::pinned::{recover, refuse_elsewhere, remove_aside};
use crate::pins::Pins;
use crate::rules::refuse_unreachable;
use crate::shared::{JUDGES, Seat, Shared, Table};
use crate::standing::look;
use crate::store::{PolicyStore, map_error, map_state};
use crate::upgrade::build_note;
use crate::{Guard, GuardConfig, GuardError, HeldGuard, Hook, entry, interface, lease, link, own};

impl Guard {
    /// Guards `interface`, which may be down and should be: attach before the guest can send. The
    /// handle acts in the name of the owner that `config` gives the guard.
    pub fn attach(interface: &str, config: &GuardConfig) -> Result<Self, GuardError> {
        Self::attach_by(Hook::of_this_kernel()?, interface, config)
    }

    /// As [`Guard::attach`], by a hook that is not the kernel's best: for tests, which so have two
    /// kinds of guards on one kernel.
    #[doc(hidden)]
    pub fn attach_by(
        hook: Hook,
        interface: &str,
        config: &GuardConfig,
    ) -> Result<Self, GuardError> {
        // What is wrong with the interface or the policy is told before anything is loaded.
        let (_, interface) = &named(interface)?;
        interface::mac(interface)?;
        let policy = config.policy(interface)?;
        refuse_unreachable(interface, &policy, &config.allow)?;
        Self::attach_with(hook, interface, config, None)
    }

    /// As [`Guard::attach`], in the place of a guard that lost its pins or was cut off: the new one
    /// enforces what `held` does, by its policy, allowlist and lease as they stand. Only the owner is
    /// `config`'s. In `group` is the interface, where it was let through as a guarded one ([`Guard::enter_group`]):
    /// whoever removes the new guard takes it out, too.
    ///
    /// # Errors
    /// Also where what `held` enforces cannot be read.
    pub fn attach_in_place_of(
        held: &HeldGuard,
        interface: &str,
        config: &GuardConfig,
        group: Option<u32>,
    ) -> Result<Self, GuardError> {
        let held = Some((held, group));
        Self::attach_with(Hook::of_this_kernel()?, interface, config, held)
    }

    fn attach_with(
        hook: Hook,
        interface: &str,
        config: &GuardConfig,
        held: Option<(&HeldGuard, Option<u32>)>,
    ) -> Result<Self, GuardError> {
        let (ifindex, interface) = named(interface)?;
        let interface = &interface;
        interface::mac(interface)?;
        let lock = Lock::of(interface)?;
        recover(&lock)?;
        // Read under the lock, so that whoever changed the held guard has done so before.
        let enforced = match held {
            Some((held, group)) => held.enforced(group)?,
            None => Enforced {
                policy: config.policy(interface)?,
                allow: config.allow.clone(),
                lease_until_ns: lease::word(interface, config.lease)?,
                group: None,
            },
        };
        refuse_unreachable(interface, &enforced.policy, &enforced.allow)?;
        // An owner that watches its guards holds them besides (and may not be able to mount).
        if config.owner.is_none() {
            anchor()?;
        }
        let mut left = LeftFilters::default();
        // Whatever name the interface had when it was guarded.
        let candidates = match is_filtered(interface, ifindex)? {
            true => Pins::all()?.into_iter().chain(Pins::aside()?).collect(),
            false => Vec::new(),
        };
        for (_, pins) in candidates {
            let found = look(&pins)?;
            if !found.is_on(interface, ifindex) {
                continue;
            }
            let interface = interface.to_owned();
            if let Some(owner) = pins.owner()?
                && config.owner.as_ref() != Some(&owner)
            {
                return Err(GuardError::Owned { interface, owner });
            }
            if found.standing.is_whole() {
                return Err(GuardError::AlreadyGuarded { interface });
            }
            left.made_qdisc |= pins.filters()?.is_some_and(|filters| filters.made_qdisc);
        }
        let mut place = Pins::of(interface)?;
        let mut found = look(&place)?;
        if found
            .interface
            .as_ref()
            .is_some_and(|holder| holder != interface)
        {
            place = place.beside(ifindex);
            found = look(&place)?;
        }
        refuse_elsewhere(interface, &found)?;
        place.refuse_foreign()?;
        // What is pinned there is left over from an interface that is gone. It gives way to the
        // new guard when that is whole; until then two may judge, never none.
        // The interface may have gone meanwhile, which says more than the hook's complaint.
        let gone_or = |error| interface::index(interface).err().unwrap_or(error);
        let aside = place.create_aside()?;
        let made = Made::within(&aside, interface, ifindex, config, &enforced)
            .and_then(|made| match hook {
                Hook::Tcx => made.link(&aside, interface, ifindex).map_err(gone_or),
                Hook::Clsact => made
                    .filter(&aside, interface, ifindex, &mut left)
                    .map_err(gone_or),
            })
            .and_then(|()| Self::of_pins(interface, ifindex, aside.clone())?.judging())
            .and_then(|()| aside.put_in_place(&place));
        if let Err(error) = made {
            // The error to report is the first; whatever stays is removed by the next change. What
            // judges in the place of another must stay.
            if !left.replaced {
                let _ = aside.remove_aside();
            }
            return Err(error);
        }
        let mut guard = Self::of_pins(interface, ifindex, place)?;
        guard.acting = config.owner.clone();
        // The guard is in force; what cannot be removed now is removed by the next change.
        let _ = remove_aside(&lock, interface, config.owner.as_ref());
        Ok(guard)
    }
}

/// The interface's index and name. Another of its names may have been given (`ip link property add ...
/// altname`).
fn named(interface: &str) -> Result<(u32, String), GuardError> {
    let ifindex = interface::index(interface)?;
    let name = interface::name(ifindex).unwrap_or_else(|| interface.to_owned());
    Ok((ifindex, name))
}

/// A guard's maps and programs, pinned and found by the programs that judge, on no interface yet.
struct Made {
    /// By direction.
    entries: [OwnedFd; 2],
}

impl Made {
    fn within(
        pins: &Pins,
        interface: &str,
        ifindex: u32,
        config: &GuardConfig,
        enforced: &Enforced,
    ) -> Result<Self, GuardError> {
        let failed_to = |action| {
            move |source| GuardError::System {
                action,
                interface: interface.to_owned(),
                source,
            }
        };
        pins.set_namespace()?;
        if let Some(owner) = &config.owner {
            pins.set_owner(owner)?;
        }
        pins.set_note(notes::LAYOUT, &Layout::of_this_build().to_string())?;
        pins.set_note(notes::PROGRAMS, &build_note())?;
        if let Some(group) = enforced.group {
            pins.set_note(notes::GROUP, &group.to_string())?;
        }
        let token = secret().map_err(failed_to("make a token for"))?;
        let owner = config.owner.as_ref();
        let note = pins.path(notes::PLACE);
        let (shared, seat) =
            Shared::seat(pins.namespace(), interface, owner, ifindex, token, &note)?;
        let with_flows = enforced.policy.mode == Mode::Conntrack as u32;
        let own = OwnMaps::create(with_flows).map_err(failed_to("make the maps"))?;
        own.pin(pins)?;
        let banks = shared.table(Table::Rules);
        pin_at(&pins.path(JUDGES), shared.judges())?;
        let state = own.get(own::STATE);
        let state = state.map_err(|e| map_error(interface, "find", "STATE", e))?;
        map_state(interface, state)?.set_token(seat.token);
        let mut store = PolicyStore::over(interface, &own, banks, seat.place)?;
        store.commit(enforced.policy, &enforced.allow)?;
        store.set_lease_until_ns(enforced.lease_until_ns);
        own.put(&shared, seat.place)
            .map_err(failed_to("put the maps where the programs find them"))?;
        Ok(Self {
            entries: entries(pins, interface, &shared, &seat, |path| path)?,
        })
    }

    fn link(&self, pins: &Pins, interface: &str, ifindex: u32) -> Result<(), GuardError> {
        // What comes to the guest first: until the second link is made, no guard is in force. Each is
        // pinned when both are made: a link ends with its maker.
        let link = |direction: Direction| {
            let entry = self.entries[direction as usize].as_fd();
            link::first(entry, ifindex, direction).map_err(|source| GuardError::System {
                action: "make a link",
                interface: interface.to_owned(),
                source,
            })
        };
        let links = [
            (Direction::Ingress, link(Direction::Ingress)?),
            (Direction::Egress, link(Direction::Egress)?),
        ];
        for (direction, link) in links {
            pin_at(&pins.link_path(direction), link.as_fd())?;
        }
        Ok(())
    }
}

/// Loads the guard's own programs, and pins each at what `place` makes of its path.
pub fn entries(
    pins: &Pins,
    interface: &str,
    shared: &Shared,
    seat: &Seat,
    place: impl Fn(PathBuf) -> PathBuf,
) -> Result<[OwnedFd; 2], GuardError> {
    let load = |direction| {
        let loaded = entry::load(shared.judges(), direction, seat.place, seat.token);
        let loaded = loaded.map_err(|source| GuardError::System {
            action: "load the programs of",
            interface: interface.to_owned(),
            source,
        })?;
        pin_at(&place(pins.program_path(direction)), loaded.as_fd())?;
        Ok(loaded)
    };
    let [first, second] = Direction::ALL;
    Ok([load(first)?, load(second)?])
}

pub fn pin_at(path: &Path, object: BorrowedFd<'_>) -> Result<(), GuardError> {
    link::pin(object, path).map_err(failed("pin", path))
}

impl Made {
    /// Puts the programs, which are pinned, behind filters. `left` tells what is left of other guards.
    fn filter(
        &self,
        pins: &Pins,
        interface: &str,
        ifindex: u32,
        left: &mut LeftFilters,
    ) -> Result<(), GuardError> {
        let failed = |action| {
            move |source| GuardError::System {
                action,
                interface: interface.to_owned(),
                source,
            }
        };
        let qdisc = clsact::qdisc(ifindex).map_err(failed("ask for the qdisc"))?;
        if qdisc == Qdisc::Other {
            // It has no hook for what leaves, and would take that filter for one of what comes.
            return Err(GuardError::HookTaken {
                interface: interface.to_owned(),
                what: "the ingress qdisc",
                remedy: format!("tc qdisc del dev {interface} ingress"),
            });
        }
        // What comes to the guest first: until the second filter stands, no guard is in force.
        let mut hooks = [
            (Direction::Ingress, "egress", false),
            (Direction::Egress, "ingress", false),
        ];
        for (direction, word, instead) in &mut hooks {
            let filters =
                clsact::filters(ifindex, *direction).map_err(failed("ask for the filters"))?;
            match filters.first() {
                // Nothing whole was found pinned, so it is what is left of a guard: it judges until
                // this one does.
                Some(first) if first.is_guards() => *instead = true,
                Some(first) if !first.is_behind() => {
                    return Err(GuardError::HookTaken {
                        interface: interface.to_owned(),
                        what: "a filter with preference 1",
                        remedy: format!("tc filter del dev {interface} {word} pref 1"),
                    });
                }
                _ => {}
            }
        }
        let made_qdisc = match qdisc {
            Qdisc::None => {
                clsact::add_qdisc(ifindex).map_err(failed("add a clsact qdisc"))?;
                true
            }
            _ => left.made_qdisc,
        };
        pins.set_filters(Filters {
            ifindex,
            made_qdisc,
        })?;
        for (direction, _, instead) in hooks {
            let entry = self.entries[direction as usize].as_fd();
            let put = clsact::put(ifindex, direction, entry, instead);
            if put.is_err() && made_qdisc {
                // Nothing is in it where this was the first; else it goes with the filter.
                let _ = clsact::remove_unused_qdisc(ifindex);
            }
            put.map_err(failed("add a filter"))?;
            left.replaced |= instead;
        }
        Ok(())
    }
}

/// What is left of other guards on an interface that is attached by filters.
#[derive(Default)]
struct LeftFilters {
    /// Whether one of them made the qdisc.
    made_qdisc: bool,
    /// Whether a filter of theirs has given way to a new one, which alone judges since.
    replaced: bool,
}

/// Whether any program of TC is on the interface. Looking at each guard of a namespace takes milliseconds
/// where there are many; most interfaces that one is looked for on have none.
pub fn is_filtered(interface: &str, ifindex: u32) -> Result<bool, GuardError> {
    let any = || -> std::io::Result<bool> {
        for direction in Direction::ALL {
            if link::has_any(ifindex, direction)?
                || !clsact::filters(ifindex, direction)?.is_empty()
            {
                return Ok(true);
            }
        }
        Ok(false)
    };
    match any() {
        // It is gone, with all that was on it.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(GuardError::NotPermitted)
        }
        any => any.map_err(|source| GuardError::System {
            action: "ask for the programs",
            interface: interface.to_owned(),
            source,
        }),
    }
}

/// The ids of the programs on the hook of `direction`, first to run first.
pub fn attached(interface: &str, direction: Direction) -> Result<Vec<u32>, GuardError> {
    SchedClassifier::query_tcx(interface, hook(direction))
        .map(|(_, programs)| programs.iter().map(|program| program.id()).collect())
        .map_err(|source| GuardError::Program {
            program: program_name(direction),
            interface: interface.to_owned(),
            source: Box::new(source),
        })
}

/// What the guest sends enters the host by the interface's ingress hook, and the other way round.
fn hook(direction: Direction) -> TcAttachType {
    match direction {
        Direction::Egress => TcAttachType::Ingress,
        Direction::Ingress => TcAttachType::Egress,
    }
}
