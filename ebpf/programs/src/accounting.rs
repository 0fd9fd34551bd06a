//! Counters and events.

use aya_ebpf::{
    helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    macros::map,
    maps::{PerCpuArray, RingBuf},
    programs::TcContext,
};
use omerta_verdict::{Direction, EVENT_FRAME_BYTES, EventRecord, Outcome, Reason};

#[repr(C)]
pub struct Count {
    packets: u64,
    bytes: u64,
}

/// Per CPU: each direction's outcomes by [`Outcome::index`].
#[map]
static COUNTERS: PerCpuArray<Count> = PerCpuArray::with_max_entries(2 * Outcome::COUNT as u32, 0);

/// Dropped frames, newest lost where the reader is too slow.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(32 * 1024, 0);

/// Per CPU: events that did not fit the ring (`packets`), and their bytes.
#[map]
static LOST: PerCpuArray<Count> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
pub fn count(direction: Direction, outcome: Outcome, length: u32) {
    add(
        &COUNTERS,
        direction as u32 * Outcome::COUNT as u32 + outcome.index() as u32,
        length,
    );
}

#[inline(always)]
fn add(counters: &PerCpuArray<Count>, index: u32, length: u32) {
    if let Some(count) = counters.get_ptr_mut(index) {
        // SAFETY: the element is this CPU's own, and programs do not preempt one another on a
        // CPU while the network stack runs them (bottom halves are off).
        unsafe {
            (*count).packets += 1;
            (*count).bytes += length as u64;
        }
    }
}

#[inline(always)]
pub fn report(context: &TcContext, direction: Direction, reason: Reason, length: u32) {
    let Some(mut entry) = EVENTS.reserve::<EventRecord>(0) else {
        add(&LOST, 0, length);
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
        (*record).reason = reason as u8;
        (*record).padding = 0;
        (*record).frame = [0; EVENT_FRAME_BYTES];
        let read = wanted > 0
            && wanted <= EVENT_FRAME_BYTES as u32
            && bpf_skb_load_bytes(
                context.skb.skb.cast(),
                0,
                (&raw mut (*record).frame).cast(),
                wanted,
            ) == 0;
        (*record).captured = if read { wanted as u16 } else { 0 };
    }
    entry.submit(0);
}
