//! The guest's flows. Conntrack mode has a fixed number of them, and a flow that lives is never given
//! up for another: beyond the quota new ones are refused until one has timed out. The other modes only
//! remember flows for the errors that quote them, and forget one for another.

use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use aya_ebpf::{
    btf_maps::{self, ArrayOfMaps},
    macros::btf_map,
};
use omerta_verdict::{FLOWS as QUOTA, Flow, GUARDS, Guard, SentFlow};

use crate::state::{KernelGuard, full_barrier, keep_order, live_at, tick, time_of};

/// When the guest last sent on each flow, nanoseconds of `CLOCK_MONOTONIC`. The size is the quota. A guard
/// that was not made for conntrack mode has none.
#[btf_map]
static FLOWS: ArrayOfMaps<FlowTable, GUARDS> = ArrayOfMaps::new();
type FlowTable = btf_maps::HashMap<Flow, u64, { QUOTA as usize }>;

/// As many places as flows, each with the flow that was opened there last: where those that have timed
/// out are found again. All zero is no flow.
#[btf_map]
static FLOW_PLACES: ArrayOfMaps<btf_maps::Array<[u64; 5], { QUOTA as usize }>, GUARDS> =
    ArrayOfMaps::new();
const _: () = assert!(size_of::<Flow>() == size_of::<[u64; 5]>());

const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;
/// Places that one new flow looks at.
const LOOKS: u32 = 4;

/// No flow was ever seen then.
const NEVER: u64 = u64::MAX;

// Functions of their own have the stack for a key. They take no sixth argument, so what belongs to the
// guard travels in bits of the last of a flow's words that are zero: its place above the protocol, of
// which there are five bits, and the lowest bits of its policy's generation above that.
const PLACE_SHIFT: u32 = 5;
const GENERATION_SHIFT: u32 = 16;
const _: () = assert!(GUARDS == 1 << (GENERATION_SHIFT - PLACE_SHIFT));

/// [`Flow::words`], the last of which names the guard and its generation.
#[inline(always)]
fn words_with(guard: &KernelGuard, flow: &Flow) -> [u64; 5] {
    let mut words = flow.words();
    words[4] |= (guard.place() as u64) << PLACE_SHIFT
        | (guard.generation() as u16 as u64) << GENERATION_SHIFT;
    words
}

/// The flow and its guard's place; the reverse of [`words_with`].
#[inline(always)]
fn flow_and_place(mut words: [u64; 5]) -> (Flow, u32) {
    let place = (words[4] as u16) >> PLACE_SHIFT;
    words[4] &= !0xffff_ffff | ((1 << PLACE_SHIFT) - 1);
    (Flow::from_words(words), place as u32)
}

/// When the guest last sent on `flow`.
#[inline(always)]
pub fn last_seen(guard: &KernelGuard, flow: &Flow) -> Option<u64> {
    let [peer_high, peer_low, high, low, rest] = words_with(guard, flow);
    match flow_seen(peer_high, peer_low, high, low, rest) {
        NEVER => None,
        seen => Some(seen),
    }
}

/// [`last_seen`] of what [`words_with`] says, or [`NEVER`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_seen(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u64 {
    let (flow, place) = flow_and_place([peer_high, peer_low, high, low, rest]);
    seen_in(FLOWS.get(place), &flow).unwrap_or(NEVER)
}

#[inline(always)]
pub fn seen(guard: &KernelGuard, flow: &Flow) -> Option<u64> {
    seen_in(FLOWS.get(guard.place()), flow)
}

#[inline(always)]
fn seen_in(table: Option<&FlowTable>, flow: &Flow) -> Option<u64> {
    // SAFETY: the value is one aligned word that other CPUs write whole.
    table?
        .get_ptr(flow)
        .map(|seen| unsafe { seen.read_volatile() })
}

/// Remembers that the guest sends on `flow` now; false where nothing is known of the flow.
#[inline(always)]
pub fn refresh(guard: &KernelGuard, flow: &Flow) -> bool {
    let Some(seen) = FLOWS
        .get(guard.place())
        .and_then(|table| table.get_ptr_mut(flow))
    else {
        return false;
    };
    // SAFETY: one aligned word. An entry that is being given to another flow of the same guest
    // meanwhile is one that this guest sends on now, too.
    unsafe { seen.write_volatile(guard.now()) };
    true
}

/// As [`refresh`], and opens a flow that is not known, by the guard's policy; false where there is no
/// room for one more.
#[inline(always)]
pub fn open(guard: &KernelGuard, flow: &Flow) -> bool {
    if refresh(guard, flow) {
        return true;
    }
    let [peer_high, peer_low, high, low, rest] = words_with(guard, flow);
    open_new(peer_high, peer_low, high, low, rest) == 1
}

/// 1 where the flow of what [`words_with`] says found a place. The verifier judges this function once and
/// for itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn open_new(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u32 {
    let (flow, guard) = flow_and_place([peer_high, peer_low, high, low, rest]);
    let Some(table) = FLOWS.get(guard) else {
        return 0;
    };
    if !place(guard, table, &flow) {
        return 0;
    }
    full_barrier();
    // A commit first removes the flows that the policy before it did not allow. One that is entered
    // after that, by an older policy, goes here; its frame is judged anew.
    let is_by_this_policy = KernelGuard::read(guard)
        .is_some_and(|now| now.generation() as u16 == (rest >> GENERATION_SHIFT) as u16);
    if !is_by_this_policy {
        let key = &flow;
        let _ = table.remove(key);
        return 0;
    }
    1
}

#[inline(always)]
fn place(guard: u32, table: &FlowTable, flow: &Flow) -> bool {
    let (Some(live), Some(state)) = (live_at(guard), KernelGuard::read(guard)) else {
        return false;
    };
    // SAFETY: an array map's element is aligned and lives as long as the map.
    let hand = unsafe { &raw mut (*live).flow_hand };
    let now = state.now();
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
        let index = at as u32 & (QUOTA - 1);
        let Some(place) = FLOW_PLACES.get_value_ptr_mut(guard, &index) else {
            return false;
        };
        let place: *mut Flow = place.cast();
        // SAFETY: the element lives as long as the map; the CPU that moved the hand to it is the one
        // that reads and writes it, until the hand has gone round.
        let old = unsafe { *place };
        if old.protocol != 0
            && let Some(seen) = seen_in(Some(table), &old)
        {
            if old.is_live(seen, now) {
                continue;
            }
            let key = &old;
            let _ = table.remove(key);
        }
        // SAFETY: as above.
        unsafe { *place = *flow };
        return table.insert(flow, now, 0).is_ok();
    }
    false
}

/// Remembers that the guest sends on `flow` now, by the guard's policy.
#[inline(always)]
pub fn note(guard: &KernelGuard, flow: &Flow) {
    let (tick, generation) = (tick(), guard.generation());
    let (place, check) = SentFlow::place_and_check(flow, tick, generation);
    let Some(entry) = sent(guard.place(), place) else {
        return;
    };
    // SAFETY: an array map's element lives as long as the map, and this is an aligned word.
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

/// The element of the guard in `guard` that is at `place`, by [`SentFlow::place_and_check`].
#[inline(always)]
fn sent(guard: u32, place: usize) -> Option<*mut SentFlow> {
    let live = live_at(guard)?;
    // SAFETY: each place is less than the number of elements.
    Some(unsafe { (&raw mut (*live).sent).cast::<SentFlow>().add(place) })
}

/// [`note`] by the policy in force. Where that is a later one than the frame was judged by, the frame
/// is judged anew by it, as is each error.
#[inline(always)]
pub fn note_apart(guard: &KernelGuard, flow: &Flow) {
    let [peer_high, peer_low, high, low, rest] = words_with(guard, flow);
    note_flow(peer_high, peer_low, high, low, rest);
}

/// [`note_apart`] of what [`words_with`] says.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn note_flow(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u32 {
    let (flow, place) = flow_and_place([peer_high, peer_low, high, low, rest]);
    if let Some(guard) = KernelGuard::read(place) {
        note(&guard, &flow);
    }
    0
}

/// When the guest last sent on `flow`, as [`note`] has it of the policy in force.
#[inline(always)]
pub fn last_noted(guard: &KernelGuard, flow: &Flow) -> Option<u64> {
    let [peer_high, peer_low, high, low, rest] = words_with(guard, flow);
    match flow_noted(peer_high, peer_low, high, low, rest) {
        NEVER => None,
        seen => Some(seen),
    }
}

/// [`last_noted`] of what [`words_with`] says, or [`NEVER`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn flow_noted(peer_high: u64, peer_low: u64, high: u64, low: u64, rest: u64) -> u64 {
    let (flow, guard) = flow_and_place([peer_high, peer_low, high, low, rest]);
    let Some(guard) = KernelGuard::read(guard) else {
        return NEVER;
    };
    let generation = guard.generation();
    let (place, _) = SentFlow::place_and_check(&flow, 0, generation);
    let Some(entry) = sent(guard.place(), place) else {
        return NEVER;
    };
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
    let then = unsafe { (&raw const (*entry).tick).read_volatile() };
    time_of(then, guard.now())
}
