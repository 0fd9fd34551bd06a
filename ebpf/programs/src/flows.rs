//! The guest's flows. Conntrack mode has a fixed number of them, and a flow that lives is never given
//! up for another: beyond the quota new ones are refused until one has timed out. The other modes only
//! remember flows for the errors that quote them, and forget one for another.

use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap},
};
use omerta_verdict::{Flow, SENT_FLOWS, SentFlow};

use crate::state::{full_barrier, generation, keep_order, now, tick, time_of};

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

/// What the guest sent on outside of conntrack mode, each flow at its place by [`SentFlow::place_and_check`].
#[unsafe(no_mangle)]
static mut SENT: [SentFlow; SENT_FLOWS] = [SentFlow::NONE; SENT_FLOWS];

const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
/// Places that one new flow looks at.
const LOOKS: u32 = 4;

/// No flow was ever seen then.
const NEVER: u64 = u64::MAX;

/// When the guest last sent on `flow`. Asked by a function of its own, which has the stack for a key.
#[inline(always)]
pub fn last_seen(flow: &Flow) -> Option<u64> {
    let [peer_high, peer_low, high, low, rest] = flow.words();
    match flow_seen(peer_high, peer_low, high, low, rest) {
        NEVER => None,
        seen => Some(seen),
    }
}

/// [`last_seen`] of the flow of these [`Flow::words`], or [`NEVER`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_seen(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u64 {
    seen(&Flow::from_words([peer_high, peer_low, high, low, rest])).unwrap_or(NEVER)
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

/// As [`refresh`], and opens a flow that is not known, by the policy of `generation`; false where there
/// is no room for one more.
#[inline(always)]
pub fn open(flow: &Flow, generation: u64, now: u64) -> bool {
    if refresh(flow, now) {
        return true;
    }
    let [peer_high, peer_low, high, low, rest] = flow.words();
    let rest = rest | (generation as u16 as u64) << 16;
    open_new(peer_high, peer_low, high, low, rest) == 1
}

/// 1 where the flow of these [`Flow::words`] found a place. The verifier judges this function once and
/// for itself. The second 16 bits of `rest` are the lowest of the policy's generation: a function takes
/// no sixth argument.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn open_new(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u32 {
    let flow = Flow::from_words([peer_high, peer_low, high, low, rest]);
    if !place(&flow) {
        return 0;
    }
    full_barrier();
    // A commit first removes the flows that the policy before it did not allow. One that is entered
    // after that, by an older policy, goes here; its frame is judged anew.
    if generation() as u16 != (rest >> 16) as u16 {
        let key = &flow;
        let _ = FLOWS.remove(key);
        return 0;
    }
    1
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

/// Remembers that the guest sends on `flow` now, by the policy of `generation`.
#[inline(always)]
pub fn note(flow: &Flow, generation: u64) {
    let tick = tick();
    let (place, check) = SentFlow::place_and_check(flow, tick, generation);
    let entry = sent(place);
    // SAFETY: the element lives as long as the program, and this is an aligned word.
    if unsafe { (&raw const (*entry).check).read_volatile() } == check {
        return;
    }
    let (words, flow) = (entry.cast::<u64>(), flow.words());
    let mut word = 0;
    while word < flow.len() {
        // SAFETY: the element starts with as many words. Where two CPUs write one it may become a
        // mixture of two flows that this guest sent on. The generation comes last, so that what it
        // vouches for was written under it.
        unsafe { words.add(word).write_volatile(flow[word]) };
        word += 1;
    }
    // SAFETY: as above.
    unsafe {
        (&raw mut (*entry).tick).write_volatile(tick);
        (&raw mut (*entry).check).write_volatile(check);
        keep_order();
        (&raw mut (*entry).generation).write_volatile(generation);
    }
}

#[inline(always)]
fn sent(place: usize) -> *mut SentFlow {
    // SAFETY: each place is less than the number of elements.
    unsafe { (&raw mut SENT).cast::<SentFlow>().add(place) }
}

/// [`note`] by the policy in force. Where that is a later one than the frame was judged by, the frame
/// is judged anew by it, as is each error.
#[inline(always)]
pub fn note_apart(flow: &Flow) {
    let [peer_high, peer_low, high, low, rest] = flow.words();
    note_flow(peer_high, peer_low, high, low, rest);
}

/// [`note_apart`] of the flow of these [`Flow::words`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn note_flow(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u32 {
    let flow = Flow::from_words([peer_high, peer_low, high, low, rest]);
    note(&flow, generation());
    0
}

/// When the guest last sent on `flow`, as [`note`] has it of the policy in force.
#[inline(always)]
pub fn last_noted(flow: &Flow) -> Option<u64> {
    let [peer_high, peer_low, high, low, rest] = flow.words();
    match flow_noted(peer_high, peer_low, high, low, rest) {
        NEVER => None,
        seen => Some(seen),
    }
}

/// [`last_noted`] of the flow of these [`Flow::words`], or [`NEVER`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_noted(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u64 {
    let flow = Flow::from_words([peer_high, peer_low, high, low, rest]);
    let generation = generation();
    let (place, _) = SentFlow::place_and_check(&flow, 0, generation);
    let entry = sent(place);
    // SAFETY: as in [`note`].
    if unsafe { (&raw const (*entry).generation).read_volatile() } != generation {
        return NEVER;
    }
    keep_order();
    let (words, flow) = (entry.cast::<u64>(), flow.words());
    let mut word = 0;
    while word < flow.len() {
        // SAFETY: as in [`note`].
        if unsafe { words.add(word).read_volatile() } != flow[word] {
            return NEVER;
        }
        word += 1;
    }
    // SAFETY: as in [`note`].
    time_of(unsafe { (&raw const (*entry).tick).read_volatile() })
}
