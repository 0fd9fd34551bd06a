//! What fails in the programs themselves, told by aya-log as two numbers: the failure's and the
//! helper's error. (Words, in a line for each, are thousands of instructions to verify.) Frames that
//! are allowed never come here.

use core::intrinsics::{AtomicOrdering, atomic_cxchg};

use aya_ebpf::{helpers::bpf_ktime_get_ns, macros::map, maps::Array};
use aya_log_ebpf::warn;
use omerta_verdict::Failure;

/// When each failure was told last, nanoseconds of `CLOCK_MONOTONIC`. A guest may bring about as many
/// as it likes: of each, one in [`PERIOD_NS`] is told, whatever the policy's rate of events.
#[map]
static TOLD: Array<u64> = Array::with_max_entries(Failure::ALL.len() as u32, 0);

const PERIOD_NS: u64 = 10_000_000_000;
const RELAXED: AtomicOrdering = AtomicOrdering::Relaxed;

#[inline(always)]
pub fn tell(failure: Failure, error: i64) {
    tell_failure(failure as u32, error);
}

/// The verifier judges this function once and for itself: see `main`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tell_failure(failure: u32, error: i64) -> u32 {
    if !is_due(failure) {
        return 0;
    }
    warn!((), "{} {}", failure, error);
    1
}

/// Whether it is time to tell of `failure` again. The CPU that writes the time is the one to tell.
#[inline(always)]
fn is_due(failure: u32) -> bool {
    let Some(word) = TOLD.get_ptr_mut(failure) else {
        return false;
    };
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
