//! The engine's time: given to it, never read by it.

/// A point in time: nanoseconds of `CLOCK_MONOTONIC`, the clock of the kernel's frame timestamps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Monotonic(pub u64);

impl Monotonic {
    /// Nanoseconds in a second.
    pub const SECOND: u64 = 1_000_000_000;

    /// Whole microseconds from `earlier` to `self`; 0 where the order is the other way round.
    pub const fn microseconds_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1000
    }

    /// Whether at least `nanoseconds` lie between `earlier` and `self`.
    pub const fn is_after(self, earlier: Self, nanoseconds: u64) -> bool {
        self.0.saturating_sub(earlier.0) >= nanoseconds
    }
}
