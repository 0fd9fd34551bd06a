//! The clock that the guard's events are stamped with.

use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC now, in nanoseconds: comparable with `FrameEvent::at_ns`.
pub(crate) fn monotonic_ns() -> u64 {
    match clock_gettime(ClockId::CLOCK_MONOTONIC) {
        Ok(now) => {
            let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
            let nanoseconds = u64::try_from(now.tv_nsec()).unwrap_or(0);
            seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(nanoseconds)
        }
        // Linux always has this clock; zero makes a nonsense figure, never a wrong decision.
        Err(_) => 0,
    }
}
