//! The guards' maps. Each guard has a set of its own, which userspace pins beside the guard's links and
//! puts in the guard's place here.

// The target is declared without compare-and-swap, which the instruction set has (Linux 5.12).
use core::arch::asm;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xsub};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INNER_MAP, BPF_F_MMAPABLE},
    btf_maps::{self, ArrayOfMaps},
    helpers::{bpf_get_prandom_u32, bpf_jiffies64, bpf_ktime_get_coarse_ns},
    macros::btf_map,
};
use omerta_verdict::{
    Address, AddressClass, Bucket, FixedInputs, Flow, GUARDS, Guard, INLINE_BUCKETS, Live,
    MAX_ADDRESSES, Meter, Mode, Policy, Protocol, Rate, Slot, State, table_holds,
};

use crate::flows;

/// What userspace maps and writes: policy, short allowlists, lease.
#[btf_map]
static STATES: ArrayOfMaps<btf_maps::Array<Words<State>, 1, STATE_FLAGS>, GUARDS> =
    ArrayOfMaps::new();

/// What the programs write: meters, and what they remember of flows and failures.
#[btf_map]
static LIVES: ArrayOfMaps<btf_maps::Array<Words<Live>, 1>, GUARDS> = ArrayOfMaps::new();

/// The banks of each guard's two slots, whose allowlists may be too long to stand beside their policies.
/// Userspace makes banks of the size that is needed; this one is the pattern that the kernel holds
/// them to.
#[btf_map]
static RULES: ArrayOfMaps<btf_maps::Array<Words<Bucket>, 1, BANK_FLAGS>, { 2 * GUARDS }> =
    ArrayOfMaps::new();

/// A map's value as the pattern names it. Before Linux 6.3 a structure here would make the pattern differ
/// from what is put in its place, which is made without type information (`timer_off` in
/// kernel/bpf/map_in_map.c).
type Words<T> = <T as AsWords>::Words;

/// What has as many words as its type says.
trait AsWords {
    type Words;
}

macro_rules! as_words {
    ($($type:ty),*) => {$(
        impl AsWords for $type {
            type Words = [u64; size_of::<$type>() / size_of::<u64>()];
        }
    )*};
}
as_words!(State, Live, Bucket);

/// Userspace maps a state.
const STATE_FLAGS: usize = BPF_F_MMAPABLE as usize;

/// A bank is mapped by userspace, so it starts at a page and each bucket is one cache line; and
/// its size is its own, not the pattern's.
const BANK_FLAGS: usize = (BPF_F_MMAPABLE | BPF_F_INNER_MAP) as usize;

/// How long a tick is, in nanoseconds. Set at load.
#[unsafe(no_mangle)]
static TICK_NS: u64 = 0;

/// Set at load, by tests alone.
#[unsafe(no_mangle)]
static FIXED: FixedInputs = FixedInputs::NONE;

const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
/// Tries of one CPU to take a token while others take theirs; then the bucket counts as empty.
const TRIES: u32 = 8;

/// Where in the maps the guard of a frame's tap is. The program on the tap (`ebpf/dataplane/src/entry.rs`)
/// writes it, and the guard's token, into the frame's control block and goes on with the programs here.
#[inline(always)]
pub fn place_of(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the whole run; the verifier rewrites this load.
    unsafe { (*skb).cb[0] }
}

#[inline(always)]
fn token_of(skb: *mut __sk_buff) -> u32 {
    // SAFETY: as above.
    unsafe { (*skb).cb[1] }
}

/// The state in `place`.
#[inline(always)]
fn state_at(place: u32) -> Option<*mut State> {
    // A variable: the compiler may take a constant of value 0 for one that the loader writes over.
    let only = 0;
    STATES
        .get_value_ptr_mut(place, &only)
        .map(|words| words.cast())
}

/// What the programs write for the guard in `place`.
#[inline(always)]
pub fn live_at(place: u32) -> Option<*mut Live> {
    // As above.
    let only = 0;
    LIVES
        .get_value_ptr_mut(place, &only)
        .map(|words| words.cast())
}

/// The policy and allowlist of one generation, chosen once per frame. What it gives may be written
/// while it is read: it counts only if [`KernelGuard::holds`] afterwards.
#[derive(Clone, Copy)]
pub struct KernelGuard {
    place: u32,
    state: *mut State,
    generation: u64,
}

impl KernelGuard {
    /// The guard of the frame's tap. `None` where its place is empty, or another guard's by now.
    #[inline(always)]
    pub fn of_tap(skb: *mut __sk_buff) -> Option<Self> {
        let place = place_of(skb);
        let guard = Self::read(place)?;
        // SAFETY: as in [`KernelGuard::read`].
        let token = unsafe { (&raw const (*guard.state).token).read_volatile() };
        (token == token_of(skb)).then_some(guard)
    }

    /// The generation in force of the guard in `place`.
    #[inline(always)]
    pub fn read(place: u32) -> Option<Self> {
        let state = state_at(place)?;
        // SAFETY: an array map's element lives as long as the map; this is one aligned load.
        let generation = unsafe { (&raw const (*state).generation).read_volatile() };
        keep_order();
        Some(Self {
            place,
            state,
            generation,
        })
    }

    /// Whether its generation is still in force, so that nothing read of it was being written: the
    /// slot of a generation is written only when the next one is in force.
    #[inline(always)]
    pub fn holds(&self) -> bool {
        keep_order();
        // SAFETY: as in [`KernelGuard::read`].
        let generation = unsafe { (&raw const (*self.state).generation).read_volatile() };
        generation == self.generation
    }

    #[inline(always)]
    fn slot(&self) -> &Slot {
        // SAFETY: the element lives as long as the map, and the index is 0 or 1. Userspace may
        // write it meanwhile: what is read are integers, of which any is valid.
        unsafe { &(*self.state).slots[(self.generation & 1) as usize] }
    }

    /// The number of the slot among all guards', which is also its bank's in `RULES`.
    #[inline(always)]
    fn number(&self) -> u32 {
        self.place << 1 | (self.generation & 1) as u32
    }

    /// The slot of a [`KernelGuard::number`].
    #[inline(always)]
    fn of_number(number: u32) -> Option<Self> {
        Self::of(number >> 1, (number & 1) as u64)
    }

    /// The guard's place.
    #[inline(always)]
    pub fn place(&self) -> u32 {
        self.place
    }

    /// The generation that it was read at.
    #[inline(always)]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// Keeps the loads and stores before it before those after it, each kind among itself. x86 does so by
/// itself; the compiler is told.
#[cfg(bpf_target_arch = "x86_64")]
#[inline(always)]
pub fn keep_order() {
    // SAFETY: no instruction at all.
    unsafe { asm!("", options(nostack, preserves_flags)) }
}

/// Likewise, where the processor may reorder them.
#[cfg(not(bpf_target_arch = "x86_64"))]
#[inline(always)]
pub fn keep_order() {
    full_barrier();
}

/// Keeps all loads and stores before it before all after it: an exchange that takes place is a full
/// barrier on every architecture (`BPF_CMPXCHG`,
/// Documentation/bpf/standardization/instruction-set.rst).
#[inline(always)]
pub fn full_barrier() {
    let mut word = 0_u64;
    // SAFETY: the word is this function's own.
    let (seen, _) = unsafe {
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
            &raw mut word,
            0,
            1,
        )
    };
    // SAFETY: no instruction; the compiler keeps the exchange because its result is read.
    unsafe { asm!("/* {0} */", in(reg) seen, options(nostack, preserves_flags)) }
}

impl Guard for KernelGuard {
    #[inline(always)]
    fn policy(&self) -> Option<&Policy> {
        Some(&self.slot().policy)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        let slot = self.slot();
        if slot.policy.table_mask < INLINE_BUCKETS as u32 {
            Some(bucket_in(&slot.buckets, index))
        } else {
            let words = RULES.get_value(self.number(), &index)?;
            // SAFETY: as long as a bucket and aligned as one (a bank starts at a page); every bit
            // pattern of a bucket is valid.
            Some(unsafe { &*core::ptr::from_ref(words).cast() })
        }
    }

    #[inline(always)]
    fn owns(&self, policy: &Policy, address: Address) -> bool {
        // Most guests have one address or two; each call costs as much as what it calls.
        let [first, second, ..] = &policy.addresses;
        if !address.is_unspecified() && (*first == address || *second == address) {
            return true;
        }
        let (high, low) = address.words();
        guest_owns(self.number(), high, low) == 1
    }

    #[inline(always)]
    fn class(&self, address: Address) -> AddressClass {
        let (high, low) = address.words();
        AddressClass::from_bits(address_class(high, low))
    }

    #[inline(always)]
    fn may_be_peer(&self, address: Address) -> bool {
        self.class(address).is_possible_peer()
    }

    #[inline(always)]
    fn lists(&self, _policy: &Policy, protocol: Protocol, address: Address, port: u16) -> bool {
        let service = (protocol as u32) << 16 | port as u32;
        let (high, low) = address.words();
        allowlist_holds(self.number(), high, low, service) == 1
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
        now_of(self.state)
    }

    #[inline(always)]
    fn lease_until(&self) -> u64 {
        // SAFETY: as in [`KernelGuard::read`].
        unsafe { (&raw const (*self.state).lease_until_ns).read_volatile() }
    }

    #[inline(always)]
    fn take(&self, meter: Meter, rate: Rate, units: u32) -> bool {
        rate.is_unlimited() || take_units(self.generation, self.place, meter as u32, units) == 1
    }

    #[inline(always)]
    fn put_back(&self, meter: Meter, rate: Rate, units: u32) {
        if !rate.is_unlimited() {
            put_back_units(self.generation, self.place, meter as u32, units);
        }
    }

    #[inline(always)]
    fn open_flow(&self, flow: &Flow) -> bool {
        self.holds() && flows::open(self, flow)
    }

    #[inline(always)]
    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        flows::last_seen(self, flow)
    }

    #[inline(always)]
    fn note_sent(&self, flow: &Flow) {
        flows::note_apart(self, flow);
    }

    #[inline(always)]
    fn last_sent(&self, flow: &Flow) -> Option<u64> {
        flows::last_noted(self, flow)
    }
}

/// A bucket of those beside the policy. The compiler may know the bound and leave the mask out; the
/// verifier, which does not, is shown it.
#[inline(always)]
fn bucket_in(buckets: &[Bucket; INLINE_BUCKETS], index: u32) -> &Bucket {
    let mut place = index as u64;
    // SAFETY: arithmetic on the function's own variable, which is then less than the mask's next.
    unsafe {
        asm!("{0} &= {1}", inout(reg) place, const INLINE_BUCKETS - 1,
            options(pure, nomem, nostack, preserves_flags));
        buckets.get_unchecked(place as usize)
    }
}

/// A guard that judges with hardly a call: filtered or conntrack mode, a short allowlist and no limits.
/// In a program's straight line a call costs more than the rest of the verdict.
pub struct StraightGuard<'a> {
    whole: &'a KernelGuard,
    policy: &'a Policy,
    buckets: &'a [Bucket; INLINE_BUCKETS],
}

impl KernelGuard {
    /// `None` where a judgement may need calls.
    #[inline(always)]
    pub fn straight(&self) -> Option<StraightGuard<'_>> {
        let Slot { policy, buckets } = self.slot();
        let limited = |meter: Meter| !policy.rates[meter as usize].is_unlimited();
        if (policy.mode != Mode::Filtered as u32 && policy.mode != Mode::Conntrack as u32)
            || policy.table_mask >= INLINE_BUCKETS as u32
            || limited(Meter::EgressPackets)
            || limited(Meter::EgressBytes)
            || limited(Meter::IngressPackets)
            || limited(Meter::IngressBytes)
        {
            return None;
        }
        Some(StraightGuard {
            whole: self,
            policy,
            buckets,
        })
    }
}

impl Guard for StraightGuard<'_> {
    #[inline(always)]
    fn policy(&self) -> Option<&Policy> {
        Some(self.policy)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        Some(bucket_in(self.buckets, index))
    }

    #[inline(always)]
    fn owns(&self, policy: &Policy, address: Address) -> bool {
        let (high, low) = address.words();
        let mut place = 0;
        while place < MAX_ADDRESSES {
            let (owned_high, owned_low) = policy.addresses[place].words();
            if low == owned_low && high == owned_high {
                return !address.is_unspecified();
            }
            place += 1;
        }
        false
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        self.whole.now()
    }

    #[inline(always)]
    fn lease_until(&self) -> u64 {
        self.whole.lease_until()
    }

    #[inline(always)]
    fn take(&self, _meter: Meter, rate: Rate, _units: u32) -> bool {
        rate.is_unlimited()
    }

    #[inline(always)]
    fn put_back(&self, _meter: Meter, _rate: Rate, _units: u32) {}

    /// Whether the flow was known; one that is not is for the general way to open.
    #[inline(always)]
    fn open_flow(&self, flow: &Flow) -> bool {
        self.whole.holds() && flows::refresh(self.whole, flow)
    }

    #[inline(always)]
    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        flows::seen(self.whole, flow)
    }

    #[inline(always)]
    fn note_sent(&self, flow: &Flow) {
        flows::note(self.whole, flow);
    }

    /// Errors go the general way.
    #[inline(always)]
    fn last_sent(&self, _flow: &Flow) -> Option<u64> {
        None
    }
}

// The verifier judges each of these functions once and for itself: see `main`. Numbers stand for
// what is not theirs to hold, and the slot for the policy, so that all see the same one.

/// 1 where the guest owns the address, by the policy in the slot of that number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn guest_owns(number: u32, high: u64, low: u64) -> u32 {
    match KernelGuard::of_number(number) {
        Some(guard) => guard.slot().policy.owns(Address::from_words(high, low)) as u32,
        None => 0,
    }
}

/// [`AddressClass`] of an address.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn address_class(high: u64, low: u64) -> u32 {
    AddressClass::of(Address::from_words(high, low)).bits()
}

/// 1 where the allowlist of the policy in the slot of that number holds the endpoint.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn allowlist_holds(number: u32, high: u64, low: u64, service: u32) -> u32 {
    let address = Address::from_words(high, low);
    match KernelGuard::of_number(number) {
        Some(guard) => table_holds(&guard, &guard.slot().policy, address, service) as u32,
        None => 0,
    }
}

/// 1 where `units` could be taken from the bucket of `meter` of the guard in `place`, at the rate of the
/// policy of `generation`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn take_units(generation: u64, place: u32, meter: u32, units: u32) -> u32 {
    match KernelGuard::of(place, generation) {
        Some(guard) => guard.take_at_its_rate(meter, units) as u32,
        None => 0,
    }
}

/// Gives back to the bucket of `meter` what [`take_units`] took from it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn put_back_units(generation: u64, place: u32, meter: u32, units: u32) -> u32 {
    if let Some(guard) = KernelGuard::of(place, generation) {
        guard.put_back_at_its_rate(meter, units);
    }
    0
}

/// Whether an event of the guard in `place` may be told, by the policy in force.
#[inline(always)]
pub fn may_tell(place: u32, is_violation: bool) -> bool {
    let meter = if is_violation {
        Meter::Violations
    } else {
        Meter::Events
    };
    // A guard without policy has no rate, and nobody who reads.
    let Some(guard) = KernelGuard::read(place) else {
        return false;
    };
    let rate = guard.slot().policy.rates[meter as usize];
    rate.is_unlimited() || guard.take_at_its_rate(meter as u32, 1)
}

impl KernelGuard {
    /// The policy and allowlist of `generation` of the guard in `place`.
    #[inline(always)]
    fn of(place: u32, generation: u64) -> Option<Self> {
        Some(Self {
            place,
            state: state_at(place)?,
            generation,
        })
    }

    /// The bucket of `meter` and its rate; `None` where the policy has changed: a rate that is being written
    /// must not set the bucket.
    #[inline(always)]
    fn metered(&self, meter: u32) -> Option<(*mut u64, Rate)> {
        let live = live_at(self.place)?;
        // The compiler may know the bound and leave the comparison out; the verifier does not.
        // SAFETY: the variable is this function's own.
        let meter = unsafe { core::ptr::read_volatile(&raw const meter) };
        let rate = self.slot().policy.rates.get(meter as usize).copied()?;
        // SAFETY: an array map's element lives as long as the map, and there are as many buckets as rates.
        let word = unsafe { (&raw mut (*live).meters).cast::<u64>().add(meter as usize) };
        self.holds().then_some((word, rate))
    }

    #[inline(always)]
    fn put_back_at_its_rate(&self, meter: u32, units: u32) {
        if let Some((word, rate)) = self.metered(meter) {
            // SAFETY: an array map's element is aligned and lives as long as the map.
            unsafe { atomic_xsub::<u64, u64, RELAXED>(word, rate.time_of(units)) };
        }
    }

    #[inline(always)]
    fn take_at_its_rate(&self, meter: u32, units: u32) -> bool {
        let Some((word, rate)) = self.metered(meter) else {
            return false;
        };
        let now = self.now();
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
}

#[inline(always)]
fn fixed() -> FixedInputs {
    // SAFETY: the constant is this program's own; the read is volatile because the loader may have
    // replaced the value that the compiler saw.
    unsafe { core::ptr::read_volatile(&raw const FIXED) }
}

/// `CLOCK_MONOTONIC` as of the last tick or the one before, 1 to 20 ms ago: reading the clock itself
/// costs as much as the rest of a verdict, and what is timed here lasts longer. It is asked for once
/// in a tick; until the next one, what was told then is what would be told.
#[inline(always)]
fn now_of(state: *mut State) -> u64 {
    let fixed = fixed_now();
    if fixed != 0 {
        return fixed;
    }
    let tick = tick();
    // SAFETY: an array map's element lives as long as the map; these are aligned words, written in
    // the other order than they are read.
    unsafe {
        if (&raw const (*state).tick).read_volatile() == tick {
            keep_order();
            return (&raw const (*state).tick_ns).read_volatile();
        }
        let now = bpf_ktime_get_coarse_ns();
        (&raw mut (*state).tick_ns).write_volatile(now);
        keep_order();
        (&raw mut (*state).tick).write_volatile(tick);
        now
    }
}

/// The kernel's tick. (On 64 bits it is no call.)
#[inline(always)]
pub fn tick() -> u64 {
    match fixed_now() {
        // SAFETY: the helper takes no arguments and has no preconditions.
        0 => unsafe { bpf_jiffies64() },
        now => now,
    }
}

/// The time at a tick that was not long ago, as the clock of a guard tells it that says `now`.
#[inline(always)]
pub fn time_of(then: u64, now: u64) -> u64 {
    let length = match fixed_now() {
        // SAFETY: as in [`fixed`].
        0 => unsafe { core::ptr::read_volatile(&raw const TICK_NS) },
        _ => 1,
    };
    now.saturating_sub(tick().saturating_sub(then).wrapping_mul(length))
}

/// `FIXED`'s time, or 0.
#[inline(always)]
fn fixed_now() -> u64 {
    // SAFETY: as in [`fixed`].
    unsafe { core::ptr::read_volatile(&raw const FIXED.now_ns) }
}
