//! The two clocks: the kernel's for intervals, the wall's for people.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};
use omerta_engine::Monotonic;

/// Now, on the clock that the kernel stamps frames with.
pub(crate) fn now() -> Monotonic {
    // The call cannot fail for this clock on Linux; zero would only make a latency read as 0.
    let elapsed = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    Monotonic(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
}

/// Whole seconds from `earlier` to `later`; 0 where the order is the other way round.
pub(crate) const fn seconds_between(earlier: Monotonic, later: Monotonic) -> u64 {
    later.microseconds_since(earlier) / 1_000_000
}

/// How far the wall's clock may wander from where it was last looked at before it is followed.
const STEP: u64 = 10_000_000;

/// A moment of the kernel's clock as RFC 3339 with microseconds, UTC. The same moment always
/// reads the same, unless the wall's clock is set meanwhile.
pub(crate) fn rfc3339(at: Monotonic) -> String {
    let since_epoch = i128::from(at.0) + i128::from(wall_offset());
    let moment = Timestamp::from_nanosecond(since_epoch).unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{moment:.6}")
}

/// A moment of the kernel's clock in nanoseconds since 1970.
pub(crate) fn wall_ns(at: Monotonic) -> u64 {
    at.0.saturating_add_signed(wall_offset())
}

/// Nanoseconds from the kernel's clock to the wall's.
fn wall_offset() -> i64 {
    static KNOWN: AtomicI64 = AtomicI64::new(i64::MIN);
    let kernel = i128::from(now().0);
    let fresh = Timestamp::now().as_nanosecond() - kernel;
    let fresh = i64::try_from(fresh).unwrap_or_default();
    let known = KNOWN.load(Ordering::Relaxed);
    if known.abs_diff(fresh) < STEP {
        return known;
    }
    KNOWN.store(fresh, Ordering::Relaxed);
    fresh
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_ago_reads_as_a_moment_ago() {
        let minute_ago = Monotonic(now().0 - 60 * Monotonic::SECOND);
        let text = rfc3339(minute_ago);
        assert!(
            text.ends_with('Z') && text.len() == "2026-01-01T00:00:00.000000Z".len(),
            "{text}"
        );
        let age = Timestamp::now()
            .duration_since(text.parse().unwrap())
            .as_secs_f64();
        assert!((59.9..61.0).contains(&age), "{age}");
    }

    #[test]
    fn a_moment_reads_the_same_whenever_it_is_told() {
        let moment = now();
        let first = rfc3339(moment);
        for _ in 0..1000 {
            assert_eq!(rfc3339(moment), first);
        }
    }
}
