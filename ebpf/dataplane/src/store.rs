//! The policy in the kernel's maps, and how it changes.
//!
//! Two slots; the generation's lowest bit names the one in force. A commit gives the other slot a
//! new bank of rules and the new policy, and then writes the generation, one word: a program sees
//! the old policy or the new one. A process killed before that last write has changed nothing.

use std::borrow::{Borrow, BorrowMut};
use std::io;
use std::os::fd::AsFd;

use aya::maps::{Array, ArrayOfMaps, IterableMap, Map, MapData, MapError};
use omerta_verdict::{Bucket, Endpoint, FixedInputs, Flow, Policy, SocketBufferLayout, Table};

use crate::object::Programs;
use crate::pins::Pins;
use crate::random::Random;
use crate::rules::{self, MAX_ENDPOINTS};
use crate::{GuardError, bank};

/// The maps that hold policy, by the names that the programs give them.
const POLICY_MAPS: [&str; 3] = ["GENERATION", "POLICY", "RULES"];

/// A map value of a `repr(C)` type from the verdict crate.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Value<T: Copy>(pub(crate) T);

// SAFETY: `Policy` and `Bucket` are `repr(C)`, hold integers only, and name their padding as
// fields, so every byte is initialised and every bit pattern is valid.
unsafe impl aya::Pod for Value<Policy> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<Bucket> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<SocketBufferLayout> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<FixedInputs> {}
// SAFETY: as above.
unsafe impl aya::Pod for Value<Flow> {}

/// One bank of the allowlist.
type BankMap = Array<MapData, Value<Bucket>>;

/// Reads and commits the policy of one guard.
pub struct PolicyStore<M: Borrow<MapData>> {
    interface: String,
    generation: Array<M, u64>,
    policy: Array<M, Value<Policy>>,
    rules: ArrayOfMaps<M, BankMap>,
}

impl PolicyStore<MapData> {
    /// The store of a guard whose maps are pinned.
    pub(crate) fn open(interface: &str, pins: &Pins) -> Result<Self, GuardError> {
        let open = |name: &'static str| {
            MapData::from_pin(pins.path(name))
                .and_then(Map::from_map_data)
                .map_err(|source| map_error(interface, "open", name, source))
        };
        let [generation, policy, rules] = POLICY_MAPS;
        Self::build(interface, [open(generation)?, open(policy)?, open(rules)?])
    }
}

impl<'a> PolicyStore<&'a mut MapData> {
    /// The store of programs that are not pinned.
    pub fn of(programs: &'a mut Programs, interface: &str) -> Result<Self, GuardError> {
        match programs.ebpf().maps_disjoint_mut(POLICY_MAPS) {
            [Some(generation), Some(policy), Some(rules)] => {
                Self::build(interface, [generation, policy, rules])
            }
            _ => {
                let missing = MapError::InvalidName {
                    name: "policy".into(),
                };
                Err(map_error(interface, "find", "of policy", missing))
            }
        }
    }
}

impl<M: Borrow<MapData>> PolicyStore<M> {
    /// `maps` in the order of [`POLICY_MAPS`].
    fn build<T>(interface: &str, maps: [T; 3]) -> Result<Self, GuardError>
    where
        Array<M, u64>: TryFrom<T, Error = MapError>,
        Array<M, Value<Policy>>: TryFrom<T, Error = MapError>,
        ArrayOfMaps<M, BankMap>: TryFrom<T, Error = MapError>,
    {
        let error = |name| move |source| map_error(interface, "open", name, source);
        let [generation, policy, rules] = maps;
        Ok(Self {
            interface: interface.to_owned(),
            generation: generation.try_into().map_err(error(POLICY_MAPS[0]))?,
            policy: policy.try_into().map_err(error(POLICY_MAPS[1]))?,
            rules: rules.try_into().map_err(error(POLICY_MAPS[2]))?,
        })
    }

    fn system(&self, action: &'static str, source: io::Error) -> GuardError {
        GuardError::System {
            action,
            interface: self.interface.clone(),
            source,
        }
    }

    fn generation(&self) -> Result<u64, GuardError> {
        self.generation
            .get(&0, 0)
            .map_err(|e| map_error(&self.interface, "read", "GENERATION", e))
    }

    /// The policy in force.
    pub fn policy(&self) -> Result<Policy, GuardError> {
        let slot = slot_of(self.generation()?);
        let value = self.policy.get(&slot, 0);
        Ok(value
            .map_err(|e| map_error(&self.interface, "read", "POLICY", e))?
            .0)
    }

    /// The allowlist in force, sorted.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>, GuardError> {
        let slot = slot_of(self.generation()?);
        let bank = self.rules.get(&slot, 0);
        let bank = bank.map_err(|e| map_error(&self.interface, "open", "RULES", e))?;
        let buckets = bank::read(bank.map().fd().as_fd(), bank.len() as usize)
            .map_err(|source| self.system("read the allowlist", source))?;
        let mut endpoints: Vec<_> = Table::endpoints(&buckets).collect();
        endpoints.sort();
        Ok(endpoints)
    }
}

impl<M: BorrowMut<MapData>> PolicyStore<M> {
    /// Puts `policy` with the allowlist `endpoints` in force, all or nothing. Its epoch and table
    /// parameters are filled in. Returns the new epoch. Callers hold the guard's lock.
    pub fn commit(
        &mut self,
        mut policy: Policy,
        endpoints: &[Endpoint],
    ) -> Result<u64, GuardError> {
        let interface = self.interface.clone();
        let mut random = Random::open().map_err(|e| self.system("open /dev/urandom", e))?;
        let bank =
            rules::build(endpoints, || random.word()).ok_or_else(|| GuardError::AllowlistFull {
                interface: interface.clone(),
                count: endpoints.len(),
                limit: MAX_ENDPOINTS,
            })?;
        random
            .finish()
            .map_err(|e| self.system("read random numbers", e))?;
        let next = self.generation()?.wrapping_add(1);
        let slot = slot_of(next);
        policy.epoch = self.policy()?.epoch + 1;
        policy.table_seed = bank.seed;
        policy.table_mask = bank.buckets.len() as u32 - 1;

        let bank = bank::create(&bank.buckets)
            .map_err(|source| self.system("make the allowlist's map", source))?;
        let bank = MapData::from_fd(bank)
            .and_then(Map::from_map_data)
            .and_then(BankMap::try_from)
            .map_err(|e| map_error(&interface, "open", "RULES", e))?;
        self.wait_for_readers(slot)?;
        self.rules
            .set(slot, &bank, 0)
            .map_err(|e| map_error(&interface, "write", "RULES", e))?;
        self.policy
            .set(slot, Value(policy), 0)
            .map_err(|e| map_error(&interface, "write", "POLICY", e))?;
        self.generation
            .set(0, next, 0)
            .map_err(|e| map_error(&interface, "write", "GENERATION", e))?;
        Ok(policy.epoch)
    }

    /// Waits until no program still reads `slot`, which the last commit retired, by putting its
    /// bank where it is: the kernel ends every update of a map of maps with an RCU grace period
    /// (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c), and programs run inside read sections.
    /// (`membarrier(2)` would do, but is refused on hosts with isolated CPUs, `nohz_full=`.)
    fn wait_for_readers(&mut self, slot: u32) -> Result<(), GuardError> {
        let bank = match self.rules.get(&slot, 0) {
            Ok(bank) => bank,
            // No commit has used the slot, so no program has read it.
            Err(MapError::KeyNotFound) => return Ok(()),
            Err(source) => return Err(map_error(&self.interface, "open", "RULES", source)),
        };
        self.rules
            .set(slot, &bank, 0)
            .map_err(|source| map_error(&self.interface, "write", "RULES", source))
    }
}

fn slot_of(generation: u64) -> u32 {
    (generation & 1) as u32
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
