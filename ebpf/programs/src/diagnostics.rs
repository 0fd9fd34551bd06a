//! What fails in the programs themselves, told by aya-log as three numbers: the guard's place, the
//! failure's and the helper's error. (Words, in a line for each, are thousands of instructions to
//! verify.) Frames that are allowed never come here.
//!
//! A guest may bring about as many failures as it likes: of each kind one in [`PERIOD_NS`] is told of a
//! guard, whatever the policy's rate of events.

use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_log_ebpf::warn;
use omerta_verdict::Failure;

use crate::state::live_at;

const PERIOD_NS: u64 = 10_000_000_000;
const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;

#[inline(always)]
pub fn tell(place: u32, failure: Failure, error: i64) {
    tell_failure(place, failure as u32, error);
}

/// The verifier judges this function once and for itself: see `main`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tell_failure(place: u32, failure: u32, error: i64) -> u32 {
    if !is_due(place, failure) {
        return 0;
    }
    warn!((), "{} {} {}", place, failure, error);
    1
}

/// Whether it is time to tell of `failure` again. The CPU that writes the time is the one to tell.
#[inline(always)]
fn is_due(place: u32, failure: u32) -> bool {
    let Some(live) = live_at(place) else {
        return false;
    };
    // The compiler may know the bound and leave the comparison out; the verifier does not.
    // SAFETY: the variable is this function's own.
    let failure = unsafe { core::ptr::read_volatile(&raw const failure) } as usize;
    if failure >= Failure::ALL.len() {
        return false;
    }
    // SAFETY: an array map's element lives as long as the map, and the index is within.
    let word = unsafe { (&raw mut (*live).told).cast::<u64>().add(failure) };
    // SAFETY: the helper takes no arguments and has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: an array map's element is aligned and lives as long as the map.
    let told = unsafe { word.read_volatile() };
    if told != 0 && now.wrapping_sub(told) < PERIOD_NS {
        return false;
    }
    // SAFETY: as above; programs change the element in this way only.
    unsafe { atomic_cxchg::<u64, RELAXED, RELAXED>(word, told, now) }.1
}
