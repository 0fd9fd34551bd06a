//! A guard: the programs, maps and links that enforce one interface's policy.

use std::collections::BTreeSet;

use aya::maps::{MapData, PerCpuArray};
use omerta_verdict::{Address, Direction, Endpoint, Mode};

use crate::counters::{self, Counters};
use crate::events::EventStream;
use crate::lock::Lock;
use crate::object::has_room_for_flows;
use crate::pinned::{find, recover, refuse_elsewhere, remove_aside};
use crate::pins::Pins;
use crate::rules::refuse_unreachable;
use crate::standing::look;
use crate::status::{DirectionStatus, GuardStatus};
use crate::store::{PolicyStore, map_error};
use crate::{GuardError, Owner, Standing, interface};

const NOT_PINNED: &str = "a link is not pinned";

/// A handle on the guard of one interface. Dropping it leaves the guard in force.
#[derive(Debug)]
pub struct Guard {
    interface: String,
    ifindex: u32,
    pub(crate) pins: Pins,
    /// The links' ids, which tell this guard from another that is attached later.
    links: [u32; 2],
    /// In whose name this handle acts.
    pub(crate) acting: Option<Owner>,
}

impl Guard {
    /// The guard in force on `interface`, to be read; to be changed and detached only where it
    /// has no owner.
    pub fn open(interface: &str) -> Result<Self, GuardError> {
        let ifindex = interface::index(interface)?;
        // Another of its names may have been given (`ip link property add ... altname`).
        let interface = &interface::name(ifindex).unwrap_or_else(|| interface.to_owned());
        let find = || find(interface, ifindex);
        let mut found = find()?;
        if found.is_none() && Pins::aside()?.iter().any(|(name, _)| name == interface) {
            // Attaching or removing it is under way, or was interrupted.
            recover(&Lock::of(interface)?)?;
            found = find()?;
            if found.is_none() && Pins::aside()?.iter().any(|(name, _)| name == interface) {
                return Err(GuardError::NotInForce {
                    interface: interface.clone(),
                    why: "attaching or removing it was interrupted",
                });
            }
        }
        match found {
            Some((pins, found)) => {
                refuse_elsewhere(interface, &found)?;
                Self::of_pins(interface, ifindex, pins)
            }
            None => Err(GuardError::NotGuarded {
                interface: interface.clone(),
            }),
        }
    }

    /// The guard of `pins`, which must be in force on the interface.
    pub(crate) fn of_pins(interface: &str, ifindex: u32, pins: Pins) -> Result<Self, GuardError> {
        let mut guard = Self {
            interface: interface.to_owned(),
            ifindex,
            pins,
            links: [0; 2],
            acting: None,
        };
        for (place, direction) in Direction::ALL.into_iter().enumerate() {
            let link = guard.pins.link(direction)?;
            guard.links[place] = link.ok_or_else(|| guard.not_in_force(NOT_PINNED))?.id;
        }
        guard.standing()?;
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

    /// Proves that both links are pinned and that the kernel runs the guard's programs on this very
    /// interface, before any other program.
    pub fn verify(&self) -> Result<(), GuardError> {
        match self.standing()? {
            Standing::InForce => Ok(()),
            other => Err(self.not_in_force(other.why())),
        }
    }

    /// How the guard stands, whose two programs both judge; fails where they do not, and where
    /// it is not the guard that was opened.
    fn standing(&self) -> Result<Standing, GuardError> {
        if interface::index(&self.interface)? != self.ifindex {
            return Err(self.not_in_force("the interface was re-created"));
        }
        for (place, direction) in Direction::ALL.into_iter().enumerate() {
            match self.pins.link(direction)? {
                Some(link) if link.id == self.links[place] => {}
                Some(_) => return Err(self.replaced()),
                None => return Err(self.not_in_force(NOT_PINNED)),
            }
        }
        let found = look(&self.pins)?;
        if !found.standing.is_whole() || !found.is_on(&self.interface, self.ifindex) {
            return Err(self.not_in_force(found.standing.why()));
        }
        Ok(found.standing)
    }

    fn replaced(&self) -> GuardError {
        GuardError::Replaced {
            interface: self.interface.clone(),
        }
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
            if let Some(endpoint) = endpoints.iter().find(|e| !listed.contains(e)) {
                return Err(GuardError::NotListed {
                    interface: self.interface.clone(),
                    endpoint: endpoint.to_string(),
                });
            }
            for endpoint in endpoints {
                listed.remove(endpoint);
            }
            Ok(())
        })
    }

    /// Puts `endpoints` in place of the whole allowlist, all or nothing. Returns the epoch in
    /// force.
    pub fn replace(&self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        // Sorted before the lock is taken: a million of them take a while.
        let new: BTreeSet<_> = endpoints.iter().copied().collect();
        self.change(|listed| {
            *listed = new;
            Ok(())
        })
    }

    /// Judges by `mode` from now on. Returns the epoch in force. Only a guard that was attached in
    /// conntrack mode has room for flows, and can return to it.
    pub fn set_mode(&self, mode: Mode) -> Result<u64, GuardError> {
        let (_lock, mut store) = self.locked_store()?;
        self.authorise()?;
        let mut policy = store.policy()?;
        if policy.mode == mode as u32 {
            return Ok(policy.epoch);
        }
        if mode == Mode::Conntrack && !has_room_for_flows(&self.interface, &self.pins)? {
            return Err(GuardError::NoRoomForFlows {
                interface: self.interface.clone(),
            });
        }
        policy.mode = mode as u32;
        let endpoints = store.endpoints()?;
        store.commit(policy, &endpoints)
    }

    fn change(
        &self,
        edit: impl FnOnce(&mut BTreeSet<Endpoint>) -> Result<(), GuardError>,
    ) -> Result<u64, GuardError> {
        let (_lock, mut store) = self.locked_store()?;
        self.authorise()?;
        let policy = store.policy()?;
        let before = store.endpoints()?;
        let mut after = before.iter().copied().collect();
        edit(&mut after)?;
        if after.iter().eq(&before) {
            return Ok(policy.epoch);
        }
        let new = after.iter().filter(|e| before.binary_search(e).is_err());
        refuse_unreachable(&self.interface, &policy, new)?;
        let after: Vec<_> = after.into_iter().collect();
        store.commit(policy, &after)
    }

    fn locked_store(&self) -> Result<(Lock, PolicyStore<MapData>), GuardError> {
        let lock = self.pins.lock()?;
        self.standing()?;
        Ok((lock, PolicyStore::open(&self.interface, &self.pins)?))
    }

    /// Everything that `omerta guard show` prints.
    pub fn status(&self) -> Result<GuardStatus, GuardError> {
        let (standing, policy, allow) = {
            let _lock = self.pins.lock()?;
            let standing = self.standing()?;
            let store = PolicyStore::open(&self.interface, &self.pins)?;
            (standing, store.policy()?, store.endpoints()?)
        };
        let counters = self.counters()?;
        let present = |address: &&Address| !address.is_unspecified();
        Ok(GuardStatus {
            interface: self.interface.clone(),
            ifindex: self.ifindex,
            mode: Mode::from_number(policy.mode).map_or("none", Mode::word),
            state: standing.word(),
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
            events_limited: counters.events_limited.packets,
        })
    }

    /// The counters since the guard was attached.
    pub fn counters(&self) -> Result<Counters, GuardError> {
        let counters = self.per_cpu("COUNTERS")?;
        counters::read(&self.interface, &counters, &self.per_cpu("LOST")?)
    }

    fn per_cpu<T: aya::Pod>(
        &self,
        name: &'static str,
    ) -> Result<PerCpuArray<MapData, T>, GuardError> {
        MapData::from_pin(self.pins.path(name))
            .and_then(|data| aya::maps::Map::PerCpuArray(data).try_into())
            .map_err(|source| map_error(&self.interface, "open", name, source))
    }

    /// The guard's events. Two streams of one guard would each see a part: keep one.
    pub fn events(&self) -> Result<EventStream, GuardError> {
        EventStream::open(&self.interface, &self.pins)
    }

    /// Removes the guard: the interface is then open. Take it down first, or its guest leaves.
    pub fn detach(self) -> Result<(), GuardError> {
        let lock = self.pins.lock()?;
        if self.pins.exist() {
            self.authorise()?;
            for (place, direction) in Direction::ALL.into_iter().enumerate() {
                let link = self.pins.link(direction)?;
                if link.is_some_and(|link| link.id != self.links[place]) {
                    return Err(self.replaced());
                }
            }
            // The interface may have been renamed or moved since this handle was opened.
            refuse_elsewhere(&self.interface, &look(&self.pins)?)?;
            self.pins.remove()?;
        }
        // The guard is gone; what cannot be removed now is removed by the next change.
        let _ = remove_aside(&lock, &self.interface, self.acting.as_ref());
        Ok(())
    }

    /// The interface's name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The interface's index.
    pub fn ifindex(&self) -> u32 {
        self.ifindex
    }
}
