//! Conntrack mode: the flows that the guest opened, of which it has a fixed number. A flow that lives
//! is never given up for another: beyond the quota new ones are refused until one has timed out.

use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap},
};
use omerta_verdict::{Address, Flow};

use crate::state::now;

/// When the guest last sent on each flow, nanoseconds of `CLOCK_MONOTONIC`. Userspace sets the size,
/// which is the quota, at load.
#[map]
static FLOWS: HashMap<Flow, u64> = HashMap::with_max_entries(1, 0);

/// As many places as flows, each with the flow that was opened there last: where those that have timed
/// out are found again. All zero is no flow.
#[map]
static FLOW_PLACES: Array<Flow> = Array::with_max_entries(1, 0);

/// How many places have been looked at so far: the next one to look at.
#[map]
static FLOW_HAND: Array<u64> = Array::with_max_entries(1, 0);

/// The number of places, a power of two, less one. Set at load.
#[unsafe(no_mangle)]
static FLOW_MASK: u32 = 0;

const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
/// Places that one new flow looks at.
const LOOKS: u32 = 4;

/// When the guest last sent on `flow`. Asked by a function of its own, which has the stack for a key.
#[inline(always)]
pub fn last_seen(flow: &Flow) -> Option<u64> {
    let ((peer_high, peer_low), (high, low), rest) = numbers(flow);
    match flow_seen(peer_high, peer_low, high, low, rest) {
        NEVER => None,
        seen => Some(seen),
    }
}

/// No flow was ever seen then.
const NEVER: u64 = u64::MAX;

/// [`last_seen`] of the flow of these [`numbers`], or [`NEVER`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_seen(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u64 {
    seen(&of_numbers(peer_high, peer_low, high, low, rest)).unwrap_or(NEVER)
}

/// A flow as numbers: the peer's address, the guest's, and ports with the protocol.
#[inline(always)]
fn numbers(flow: &Flow) -> ((u64, u64), (u64, u64), u64) {
    let rest =
        (flow.peer_port as u64) << 48 | (flow.guest_port as u64) << 32 | flow.protocol as u64;
    (flow.peer.words(), flow.guest.words(), rest)
}

#[inline(always)]
fn of_numbers(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> Flow {
    Flow {
        peer: Address::from_words(peer_high, peer_low),
        guest: Address::from_words(high, low),
        peer_port: (rest >> 48) as u16,
        guest_port: (rest >> 32) as u16,
        protocol: rest as u16,
        zero: 0,
    }
}

#[inline(always)]
pub fn seen(flow: &Flow) -> Option<u64> {
    // SAFETY: the value is one aligned word that other CPUs write whole.
    unsafe { FLOWS.get_ptr(flow).map(|seen| seen.read_volatile()) }
}

/// Remembers that the guest sends on `flow` now; false where nothing is known of the flow.
#[inline(always)]
pub fn refresh(flow: &Flow, now: u64) -> bool {
    let Some(seen) = FLOWS.get_ptr_mut(flow) else {
        return false;
    };
    // SAFETY: one aligned word. An entry that is being given to another flow of the same guest
    // meanwhile is one that this guest sends on now, too.
    unsafe { seen.write_volatile(now) };
    true
}

/// As [`refresh`], and opens a flow that is not known; false where there is no room for one more.
#[inline(always)]
pub fn open(flow: &Flow, now: u64) -> bool {
    if refresh(flow, now) {
        return true;
    }
    let ((peer_high, peer_low), (high, low), rest) = numbers(flow);
    open_new(peer_high, peer_low, high, low, rest) == 1
}

/// 1 where the flow found a place. The verifier judges this function once and for itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn open_new(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u32 {
    place(&of_numbers(peer_high, peer_low, high, low, rest)) as u32
}

#[inline(always)]
fn place(flow: &Flow) -> bool {
    let Some(hand) = FLOW_HAND.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the constant is this program's own; the read is volatile because the loader has
    // replaced the value that the compiler saw.
    let mask = unsafe { core::ptr::read_volatile(&raw const FLOW_MASK) } as u64;
    let now = now();
    let mut look = 0;
    while look < LOOKS {
        look += 1;
        // SAFETY: an array map's element is aligned and lives as long as the map.
        let at = unsafe { hand.read_volatile() };
        // SAFETY: as above; programs change the element in this way only.
        let (_, taken) = unsafe { atomic_cxchg::<u64, RELAXED, RELAXED>(hand, at, at + 1) };
        // Another CPU looks there.
        if !taken {
            continue;
        }
        let Some(place) = FLOW_PLACES.get_ptr_mut((at & mask) as u32) else {
            return false;
        };
        // SAFETY: the element lives as long as the map; the CPU that moved the hand to it is the one
        // that reads and writes it, until the hand has gone round.
        let old = unsafe { *place };
        if old.protocol != 0
            && let Some(seen) = seen(&old)
        {
            if old.is_live(seen, now) {
                continue;
            }
            let key = &old;
            let _ = FLOWS.remove(key);
        }
        // SAFETY: as above.
        unsafe { *place = *flow };
        return FLOWS.insert(flow, now, 0).is_ok();
    }
    false
}
