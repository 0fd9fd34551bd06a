//! The guard's maps. Each guard has its own set; userspace pins them beside the links.

// The target is declared without compare-and-swap, which the instruction set has (Linux 5.12).
use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use aya_ebpf::{
    bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE},
    btf_maps::{self, ArrayOfMaps},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns},
    macros::{btf_map, map},
    maps::Array,
};
use omerta_verdict::{
    Address, Bucket, FixedInputs, Flow, Guard, Meter, Policy, Protocol, Rate, table_holds,
};

use crate::flows;

/// The generation of the policy: its lowest bit names the slot in force. Written last in a
/// commit, one aligned word, so that a program sees the old policy or the new one, never a mix.
#[map]
static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

/// Two slots, of which one is in force.
#[map]
static POLICY: Array<Policy> = Array::with_max_entries(2, 0);

/// The bank of the allowlist that belongs to each slot. Userspace makes a bank of the size that
/// the allowlist needs for each commit; this one is the pattern that the kernel holds it to.
#[btf_map]
static RULES: ArrayOfMaps<btf_maps::Array<Words, 1, BANK_FLAGS>, 2> = ArrayOfMaps::new();

/// A bucket as the pattern names it. Before Linux 6.3 a structure here would make the pattern differ
/// from a bank, which is made without type information (`timer_off` in kernel/bpf/map_in_map.c).
type Words = [u64; size_of::<Bucket>() / size_of::<u64>()];

/// A bank is mapped by userspace, so it starts at a page and each bucket is one cache line; and
/// its size is its own, not the pattern's.
const BANK_FLAGS: usize = (BPF_F_MMAPABLE | BPF_F_INNER_MAP) as usize;

/// When the guard's lease ends, nanoseconds of `CLOCK_MONOTONIC`; 0 where it has none. Renewed by
/// writing this one aligned word, which no commit touches.
#[map]
static LEASE: Array<u64> = Array::with_max_entries(1, 0);

/// The bucket of each meter, shared by all CPUs.
#[map]
static METERS: Array<u64> = Array::with_max_entries(Meter::COUNT as u32, 0);

/// Set at load, by tests alone.
#[unsafe(no_mangle)]
static FIXED: FixedInputs = FixedInputs::NONE;

const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
/// Tries of one CPU to take a token while others take theirs; then the bucket counts as empty.
const TRIES: u32 = 8;

/// The policy and allowlist of one generation, chosen once per frame.
pub struct KernelGuard {
    slot: Option<u32>,
}

impl KernelGuard {
    #[inline(always)]
    pub fn read() -> Self {
        // SAFETY: an array map's element lives as long as the map; this is one aligned load.
        let slot = GENERATION
            .get_ptr(0)
            .map(|word| unsafe { word.read_volatile() } as u32 & 1);
        Self { slot }
    }
}

impl Guard for KernelGuard {
    #[inline(always)]
    fn policy(&self) -> Option<&Policy> {
        POLICY.get(self.slot?)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        let words = RULES.get_value(self.slot?, &index)?;
        // SAFETY: as long as a bucket and aligned as one (a bank starts at a page); every bit
        // pattern of a bucket is valid.
        Some(unsafe { &*core::ptr::from_ref(words).cast() })
    }

    #[inline(always)]
    fn owns(&self, policy: &Policy, address: Address) -> bool {
        // Most guests have one address or two; each call costs as much as what it calls.
        let [first, second, ..] = &policy.addresses;
        if !address.is_unspecified() && (*first == address || *second == address) {
            return true;
        }
        let (high, low) = address.words();
        self.slot
            .is_some_and(|slot| guest_owns(slot, high, low) == 1)
    }

    #[inline(always)]
    fn lists(&self, _policy: &Policy, protocol: Protocol, address: Address, port: u16) -> bool {
        let (high, low) = address.words();
        let service = (protocol as u32) << 16 | port as u32;
        self.slot
            .is_some_and(|slot| allowlist_holds(slot, high, low, service) == 1)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        let fixed = fixed();
        if fixed.now_ns != 0 {
            return fixed.random;
        }
        // SAFETY: the helper takes no arguments and has no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        now()
    }

    #[inline(always)]
    fn lease_until(&self) -> u64 {
        // Without the map nothing is leased to anybody: the time has run out.
        // SAFETY: an array map's element lives as long as the map; this is one aligned load.
        LEASE
            .get_ptr(0)
            .map_or(1, |word| unsafe { word.read_volatile() })
    }

    #[inline(always)]
    fn take(&self, meter: Meter, rate: Rate, units: u32) -> bool {
        if rate.is_unlimited() {
            return true;
        }
        self.slot
            .is_some_and(|slot| take_units(slot, meter as u32, units) == 1)
    }

    #[inline(always)]
    fn open_flow(&self, flow: &Flow) -> bool {
        flows::open(flow)
    }

    #[inline(always)]
    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        flows::seen(flow)
    }
}

// The verifier judges each of these functions once and for itself: see `main`. Numbers stand for
// what is not theirs to hold, and the slot for the policy, so that all see the same one.

/// 1 where the guest owns the address, by the policy in `slot`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn guest_owns(slot: u32, high: u64, low: u64) -> u32 {
    match POLICY.get(slot) {
        Some(policy) => policy.owns(Address::from_words(high, low)) as u32,
        None => 0,
    }
}

/// 1 where the allowlist of the policy in `slot` holds the endpoint.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn allowlist_holds(slot: u32, high: u64, low: u64, service: u32) -> u32 {
    let guard = KernelGuard { slot: Some(slot) };
    let address = Address::from_words(high, low);
    match guard.policy() {
        Some(policy) => table_holds(&guard, policy, address, service) as u32,
        None => 0,
    }
}

/// 1 where `units` could be taken from the bucket of `meter`, at the rate of the policy in `slot`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn take_units(slot: u32, meter: u32, units: u32) -> u32 {
    match POLICY.get(slot) {
        Some(policy) => take(policy, meter, units) as u32,
        None => 0,
    }
}

/// Whether an event may be told, by the policy in force.
#[inline(always)]
pub fn may_tell() -> bool {
    // A guard without policy has no rate, and nobody who reads.
    match KernelGuard::read().policy() {
        Some(policy) => {
            policy.rates[Meter::Events as usize].is_unlimited()
                || take(policy, Meter::Events as u32, 1)
        }
        None => false,
    }
}

#[inline(always)]
fn take(policy: &Policy, meter: u32, units: u32) -> bool {
    let Some(word) = METERS.get_ptr_mut(meter) else {
        return false;
    };
    // The compiler may know the bound and leave the comparison out; the verifier does not.
    // SAFETY: the variable is this function's own.
    let meter = unsafe { core::ptr::read_volatile(&raw const meter) };
    let Some(rate) = policy.rates.get(meter as usize) else {
        return false;
    };
    let now = now();
    let mut attempt = 0;
    while attempt < TRIES {
        // SAFETY: an array map's element is aligned and lives as long as the map.
        let seen = unsafe { word.read_volatile() };
        let Some(next) = rate.take(seen, now, units) else {
            return false;
        };
        // SAFETY: as above; programs change the element in this way only.
        let (_, taken) = unsafe { atomic_cxchg::<u64, RELAXED, RELAXED>(word, seen, next) };
        if taken {
            return true;
        }
        attempt += 1;
    }
    false
}

#[inline(always)]
fn fixed() -> FixedInputs {
    // SAFETY: the constant is this program's own; the read is volatile because the loader may have
    // replaced the value that the compiler saw.
    unsafe { core::ptr::read_volatile(&raw const FIXED) }
}

#[inline(always)]
pub fn now() -> u64 {
    let fixed = fixed();
    if fixed.now_ns != 0 {
        return fixed.now_ns;
    }
    // `CLOCK_MONOTONIC` as of the last tick, 1 to 10 ms ago: reading the clock itself costs as much
    // as the rest of a verdict, and what is timed here lasts longer.
    // SAFETY: the helper takes no arguments and has no preconditions.
    unsafe { bpf_ktime_get_coarse_ns() }
}
