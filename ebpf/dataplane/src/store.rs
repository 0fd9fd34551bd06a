//! The policy in the kernel's maps, and how it changes.
//!
//! Two slots; the generation's lowest bit names the one in force. A commit writes the other slot, its
//! bank of rules first where the allowlist is too long for the slot, and then the generation, one
//! word: a program sees the old policy or the new one. A process killed before that last write has
//! changed nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use aya::maps::{IterableMap, Map, MapError};
use omerta_verdict::{
    Address, Bucket, Endpoint, FixedInputs, Flow, INLINE_BUCKETS, Live, Policy, Slot,
    SocketBufferLayout, Table,
};

use crate::bank::{self, Mapped, Spare};
use crate::bpffs::failed;
use crate::buckets::{self, Filling};
use crate::flows::{self, FlowMap};
use crate::map::Put;
use crate::object::Programs;
use crate::own::{self, OwnMaps};
use crate::pins::Pins;
use crate::random::Random;
use crate::rules::{self, MAX_ENDPOINTS};
use crate::shared::Table as SharedTable;
use crate::state::StateMap;
use crate::upgrade::require_policy;
use crate::{GuardError, link, map};

/// A bank that is no longer in force is written again if it is at most this many times longer than
/// the new allowlist needs: a new one is memory that the kernel has to find and clear first.
const SPARE: usize = 4;
/// How often a policy that changes while it is read is read again.
const SETTLING: u32 = 100;

/// A map value of a `repr(C)` type from the verdict crate.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Value<T: Copy>(pub(crate) T);

// SAFETY: `Bucket` is `repr(C)`, holds integers only, and names its padding as fields, so every byte
// is initialised and every bit pattern is valid.
unsafe impl aya::Pod for Value<Bucket> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<SocketBufferLayout> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<FixedInputs> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<Flow> {}

// SAFETY: as above.
unsafe impl aya::Pod for Value<Address> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<Live> {}

/// Reads and commits the policy of one guard.
pub struct PolicyStore {
    interface: String,
    state: StateMap,
    /// The table of the banks of all guards.
    banks: OwnedFd,
    /// The guard's place in it.
    place: u32,
    /// Of a guard that can judge in conntrack mode.
    flows: Option<FlowMap>,
}

impl PolicyStore {
    /// The store of a guard whose maps are pinned.
    pub(crate) fn open(interface: &str, pins: &Pins) -> Result<Self, GuardError> {
        require_policy(interface, pins)?;
        let seat = pins.seat()?.ok_or_else(|| GuardError::OtherPolicyLayout {
            interface: interface.to_owned(),
        })?;
        let banks = seat.table(interface, pins.namespace(), SharedTable::Rules)?;
        Self::build(interface, &OwnMaps::open(pins, false)?, banks, seat.place)
    }

    /// The store of programs that are not pinned. `interface` is for messages only.
    pub fn of(programs: &Programs, interface: &str) -> Result<Self, GuardError> {
        let (shared, own) = programs.maps();
        Self::over(interface, own, shared.table(SharedTable::Rules), 0)
    }

    /// The store of a guard's maps, of which `place` is the place among `banks`.
    pub(crate) fn over(
        interface: &str,
        own: &OwnMaps,
        banks: BorrowedFd<'_>,
        place: u32,
    ) -> Result<Self, GuardError> {
        let banks = banks.try_clone_to_owned();
        let banks = banks.map_err(|source| GuardError::System {
            action: "open the allowlist's maps",
            interface: interface.to_owned(),
            source,
        })?;
        Self::build(interface, own, banks, place)
    }

    fn build(
        interface: &str,
        own: &OwnMaps,
        banks: OwnedFd,
        place: u32,
    ) -> Result<Self, GuardError> {
        let error = |name| move |source| map_error(interface, "open", name, source);
        let state = own.get(own::STATE).map_err(error("STATE"))?;
        let flows = match own.with_flows() {
            false => None,
            true => Some(
                own.data(own::FLOW_TABLE)
                    .and_then(|data| FlowMap::try_from(Map::HashMap(data)))
                    .map_err(error("FLOWS"))?,
            ),
        };
        Ok(Self {
            interface: interface.to_owned(),
            state: map_state(interface, state)?,
            banks,
            place,
            flows,
        })
    }

    /// The number of a slot's bank among all guards'.
    fn bank_of(&self, slot: u32) -> u32 {
        2 * self.place + slot
    }

    fn system(&self, action: &'static str, source: io::Error) -> GuardError {
        GuardError::System {
            action,
            interface: self.interface.clone(),
            source,
        }
    }

    /// The policy in force.
    pub fn policy(&self) -> Result<Policy, GuardError> {
        Ok(self.state.slot().policy)
    }

    /// The generation in force, which each commit changes.
    pub(crate) fn generation(&self) -> u64 {
        self.state.generation()
    }

    /// Generation, policy and allowlist in force, as they belong together, for who does not hold the
    /// guard's lock.
    pub(crate) fn settled(&self) -> Result<(u64, Policy, Vec<Bucket>), GuardError> {
        for _ in 0..SETTLING {
            let generation = self.generation();
            let listed = self.listed()?;
            let (policy, buckets) = (listed.slot.policy, listed.buckets().to_vec());
            // What was read is of one policy where nothing has been put in force meanwhile.
            fence(Ordering::Acquire);
            if self.generation() == generation {
                return Ok((generation, policy, buckets));
            }
        }
        let busy = io::Error::other("it changes too fast");
        Err(self.system("read the policy", busy))
    }

    /// When the lease ends, nanoseconds of `CLOCK_MONOTONIC`; 0 where there is none.
    pub fn lease_until_ns(&self) -> u64 {
        self.state.lease_until_ns()
    }

    /// Lets the lease end at `until_ns` of `CLOCK_MONOTONIC`, or never where that is 0: one word, in
    /// force at once.
    pub fn set_lease_until_ns(&self, until_ns: u64) {
        self.state.set_lease_until_ns(until_ns);
    }

    /// The allowlist in force, sorted.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>, GuardError> {
        let listed = self.listed()?;
        let mut endpoints: Vec<_> = Table::endpoints(listed.buckets()).collect();
        endpoints.sort_unstable();
        Ok(endpoints)
    }

    /// The allowlist in force. Callers hold the guard's lock as long as they look at it.
    pub(crate) fn listed(&self) -> Result<Listed, GuardError> {
        let slot = self.state.slot();
        let count = slot.policy.table_mask as usize + 1;
        let bank = if count <= INLINE_BUCKETS {
            None
        } else {
            let number = self.bank_of(self.state.number());
            let mapped = map::map_in(self.banks.as_fd(), number).and_then(|bank| {
                let bank = bank.ok_or(io::ErrorKind::NotFound)?;
                Mapped::of(bank.as_fd(), count)
            });
            Some(mapped.map_err(|source| self.system("map the allowlist", source))?)
        };
        Ok(Listed { slot, bank })
    }

    /// Whether it can judge in conntrack mode.
    pub(crate) fn has_room_for_flows(&self) -> bool {
        self.flows.is_some()
    }

    /// The interface's name.
    pub(crate) fn interface(&self) -> &str {
        &self.interface
    }

    /// Puts `policy` with the allowlist `endpoints` in force, all or nothing. Its epoch and table
    /// parameters are filled in. Returns the new epoch. Callers hold the guard's lock.
    pub fn commit(&mut self, policy: Policy, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        self.commit_each(policy, endpoints.len(), || endpoints.iter().copied())
    }

    /// [`PolicyStore::commit`] of what `endpoints` gives each time, of which no more than `length` differ.
    pub(crate) fn commit_each<I: Iterator<Item = Endpoint>>(
        &mut self,
        mut policy: Policy,
        length: usize,
        endpoints: impl Fn() -> I,
    ) -> Result<u64, GuardError> {
        self.forget_flows(&policy, endpoints())?;
        let mut slot = self.state.slot();
        policy.epoch = slot.policy.epoch + 1;
        let full = || GuardError::AllowlistFull {
            interface: self.interface.clone(),
            count: length,
            limit: MAX_ENDPOINTS,
        };
        let mut random = Random::open().map_err(|e| self.system("open /dev/urandom", e))?;
        for count in rules::sizes(length.min(MAX_ENDPOINTS)) {
            let mut bank = match count {
                INLINE_BUCKETS => None,
                _ => Some(self.spare(count)?),
            };
            for _ in 0..rules::SEEDS {
                let buckets = match &mut bank {
                    Some(bank) => bank.buckets.empty(),
                    None => {
                        slot.buckets.fill(Bucket::EMPTY);
                        &mut slot.buckets
                    }
                };
                let seed = random.word();
                match Filling::new(buckets, seed).hold(endpoints()) {
                    None => continue,
                    Some(held) if held > MAX_ENDPOINTS => return Err(full()),
                    Some(_) => {}
                }
                random
                    .finish()
                    .map_err(|e| self.system("read random numbers", e))?;
                if let Some(Bank {
                    fresh: Some(fresh), ..
                }) = bank
                {
                    let put = Put {
                        table: self.banks.as_fd(),
                        number: self.bank_of(self.state.next_number()),
                        map: fresh.as_fd(),
                    };
                    map::put(&[put]).map_err(|source| {
                        self.system("put the allowlist's map in its place", source)
                    })?;
                }
                policy.table_seed = seed;
                policy.table_mask = count as u32 - 1;
                slot.policy = policy;
                self.state.commit(&slot);
                return Ok(policy.epoch);
            }
        }
        Err(full())
    }

    /// What is in force, for [`PolicyStore::put_in_force`].
    pub fn in_force(&self) -> Slot {
        self.state.slot()
    }

    /// Puts in force again what was, as the last step of a commit does, and nothing else: for tests
    /// that race with the programs. A longer allowlist than stands in a slot does not come back.
    pub fn put_in_force(&mut self, slot: &Slot) {
        self.state.commit(slot);
    }

    /// Before `next` with `endpoints` allows what the policy in force does not: removes the flows that
    /// were opened by an earlier one, which would let the peer in without the guest's doing. Programs
    /// that still judge by such a policy take back what they open from now on.
    fn forget_flows(
        &mut self,
        next: &Policy,
        mut endpoints: impl Iterator<Item = Endpoint>,
    ) -> Result<(), GuardError> {
        let interface = self.interface.clone();
        let failed = |action| {
            let interface = interface.clone();
            move |source| map_error(&interface, action, "FLOWS", source)
        };
        let listed = self.listed()?;
        let Some(table) = &mut self.flows else {
            return Ok(());
        };
        if next.addresses == listed.policy().addresses && endpoints.all(|e| listed.holds(&e)) {
            return Ok(());
        }
        let flows = flows::all(table.map()).map_err(|source| GuardError::System {
            action: "read the flows",
            interface: interface.clone(),
            source,
        })?;
        for flow in flows {
            let allowed = listed.policy().owns(flow.guest)
                && flow.endpoint().is_some_and(|e| listed.holds(&e));
            if !allowed {
                flows::remove(table, flow).map_err(failed("write"))?;
            }
        }
        Ok(())
    }

    /// The bank of the slot that is not in force, of `count` buckets, to be filled: the one in place, or
    /// where that is too short or much too long, a new one.
    fn spare(&self, count: usize) -> Result<Bank, GuardError> {
        let spare = |bank: BorrowedFd<'_>, is_empty| {
            Spare::of(bank, count, is_empty)
                .map_err(|source| self.system("map the allowlist's map", source))
        };
        let number = self.bank_of(self.state.next_number());
        let found = map::map_in(self.banks.as_fd(), number)
            .and_then(|bank| {
                bank.map(|bank| Ok((map::entries(bank.as_fd())? as usize, bank)))
                    .transpose()
            })
            .map_err(|source| self.system("open the allowlist's map", source))?;
        match found {
            Some((length, bank)) if (count..=SPARE * count).contains(&length) => {
                return Ok(Bank {
                    buckets: spare(bank.as_fd(), false)?,
                    fresh: None,
                });
            }
            _ => {}
        }
        let fresh = bank::create(count)
            .map_err(|source| self.system("make the allowlist's map", source))?;
        Ok(Bank {
            buckets: spare(fresh.as_fd(), true)?,
            fresh: Some(fresh),
        })
    }

    /// Puts the policy in force once more, as the next generation: for a bench, of a guard whose
    /// allowlist stands beside its policy.
    #[doc(hidden)]
    pub fn repeat(&mut self) {
        let slot = self.state.slot();
        self.state.commit(&slot);
    }
}

/// The allowlist in force, and its policy.
pub(crate) struct Listed {
    slot: Slot,
    bank: Option<Mapped>,
}

impl Listed {
    pub fn policy(&self) -> &Policy {
        &self.slot.policy
    }

    pub fn buckets(&self) -> &[Bucket] {
        self.bank.as_deref().unwrap_or(&self.slot.buckets)
    }

    pub fn holds(&self, endpoint: &Endpoint) -> bool {
        buckets::hold(self.buckets(), self.policy().table_seed, endpoint)
    }
}

/// A bank to be filled, which may be in no table yet.
struct Bank {
    buckets: Spare,
    fresh: Option<OwnedFd>,
}

/// The state of the guard of `pins`.
pub(crate) fn state_of(interface: &str, pins: &Pins) -> Result<StateMap, GuardError> {
    require_policy(interface, pins)?;
    let path = pins.path(own::STATE.shape.name);
    let map = link::open(&path).map_err(failed("open", &path))?;
    map_state(interface, map.as_fd())
}

/// Maps the guard's `STATE`.
pub(crate) fn map_state(interface: &str, map: BorrowedFd<'_>) -> Result<StateMap, GuardError> {
    StateMap::of(map).map_err(|source| GuardError::System {
        action: "map the guard's state",
        interface: interface.to_owned(),
        source,
    })
}

pub(crate) fn map_error(
    interface: &str,
    action: &'static str,
    map: &'static str,
    source: MapError,
) -> GuardError {
    GuardError::Map {
        action,
        map,
        interface: interface.to_owned(),
        source: Box::new(source),
    }
}
