//! A guard: the programs, maps and links that enforce one interface's policy.

use std::fs::File;
use std::path::Path;

use aya::maps::{MapData, PerCpuArray};
use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use omerta_verdict::{Address, Direction, Endpoint, Mode};

use crate::bpffs::{self, Pins};
use crate::counters::{self, Count, Counters};
use crate::events::EventStream;
use crate::link::{self, LinkInfo};
use crate::object::{Programs, program_name};
use crate::status::{DirectionStatus, GuardStatus};
use crate::store::{PolicyStore, map_error};
use crate::{GuardConfig, GuardError, Owner, interface};

/// A handle on the guard of one interface. Dropping it leaves the guard in force.
#[derive(Debug)]
pub struct Guard {
    interface: String,
    ifindex: u32,
    pins: Pins,
    /// In whose name this handle acts.
    acting: Option<Owner>,
}

/// What is pinned for one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinnedGuard {
    /// The interface's name.
    pub interface: String,
    /// Whose the guard is.
    pub owner: Option<Owner>,
    /// Whether the guard is in force. [`Guard::remove_stale`] removes what is not.
    pub in_force: bool,
}

impl Guard {
    /// Guards `interface`, which may be down and should be: attach before the guest can send.
    pub fn attach(interface: &str, config: &GuardConfig) -> Result<Self, GuardError> {
        let ifindex = interface::index(interface)?;
        let policy = config.policy(interface)?;
        let mut programs = Programs::load(interface, config.mode)?;
        PolicyStore::of(&mut programs, interface)?.commit(policy, &config.allow)?;

        let pins = Pins::of(interface)?;
        let _lock = pins.lock()?;
        let guard = Self {
            interface: interface.to_owned(),
            ifindex,
            pins,
            acting: config.owner.clone(),
        };
        if in_force(guard.position())? {
            return Err(GuardError::AlreadyGuarded {
                interface: interface.to_owned(),
            });
        }
        refuse_elsewhere(interface, &guard.pins)?;
        // What is pinned is left over from an interface that is gone, or from a crash half-way.
        // The new programs are attached before it is removed: in doubt, two guards judge.
        let links = guard.link(&mut programs)?;
        guard.pins.remove()?;
        let pinned = guard
            .pin(&mut programs, links)
            .and_then(|()| guard.verify());
        if let Err(error) = pinned {
            // The error to report is the first; whatever stays is removed by the next attach.
            let _ = guard.pins.remove();
            return Err(error);
        }
        Ok(guard)
    }

    fn link(&self, programs: &mut Programs) -> Result<[(Direction, FdLink); 2], GuardError> {
        let mut link = |direction| {
            let failed = |source| GuardError::Program {
                program: program_name(direction),
                interface: self.interface.clone(),
                source: Box::new(source),
            };
            let program = programs.program(direction)?;
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program
                .attach_with_options(&self.interface, hook(direction), options)
                .map_err(failed)?;
            let link = program.take_link(id).map_err(failed)?;
            FdLink::try_from(link)
                .map(|link| (direction, link))
                .map_err(|source| GuardError::Link {
                    action: "make",
                    interface: self.interface.clone(),
                    source,
                })
        };
        Ok([link(Direction::Ingress)?, link(Direction::Egress)?])
    }

    fn pin(
        &self,
        programs: &mut Programs,
        links: [(Direction, FdLink); 2],
    ) -> Result<(), GuardError> {
        self.pins.create()?;
        if let Some(owner) = &self.acting {
            self.pins.set_owner(owner)?;
        }
        for (name, map) in programs.ebpf().maps() {
            if name.starts_with('.') {
                continue;
            }
            let path = self.pins.path(name);
            map.pin(&path).map_err(|error| pin_failed(path, error))?;
        }
        for (direction, link) in links {
            let path = self.pins.path(link_pin(direction));
            link.pin(&path).map_err(|error| pin_failed(path, error))?;
        }
        Ok(())
    }

    /// The guard in force on `interface`, to be read; to be changed and detached only where it
    /// has no owner.
    pub fn open(interface: &str) -> Result<Self, GuardError> {
        let ifindex = interface::index(interface)?;
        let pins = Pins::of(interface)?;
        if !pins.exist() {
            return Err(GuardError::NotGuarded {
                interface: interface.to_owned(),
            });
        }
        let guard = Self {
            interface: interface.to_owned(),
            ifindex,
            pins,
            acting: None,
        };
        guard.position()?;
        Ok(guard)
    }

    /// The guard that `owner` attached to `interface`, to be changed and detached by it. Fails for
    /// a guard that is another's or nobody's.
    pub fn open_as(interface: &str, owner: &Owner) -> Result<Self, GuardError> {
        let mut guard = Self::open(interface)?;
        guard.acting = Some(owner.clone());
        guard.authorise()?;
        Ok(guard)
    }

    /// Everything that is pinned for this network namespace, in force or left over, sorted by
    /// interface.
    pub fn pinned() -> Result<Vec<PinnedGuard>, GuardError> {
        let pinned = |interface: String| {
            Ok(PinnedGuard {
                owner: Pins::of(&interface)?.owner()?,
                in_force: in_force(Self::open(&interface))?,
                interface,
            })
        };
        bpffs::pinned_interfaces()?
            .into_iter()
            .map(pinned)
            .collect()
    }

    /// Fails where this handle may not change the guard.
    fn authorise(&self) -> Result<(), GuardError> {
        let interface = self.interface.clone();
        match (self.pins.owner()?, &self.acting) {
            (owner, acting) if owner == *acting => Ok(()),
            (Some(owner), _) => Err(GuardError::Owned { interface, owner }),
            (None, Some(owner)) => Err(GuardError::NotOwned {
                interface,
                owner: owner.clone(),
            }),
            (None, None) => Ok(()),
        }
    }

    /// The interfaces of this network namespace whose guard is in force, sorted by name.
    pub fn list() -> Result<Vec<String>, GuardError> {
        let mut names = Vec::new();
        for name in bpffs::pinned_interfaces()? {
            if in_force(Self::open(&name))? {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Proves that both links are pinned and that the kernel runs their programs on this very
    /// interface, before any other program.
    pub fn verify(&self) -> Result<(), GuardError> {
        match self.position()? {
            [0, 0] => Ok(()),
            _ => Err(self.not_in_force("another program stands before it on the hook")),
        }
    }

    /// The places of the guard's programs on their hooks, ingress program first; fails where the
    /// guard is not in force.
    fn position(&self) -> Result<[usize; 2], GuardError> {
        if interface::index(&self.interface)? != self.ifindex {
            return Err(self.not_in_force("the interface was re-created"));
        }
        let place = |direction| {
            let path = self.pins.path(link_pin(direction));
            if !path.exists() {
                return Err(self.not_in_force("a link is not pinned"));
            }
            let ours = link_info(&self.interface, &path)?.program_id;
            attached(&self.interface, direction)?
                .iter()
                .position(|program| *program == ours)
                .ok_or_else(|| {
                    self.not_in_force("the interface was re-created or the link was cut")
                })
        };
        Ok([place(Direction::Ingress)?, place(Direction::Egress)?])
    }

    fn not_in_force(&self, why: &'static str) -> GuardError {
        GuardError::NotInForce {
            interface: self.interface.clone(),
            why,
        }
    }

    /// Adds endpoints to the allowlist. Returns the epoch in force.
    pub fn allow(&self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        self.change(|listed| {
            listed.extend(endpoints);
            Ok(())
        })
    }

    /// Removes endpoints from the allowlist, all or none. Returns the epoch in force.
    pub fn revoke(&self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        self.change(|listed| {
            for endpoint in endpoints {
                if !listed.contains(endpoint) {
                    return Err(GuardError::NotListed {
                        interface: self.interface.clone(),
                        endpoint: endpoint.to_string(),
                    });
                }
            }
            listed.retain(|listed| !endpoints.contains(listed));
            Ok(())
        })
    }

    /// Puts `endpoints` in place of the whole allowlist, all or nothing. Returns the epoch in
    /// force.
    pub fn replace(&self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        self.change(|listed| {
            *listed = endpoints.to_vec();
            Ok(())
        })
    }

    fn change(
        &self,
        edit: impl FnOnce(&mut Vec<Endpoint>) -> Result<(), GuardError>,
    ) -> Result<u64, GuardError> {
        let (_lock, mut store) = self.locked_store()?;
        self.authorise()?;
        let policy = store.policy()?;
        let before = store.endpoints()?;
        let mut after = before.clone();
        edit(&mut after)?;
        after.sort();
        after.dedup();
        if after == before {
            return Ok(policy.epoch);
        }
        store.commit(policy, &after)
    }

    fn locked_store(&self) -> Result<(File, PolicyStore<MapData>), GuardError> {
        let lock = self.pins.lock()?;
        self.position()?;
        Ok((lock, PolicyStore::open(&self.interface, &self.pins)?))
    }

    /// Everything that `omerta guard show` prints.
    pub fn status(&self) -> Result<GuardStatus, GuardError> {
        let (policy, allow) = {
            let (_lock, store) = self.locked_store()?;
            (store.policy()?, store.endpoints()?)
        };
        let counters = self.counters()?;
        let present = |address: &&Address| !address.is_unspecified();
        Ok(GuardStatus {
            interface: self.interface.clone(),
            ifindex: self.ifindex,
            mode: Mode::from_number(policy.mode).map_or("none", Mode::word),
            owner: self.pins.owner()?.map(|owner| owner.to_string()),
            epoch: policy.epoch,
            mac: policy.mac.to_string(),
            addresses: policy
                .addresses
                .iter()
                .filter(present)
                .map(ToString::to_string)
                .collect(),
            gateways: policy
                .gateways
                .iter()
                .filter(present)
                .map(ToString::to_string)
                .collect(),
            gateway_mac: policy.gateway_mac.to_string(),
            allow: allow.iter().map(ToString::to_string).collect(),
            egress: DirectionStatus::from(&counters.egress),
            ingress: DirectionStatus::from(&counters.ingress),
            events_lost: counters.events_lost.packets,
        })
    }

    /// The counters since the guard was attached.
    pub fn counters(&self) -> Result<Counters, GuardError> {
        let open = |name: &'static str| -> Result<PerCpuArray<MapData, Count>, GuardError> {
            let data = MapData::from_pin(self.pins.path(name));
            data.and_then(|data| aya::maps::Map::PerCpuArray(data).try_into())
                .map_err(|source| map_error(&self.interface, "open", name, source))
        };
        counters::read(&self.interface, &open("COUNTERS")?, &open("LOST")?)
    }

    /// The guard's events. Two streams of one guard would each see a part: keep one.
    pub fn events(&self) -> Result<EventStream, GuardError> {
        EventStream::open(&self.interface, &self.pins)
    }

    /// Removes the guard: the interface is then open. Take it down first, or its guest leaves.
    pub fn detach(self) -> Result<(), GuardError> {
        let _lock = self.pins.lock()?;
        if self.pins.exist() {
            self.authorise()?;
        }
        // The interface may have been renamed, or guarded anew, since this handle was opened.
        refuse_elsewhere(&self.interface, &self.pins)?;
        self.pins.remove()
    }

    /// The interface's name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The interface's index.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// Removes what is pinned for `interface` where that interface no longer exists or its guard
    /// is not in force. A guard in force is left alone, and refused where it is in force on an
    /// interface that was renamed or moved. Returns whether anything was removed.
    pub fn remove_stale(interface: &str) -> Result<bool, GuardError> {
        let pins = Pins::of(interface)?;
        if !pins.exist() {
            return Ok(false);
        }
        let _lock = pins.lock()?;
        if in_force(Self::open(interface))? {
            return Ok(false);
        }
        refuse_elsewhere(interface, &pins)?;
        pins.remove()?;
        Ok(true)
    }
}

/// Whether a guard is in force; what could not be found out is an error, never "no".
fn in_force<T>(checked: Result<T, GuardError>) -> Result<bool, GuardError> {
    match checked {
        Ok(_) => Ok(true),
        Err(
            GuardError::NotInForce { .. }
            | GuardError::NotGuarded { .. }
            | GuardError::NoInterface { .. },
        ) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Fails where a pinned link is attached to anything but `interface`: removing its pin would open
/// an interface that nobody named.
fn refuse_elsewhere(interface: &str, pins: &Pins) -> Result<(), GuardError> {
    for direction in Direction::ALL {
        let path = pins.path(link_pin(direction));
        if !path.exists() {
            continue;
        }
        let link = link_info(interface, &path)?;
        if link.ifindex == 0 {
            continue;
        }
        // Another namespace's interface may have the same index, so the program decides.
        let here = match interface::index(interface) {
            Ok(_) => attached(interface, direction)?.contains(&link.program_id),
            Err(_) => false,
        };
        if !here {
            return Err(GuardError::Elsewhere {
                interface: interface.to_owned(),
                ifindex: link.ifindex,
            });
        }
    }
    Ok(())
}

fn link_info(interface: &str, pin: &Path) -> Result<LinkInfo, GuardError> {
    link::info(pin).map_err(|source| GuardError::System {
        action: "read a link",
        interface: interface.to_owned(),
        source,
    })
}

/// The ids of the programs on the hook of `direction`, first to run first.
fn attached(interface: &str, direction: Direction) -> Result<Vec<u32>, GuardError> {
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

fn link_pin(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "link_egress",
        Direction::Ingress => "link_ingress",
    }
}

fn pin_failed(path: std::path::PathBuf, error: aya::pin::PinError) -> GuardError {
    GuardError::Bpffs {
        action: "pin",
        path,
        source: std::io::Error::other(error),
    }
}
