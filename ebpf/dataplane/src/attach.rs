//! Attaching a guard: at every instant the interface is as it was, or guarded with its pins whole.
//! Where the process is killed between the two hooks, one direction is judged and no guard is in
//! force yet.

use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use omerta_verdict::Direction;

use crate::bpffs::{anchor, failed};
use crate::lock::Lock;
use crate::object::{Programs, program_name};
use crate::pinned::{recover, refuse_elsewhere, remove_aside};
use crate::pins::Pins;
use crate::rules::refuse_unreachable;
use crate::standing::look;
use crate::store::PolicyStore;
use crate::{Guard, GuardConfig, GuardError, interface, lease};

impl Guard {
    /// Guards `interface`, which may be down and should be: attach before the guest can send. The
    /// handle acts in the name of the owner that `config` gives the guard.
    pub fn attach(interface: &str, config: &GuardConfig) -> Result<Self, GuardError> {
        let ifindex = interface::index(interface)?;
        // Another of its names may have been given (`ip link property add ... altname`).
        let interface = &interface::name(ifindex).unwrap_or_else(|| interface.to_owned());
        interface::mac(interface)?;
        let policy = config.policy(interface)?;
        refuse_unreachable(interface, &policy, &config.allow)?;
        let mut programs = Programs::load(interface, config.mode)?;
        PolicyStore::of(&mut programs, interface)?.commit(policy, &config.allow)?;
        programs.set_word(lease::LEASE, 0, lease::word(interface, config.lease)?)?;

        let lock = Lock::of(interface)?;
        recover(&lock)?;
        // An owner that watches its guards holds them besides (and may not be able to mount).
        if config.owner.is_none() {
            anchor()?;
        }
        // Whatever name the interface had when it was guarded.
        for pins in Pins::all()?.into_iter().chain(Pins::aside()?) {
            let (_, pins) = pins;
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
        let links = match link(&mut programs, interface) {
            Ok(links) => links,
            // It may have gone meanwhile, which says more than the hook's complaint.
            Err(error) => return Err(interface::index(interface).err().unwrap_or(error)),
        };
        let aside = place.create_aside()?;
        let made = pin(&aside, &mut programs, links, config)
            .and_then(|()| Self::of_pins(interface, ifindex, aside.clone())?.verify())
            .and_then(|()| aside.put_in_place(&place));
        if let Err(error) = made {
            // The error to report is the first; whatever stays is removed by the next change.
            let _ = aside.remove_aside();
            return Err(error);
        }
        let mut guard = Self::of_pins(interface, ifindex, place)?;
        guard.acting = config.owner.clone();
        // The guard is in force; what cannot be removed now is removed by the next change.
        let _ = remove_aside(&lock, interface, config.owner.as_ref());
        Ok(guard)
    }
}

fn link(programs: &mut Programs, interface: &str) -> Result<[(Direction, FdLink); 2], GuardError> {
    let mut link = |direction| {
        let failed = |source| GuardError::Program {
            program: program_name(direction),
            interface: interface.to_owned(),
            source: Box::new(source),
        };
        let program = programs.program(direction)?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program
            .attach_with_options(interface, hook(direction), options)
            .map_err(failed)?;
        let link = program.take_link(id).map_err(failed)?;
        FdLink::try_from(link)
            .map(|link| (direction, link))
            .map_err(|source| GuardError::Link {
                action: "make",
                interface: interface.to_owned(),
                source,
            })
    };
    Ok([link(Direction::Ingress)?, link(Direction::Egress)?])
}

fn pin(
    pins: &Pins,
    programs: &mut Programs,
    links: [(Direction, FdLink); 2],
    config: &GuardConfig,
) -> Result<(), GuardError> {
    if let Some(owner) = &config.owner {
        pins.set_owner(owner)?;
    }
    for (name, map) in programs.ebpf().maps() {
        if name.starts_with('.') {
            continue;
        }
        let path = pins.path(name);
        map.pin(&path)
            .map_err(|error| failed("pin", &path)(std::io::Error::other(error)))?;
    }
    for (direction, link) in links {
        let path = pins.program_path(direction);
        programs
            .program(direction)?
            .pin(&path)
            .map_err(|error| failed("pin", &path)(std::io::Error::other(error)))?;
        let path = pins.link_path(direction);
        link.pin(&path)
            .map_err(|error| failed("pin", &path)(std::io::Error::other(error)))?;
    }
    Ok(())
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
