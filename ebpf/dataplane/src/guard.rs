//! A guard: the programs, maps and links or filters that enforce one interface's policy.

use std::io;
use std::time::Duration;

use omerta_verdict::{Direction, Endpoint, Mac, Mode};

use crate::bpffs::failed;
use crate::counters::{CounterReader, Counters};
use crate::diagnostics::DiagnosticStream;
use crate::events::EventStream;
use crate::lock::Lock;
use crate::pinned::{find, recover, refuse_elsewhere, remove_aside};
use crate::pins::Pins;
use crate::standing::look;
use crate::status::{DirectionLimits, GuardStatus};
use crate::store::PolicyStore;
use crate::{GuardError, Owner, Standing, interface, lease, links, notes, upgrade};

const NOT_PINNED: &str = "a link or program is not pinned";

/// What is known of a guard, whole or not.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// Its policy and standing.
    pub status: GuardStatus,
    /// Its counters, with bytes.
    pub counters: Counters,
}

impl Inspection {
    /// Fails where the guard does not stand as it should, with what to do.
    pub fn judge(&self) -> Result<(), GuardError> {
        let interface = self.status.interface.clone();
        match self.status.standing {
            Standing::InForce => Ok(()),
            standing => Err(GuardError::Broken {
                interface,
                standing,
            }),
        }
    }
}

/// A handle on the guard of one interface. Dropping it leaves the guard in force.
#[derive(Debug)]
pub struct Guard {
    interface: String,
    ifindex: u32,
    pub(crate) pins: Pins,
    /// What tells this guard from another that is attached later.
    identity: [u32; 2],
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
                // An owned guard's is its owner's to finish.
                if pins.owner()?.is_none() {
                    finish_upgrade(interface, &pins)?;
                }
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
            identity: [0; 2],
            acting: None,
        };
        for (place, direction) in Direction::ALL.into_iter().enumerate() {
            let identity = guard.pins.identity(direction)?;
            guard.identity[place] = identity.ok_or_else(|| guard.not_in_force(NOT_PINNED))?;
        }
        guard.standing()?;
        Ok(guard)
    }

    /// What is known of the guard of `interface`, also where it is not whole.
    ///
    /// # Errors
    /// Where nothing of a guard of `interface` judges anywhere.
    pub fn inspect(interface: &str) -> Result<Inspection, GuardError> {
        let error = match Self::open(interface) {
            Ok(guard) => {
                let (status, counters) = guard.read()?;
                return Ok(Inspection { status, counters });
            }
            Err(
                error @ (GuardError::NotInForce { .. }
                | GuardError::NoInterface { .. }
                | GuardError::Elsewhere { .. }),
            ) => error,
            Err(error) => return Err(error),
        };
        let ifindex = interface::index(interface).unwrap_or(0);
        let found = find(interface, ifindex)?.map(|(pins, _)| pins);
        let aside = Pins::aside()?.into_iter();
        let aside = aside.filter_map(|(name, pins)| (name == interface).then_some(pins));
        for pins in found.into_iter().chain(aside) {
            let _lock = pins.lock()?;
            let found = look(&pins)?;
            let here = found.interface.as_deref();
            if found.standing == Standing::Gone || here.is_some_and(|name| name != interface) {
                continue;
            }
            // Where not even the maps are left, the error says more.
            let read = GuardStatus::read(interface, found.ifindex, &pins, found.standing);
            if let Ok((status, counters)) = read {
                return Ok(Inspection { status, counters });
            }
        }
        Err(error)
    }

    /// The guard that `owner` attached to `interface`, to be changed and detached by it. Fails for
    /// a guard that is another's or nobody's.
    pub fn open_as(interface: &str, owner: &Owner) -> Result<Self, GuardError> {
        let mut guard = Self::open(interface)?;
        guard.acting = Some(owner.clone());
        guard.authorise()?;
        finish_upgrade(guard.interface(), &guard.pins)?;
        Ok(guard)
    }

    /// Fails where this handle may not change the guard.
    pub(crate) fn authorise(&self) -> Result<(), GuardError> {
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

    /// Proves that the guard is pinned and that the kernel runs the guard's programs on this very
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
            match self.pins.identity(direction)? {
                Some(identity) if identity == self.identity[place] => {}
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

    /// Fails where the guard that was opened does not judge.
    pub(crate) fn judging(&self) -> Result<(), GuardError> {
        self.standing().map(|_| ())
    }

    /// Where the guest's IP frames must go.
    pub(crate) fn gateway_mac(&self) -> Result<Mac, GuardError> {
        let policy = PolicyStore::open(&self.interface, &self.pins)?.policy()?;
        Ok(policy.gateway_mac)
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
        self.change(|store| store.allow(endpoints))
    }

    /// Removes endpoints from the allowlist, all or none. Returns the epoch in force.
    pub fn revoke(&self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        self.change(|store| store.revoke(endpoints))
    }

    /// Puts `endpoints` in place of the whole allowlist, all or nothing. Returns the epoch in
    /// force.
    pub fn replace(&self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        self.change(|store| store.replace(endpoints))
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
        if mode == Mode::Conntrack && !store.has_room_for_flows() {
            return Err(GuardError::NoRoomForFlows {
                interface: self.interface.clone(),
            });
        }
        policy.mode = mode as u32;
        store.amend(policy)
    }

    /// Limits the frames and bits of each direction as `edit` changes them. Returns the epoch in
    /// force.
    pub fn limit(&self, edit: impl FnOnce(&mut DirectionLimits)) -> Result<u64, GuardError> {
        let (_lock, mut store) = self.locked_store()?;
        self.authorise()?;
        let mut policy = store.policy()?;
        let before = DirectionLimits::of(&policy);
        let mut after = before;
        edit(&mut after);
        if after == before {
            return Ok(policy.epoch);
        }
        after.put(&mut policy);
        store.amend(policy)
    }

    /// Has the guard drop everything when `lease` has passed from now on, unless it is renewed by
    /// then; `None` is for ever.
    pub fn set_lease(&self, lease: Option<Duration>) -> Result<(), GuardError> {
        let _lock = self.pins.lock()?;
        self.standing()?;
        self.authorise()?;
        let word = lease::word(&self.interface, lease)?;
        lease::write(&self.interface, &self.pins, word)
    }

    fn change(
        &self,
        edit: impl FnOnce(&mut PolicyStore) -> Result<u64, GuardError>,
    ) -> Result<u64, GuardError> {
        let (_lock, mut store) = self.locked_store()?;
        self.authorise()?;
        edit(&mut store)
    }

    fn locked_store(&self) -> Result<(Lock, PolicyStore), GuardError> {
        let lock = self.pins.lock()?;
        self.standing()?;
        Ok((lock, PolicyStore::open(&self.interface, &self.pins)?))
    }

    /// What `omerta guard show` prints of a guard whose two programs both judge.
    pub fn status(&self) -> Result<GuardStatus, GuardError> {
        Ok(self.read()?.0)
    }

    fn read(&self) -> Result<(GuardStatus, Counters), GuardError> {
        let _lock = self.pins.lock()?;
        let standing = self.standing()?;
        GuardStatus::read(&self.interface, self.ifindex, &self.pins, standing)
    }

    /// The counters since the guard was attached.
    pub fn counters(&self) -> Result<Counters, GuardError> {
        self.counter_reader()?.read()
    }

    /// What reads the counters again and again.
    pub fn counter_reader(&self) -> Result<CounterReader, GuardError> {
        CounterReader::open(&self.interface, &self.pins)
    }

    /// The epoch of the policy in force.
    pub fn epoch(&self) -> Result<u64, GuardError> {
        Ok(PolicyStore::open(&self.interface, &self.pins)?
            .policy()?
            .epoch)
    }

    /// The guard's events. Two streams of one guard would each see a part: keep one.
    pub fn events(&self) -> Result<EventStream, GuardError> {
        EventStream::open(&self.interface, &self.pins)
    }

    /// Puts the interface into `group`, for as long as it is guarded: whoever removes the guard takes it out
    /// first.
    pub fn enter_group(&self, group: u32) -> Result<(), GuardError> {
        let _lock = self.pins.lock()?;
        self.authorise()?;
        self.judging()?;
        if self.pins.group()? != Some(group) {
            let path = self.pins.path(notes::GROUP);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path)(error));
                }
                _ => self.pins.set_note(notes::GROUP, &group.to_string())?,
            }
        }
        links::set_group(self.ifindex, group).map_err(|source| GuardError::System {
            action: "set the group of",
            interface: self.interface.clone(),
            source,
        })
    }

    /// What the programs that judge this guard say of their own failures, of it and of all other guards
    /// that they judge. What one stream has read no other sees, so those of an owned guard are its
    /// owner's to read.
    pub fn diagnostics(&self) -> Result<DiagnosticStream, GuardError> {
        self.authorise()?;
        match self.pins.seat()? {
            Some(seat) => DiagnosticStream::of(seat.directory(self.pins.namespace())),
            None => Err(GuardError::OtherAccountsLayout {
                interface: self.interface.clone(),
            }),
        }
    }

    /// Removes the guard: the interface is then open. Take it down first, or its guest leaves.
    pub fn detach(self) -> Result<(), GuardError> {
        let lock = self.pins.lock()?;
        if self.pins.exist() {
            self.authorise()?;
            for (place, direction) in Direction::ALL.into_iter().enumerate() {
                let identity = self.pins.identity(direction)?;
                if identity.is_some_and(|identity| identity != self.identity[place]) {
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

    /// What tells this guard from any that is attached later, until the host boots again.
    pub fn identity(&self) -> [u32; 2] {
        self.identity
    }
}

/// Finishes an upgrade that was interrupted. Callers may change the guard.
fn finish_upgrade(interface: &str, pins: &Pins) -> Result<(), GuardError> {
    if upgrade::is_interrupted(pins)? {
        let _lock = pins.lock()?;
        // Where it cannot be done, the guard judges all the same.
        let _ = upgrade::finish(interface, pins);
    }
    Ok(())
}
