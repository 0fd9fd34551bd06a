//! The two clocks: the kernel's for intervals, the wall's for people.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::time::{ClockId, clock_gettime};
use omerta_engine::Monotonic;

/// Now, on the clock that the kernel stamps frames with.
pub(crate) fn now() -> Monotonic {
    // The call cannot fail for this clock on Linux; zero would only make a latency read as 0.
    let elapsed = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    Monotonic(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
}

/// A moment of the kernel's clock as RFC 3339 with microseconds, UTC.
pub(crate) fn rfc3339(at: Monotonic) -> String {
    let age = SignedDuration::from_nanos(
        i64::try_from(now().0).unwrap_or(i64::MAX) - i64::try_from(at.0).unwrap_or(i64::MAX),
    );
    let moment = Timestamp::now()
        .checked_sub(age)
        .unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{moment:.6}")
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
}
