//! Rates: a token bucket held in one word, so that many CPUs can share it without a lock.
//!
//! The word is the time at which the bucket would be full again (the "theoretical arrival time"
//! of the generic cell rate algorithm, ITU-T I.371, A.1). Taking a token moves it forward.

/// Fractions of a nanosecond that a cost is counted in, as a power of two.
const FRACTION: u32 = 12;
const SECOND_NS: u64 = 1_000_000_000;
/// The cost of one unit a second is the highest.
const MOST_COST: u64 = SECOND_NS << FRACTION;
/// No frame has more bytes (or segments) than this.
const MOST_UNITS: u32 = 1 << 18;
/// No burst is longer, so that sums of bursts and times do not overflow.
const MOST_NS: u64 = 1 << 62;

/// Clocks that a bucket is filled by differ by less: CPUs may read one a tick late. A bucket's word that
/// is further ahead than its burst and this was left by another rate.
const STRAY_NS: u64 = SECOND_NS;

/// How often something may happen. All zero is without limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Rate {
    /// Time that one unit takes, in 1/4096 ns; 0 is without limit.
    cost: u64,
    /// How far ahead of the clock the bucket's word may be, in ns.
    burst_ns: u64,
}

impl Rate {
    /// Without limit.
    pub const UNLIMITED: Self = Self {
        cost: 0,
        burst_ns: 0,
    };

    /// `units` a second, and as many as `burst` at once. 0 units are without limit.
    pub const fn per_second(units: u64, burst: u64) -> Self {
        if units == 0 {
            return Self::UNLIMITED;
        }
        let cost = (SECOND_NS << FRACTION) / units;
        // More than 4096 units a nanosecond are no limit that anything could reach.
        let cost = if cost == 0 { 1 } else { cost };
        let burst_ns = (burst as u128 * SECOND_NS as u128).div_ceil(units as u128);
        Self {
            cost,
            burst_ns: if burst_ns < MOST_NS as u128 {
                burst_ns as u64
            } else {
                MOST_NS
            },
        }
    }

    /// Whether nothing is limited.
    #[inline(always)]
    pub const fn is_unlimited(self) -> bool {
        self.cost == 0
    }

    /// The time in nanoseconds by which [`Rate::take`] of `units` moves a bucket's word, and which giving them
    /// back takes off it.
    #[inline(always)]
    pub const fn time_of(self, units: u32) -> u64 {
        self.cost.wrapping_mul(units as u64) >> FRACTION
    }

    /// The bucket's word after `units` are taken at `now` (ns) from a bucket whose word is
    /// `word`, or `None` where they are more than it holds.
    #[inline(always)]
    pub const fn take(self, word: u64, now: u64, units: u32) -> Option<u64> {
        // Their product then fits.
        if self.cost > MOST_COST || units > MOST_UNITS {
            return None;
        }
        let ahead = match word.saturating_sub(now) {
            // Left by a slower rate, which no longer holds: the bucket of the new one is full.
            old if old > self.burst_ns.saturating_add(STRAY_NS) => 0,
            ahead => ahead,
        };
        let after = ahead.saturating_add(self.time_of(units));
        if after > self.burst_ns {
            return None;
        }
        Some(now.wrapping_add(after))
    }
}

/// What a guard meters: the index of its bucket and of its [`Rate`] in the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Meter {
    /// Frames from the guest, as many as the host makes of each.
    EgressPackets = 0,
    /// Bytes of the frames from the guest.
    EgressBytes = 1,
    /// Frames to the guest.
    IngressPackets = 2,
    /// Bytes of the frames to the guest.
    IngressBytes = 3,
    /// The guest's duplicate-address probes.
    Probes = 4,
    /// Events that are not held against the guest.
    Events = 5,
    /// Events that are: no flood of others hides one.
    Violations = 6,
}

impl Meter {
    /// How many there are.
    pub const COUNT: usize = 7;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `count` single units, `step` ns apart from `start`, pass.
    fn passed(rate: Rate, word: &mut u64, start: u64, step: u64, count: u64) -> u64 {
        (0..count)
            .filter(|index| match rate.take(*word, start + index * step, 1) {
                Some(next) => {
                    *word = next;
                    true
                }
                None => false,
            })
            .count() as u64
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let rate = Rate::per_second(1000, 50);
        let mut word = 0;
        let start = 77 * SECOND_NS;
        assert_eq!(passed(rate, &mut word, start, 0, 500), 50);
        // One second, in steps of 10 µs: a thousand more.
        let next = passed(rate, &mut word, start + 10_000, 10_000, 100_000);
        assert!((999..=1000).contains(&next), "{next}");
        // An idle bucket fills up to the burst and no further.
        assert_eq!(passed(rate, &mut word, start + 100 * SECOND_NS, 0, 500), 50);
    }

    #[test]
    fn many_units_cost_as_much_as_they_would_one_by_one() {
        let rate = Rate::per_second(1_000_000, 3000);
        let word = rate.take(0, 1, 1500).unwrap();
        let word = rate.take(word, 1, 1500).unwrap();
        assert_eq!(rate.take(word, 1, 1), None);
        assert_eq!(Rate::per_second(1, 1).take(0, 0, 2), None);
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let rate = Rate::per_second(3000, 5);
        let full = rate.take(0, SECOND_NS, 5).unwrap();
        assert_eq!(rate.take(full, SECOND_NS, 2), None);
        let word = full - rate.time_of(2);
        assert!(rate.take(word, SECOND_NS, 2).is_some());
        assert_eq!(rate.take(word, SECOND_NS, 3), None);
    }

    /// A bucket that is empty at a slow rate is far ahead of what a faster one may be.
    #[test]
    fn a_faster_rate_does_not_wait_for_a_slower_ones_bucket() {
        let (slow, fast) = (Rate::per_second(1, 100), Rate::per_second(1_000_000, 32));
        let mut word = 0;
        let start = 7 * SECOND_NS;
        assert_eq!(passed(slow, &mut word, start, 0, 500), 100);
        assert_eq!(passed(fast, &mut word, start + 1, 0, 500), 32);
        // Once only: the bucket is the new rate's from then on.
        assert_eq!(passed(fast, &mut word, start + 1, 0, 500), 0);
    }

    #[test]
    fn extremes_neither_overflow_nor_open() {
        assert!(Rate::per_second(0, 0).is_unlimited());
        assert!(!Rate::per_second(u64::MAX, 1).is_unlimited());
        assert_eq!(Rate::per_second(1, u64::MAX).take(0, 0, u32::MAX), None);
        assert_eq!(Rate::per_second(1, 0).take(0, 0, 1), None);
        assert_eq!(Rate::per_second(1, 1).take(SECOND_NS, 0, 1), None);
        let barely = Rate::per_second(1, 1).take(SECOND_NS + 1, 0, 0);
        assert_eq!(
            barely, None,
            "a clock that is late by a tick is no new rate"
        );
        assert!(Rate::per_second(u64::MAX, 1).take(0, u64::MAX, 0).is_some());
    }
}
