//! When a peer has last shaken hands, on a clock that nobody sets.

use std::time::{Duration, SystemTime};

/// Devices tell of handshakes by the wall's clock, which may be set between two looks. So the wall's clock is believed
/// once for each handshake, and no further than what lies between the look that found it and the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshakes {
    told: Option<SystemTime>,
    at: Option<Duration>,
    looked: Option<Duration>,
}

impl Handshakes {
    /// Nothing is known yet.
    pub const fn new() -> Self {
        Self {
            told: None,
            at: None,
            looked: None,
        }
    }

    /// Takes in what a device tells, at `now` of a clock that only goes forwards and `wall` of the wall's; gives when, on the
    /// former, the latest handshake was.
    pub fn look(
        &mut self,
        now: Duration,
        wall: SystemTime,
        told: Option<SystemTime>,
    ) -> Option<Duration> {
        if told != self.told {
            self.told = told;
            self.at = told.map(|told| {
                // Later than now by the wall's clock: that was set back.
                let age = wall.duration_since(told).unwrap_or_default();
                let most = self.looked.map_or(now, |looked| now.saturating_sub(looked));
                now.saturating_sub(age.min(most))
            });
        }
        self.looked = Some(now);
        self.at
    }
}

impl Default for Handshakes {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_handshake_has_one_age_however_the_wall_clock_is_set() {
        let wall = |n| SystemTime::UNIX_EPOCH + seconds(n);
        let mut handshakes = Handshakes::new();
        for (now, wall_now, told, at) in [
            (100, 5_000, None, None),
            (102, 5_002, Some(5_001), Some(101)),
            (104, 5_004, Some(5_001), Some(101)),
            // Set forwards by a day, and back to before the handshake.
            (106, 91_406, Some(5_001), Some(101)),
            (108, 20, Some(5_001), Some(101)),
            // The next one comes while the clock is as wrong, and it is mended before the look: no more than two seconds ago.
            (110, 5_010, Some(21), Some(108)),
            // Told by a clock that was ahead.
            (112, 5_012, Some(90_000), Some(112)),
            (114, 5_014, None, None),
        ] {
            let found = handshakes.look(seconds(now), wall(wall_now), told.map(wall));
            assert_eq!(found, at.map(seconds), "{now}");
        }
    }

    #[test]
    fn what_the_first_look_finds_is_as_old_as_the_wall_clock_says() {
        let wall = SystemTime::UNIX_EPOCH + seconds(5_000);
        let found = |now| Handshakes::new().look(seconds(now), wall, Some(wall - seconds(70)));
        assert_eq!(found(100), Some(seconds(30)));
        // From before the machine was started, at most.
        assert_eq!(found(50), Some(seconds(0)));
    }
}
