//! Counters and events.

use aya_ebpf::{
    btf_maps::{self, ArrayOfMaps},
    helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    macros::{btf_map, map},
    maps::PerCpuArray,
    programs::TcContext,
};
use omerta_verdict::{
    COUNTER_ROWS, DIRECTION_COUNTERS, Direction, EVENT_FRAME_BYTES, EventRecord, Failure, GUARDS,
    LOST_ROW, Reason,
};

use crate::diagnostics::tell;
use crate::state::{may_tell, place_of};

#[repr(C)]
pub struct Count {
    packets: u64,
    bytes: u64,
}

/// Per CPU: each direction's counters, by `Outcome::index` and what follows them; then the dropped frames
/// of which no event tells, by [`Lost`].
#[btf_map]
static COUNTERS: ArrayOfMaps<btf_maps::PerCpuArray<RowWords, COUNTER_ROWS>, GUARDS> =
    ArrayOfMaps::new();
type Row = [Count; DIRECTION_COUNTERS];
type RowWords = [u64; size_of::<Row>() / size_of::<u64>()];

/// Dropped frames, newest lost where the reader is too slow. Userspace makes rings of any size.
#[btf_map]
static EVENTS: ArrayOfMaps<btf_maps::RingBuf<EventRecord, 4096>, GUARDS> = ArrayOfMaps::new();

/// Per CPU: what came from or for taps whose guards are gone from their places. It is dropped.
#[map]
static UNGUARDED: PerCpuArray<Count> = PerCpuArray::with_max_entries(1, 0);

/// Why no event tells of a dropped frame.
#[derive(Clone, Copy)]
enum Lost {
    /// The reader is too slow.
    RingFull = 0,
    /// The guard's rate of events was used up.
    RateLimited = 1,
}

/// One direction's counters of this CPU.
#[derive(Clone, Copy)]
pub struct Counters(*mut Row);

impl Counters {
    /// Those of the guard in `place`.
    #[inline(always)]
    pub fn of(place: u32, direction: Direction) -> Option<Self> {
        let row = COUNTERS.get_value_ptr_mut(place, &(direction as u32))?;
        Some(Self(row.cast()))
    }

    #[inline(always)]
    pub fn count(self, counter: u32, length: u32) {
        // The compiler may know the bound and leave the comparison out, but the verifier, which
        // judges each function for itself, does not.
        // SAFETY: the variable is this function's own.
        let counter = unsafe { core::ptr::read_volatile(&raw const counter) };
        if (counter as usize) < DIRECTION_COUNTERS {
            // SAFETY: the element is this CPU's own, programs do not preempt one another on a CPU
            // while the network stack runs them (bottom halves are off), and the index is within.
            add(unsafe { &raw mut (*self.0)[counter as usize] }, length);
        }
    }
}

#[inline(always)]
fn add(count: *mut Count, length: u32) {
    // SAFETY: `count` points to an element of a map, this CPU's own.
    unsafe {
        (*count).packets += 1;
        (*count).bytes += length as u64;
    }
}

#[inline(always)]
fn lost(place: u32, why: Lost, length: u32) {
    let row = LOST_ROW;
    if let Some(row) = COUNTERS.get_value_ptr_mut(place, &row) {
        // SAFETY: a row has more counters than there are causes.
        add(unsafe { row.cast::<Count>().add(why as usize) }, length);
    }
}

/// Counts a frame of a tap whose guard is not in its place.
#[inline(always)]
pub fn count_unguarded(length: u32) {
    if let Some(count) = UNGUARDED.get_ptr_mut(0) {
        add(count, length);
    }
}

#[inline(always)]
pub fn report(context: &TcContext, direction: Direction, reason: u8, length: u32) {
    let place = place_of(context.skb.skb);
    let is_violation =
        matches!(direction, Direction::Egress) && Reason::VIOLATIONS >> (reason & 63) & 1 == 1;
    if !may_tell(place, is_violation) {
        lost(place, Lost::RateLimited, length);
        return;
    }
    let Some(mut entry) = EVENTS.get(place).and_then(|ring| ring.reserve(0)) else {
        lost(place, Lost::RingFull, length);
        tell(place, Failure::EventRing, 0);
        return;
    };
    let record = entry.as_mut_ptr();
    let wanted = if length < EVENT_FRAME_BYTES as u32 {
        length
    } else {
        EVENT_FRAME_BYTES as u32
    };
    // SAFETY: `record` points to reserved ring memory of an `EventRecord`'s size; each field is
    // written before it is submitted. The helper writes at most `EVENT_FRAME_BYTES` bytes, all
    // within `frame`. The context's socket buffer is valid for the whole run.
    unsafe {
        (*record).at_ns = bpf_ktime_get_ns();
        (*record).ifindex = (*context.skb.skb).ifindex;
        (*record).length = length;
        (*record).direction = direction as u8;
        (*record).reason = reason;
        (*record).padding = 0;
        (*record).frame = [0; EVENT_FRAME_BYTES];
        (*record).captured = captured(context, &raw mut (*record).frame, wanted as u64);
    }
    entry.submit(0);
}

/// Fills `frame` with the first `wanted` bytes; how many these are, 0 where they could not be read.
///
/// # Safety
///
/// `frame` points to valid memory.
#[inline(always)]
unsafe fn captured(context: &TcContext, frame: *mut [u8; EVENT_FRAME_BYTES], wanted: u64) -> u16 {
    // Linux 6.1 and older do not learn from `wanted == 0` that it is 1 at least, so both bounds are
    // one comparison, of one less. The compiler would make two of it again, had it not to read the
    // value back from the stack.
    let last = wanted.wrapping_sub(1);
    // SAFETY: the variable is this function's own.
    let last = unsafe { core::ptr::read_volatile(&raw const last) };
    if last >= EVENT_FRAME_BYTES as u64 {
        return 0;
    }
    let wanted = last + 1;
    // SAFETY: the helper writes at most `EVENT_FRAME_BYTES` bytes, all within `frame`; the
    // context's socket buffer is valid for the whole run.
    match unsafe { bpf_skb_load_bytes(context.skb.skb.cast(), 0, frame.cast(), wanted as u32) } {
        0 => wanted as u16,
        _ => 0,
    }
}
