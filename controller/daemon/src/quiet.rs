//! For how long nothing has passed between a guest and its consumer, as its guard sees it.
//!
//! Guards count and keep no times, so what is known is since when a count was found as it is: nothing has passed for so long
//! at least. Looking costs nothing that is not done anyway: counters are read for scrapes, and for whoever lists peers.

use std::time::Duration;

use omerta_dataplane::Counters;

/// What the looks at one guest's counters have found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Quiet {
    sent: Found,
    received: Found,
}

/// A count, and when it was found first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    packets: u64,
    at: Duration,
}

/// For how long at least nothing has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QuietFor {
    /// To the consumer.
    pub(crate) sent: Duration,
    /// From it.
    pub(crate) received: Duration,
}

impl Quiet {
    /// Looks again, at `now` of a clock that only goes forwards.
    pub(crate) fn look(before: Option<Self>, now: Duration, counters: &Counters) -> Self {
        let found = |before: Option<Found>, packets| match before {
            Some(before) if before.packets == packets => before,
            _ => Found { packets, at: now },
        };
        Self {
            sent: found(before.map(|b| b.sent), counters.egress.allowed.packets),
            received: found(before.map(|b| b.received), counters.ingress.allowed.packets),
        }
    }

    /// Of what was looked at last at `now`.
    pub(crate) const fn at(self, now: Duration) -> QuietFor {
        QuietFor {
            sent: now.saturating_sub(self.sent.at),
            received: now.saturating_sub(self.received.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use omerta_dataplane::{Count, DirectionCounters};

    use super::*;

    fn counters(sent: u64, received: u64) -> Counters {
        let direction = |packets| DirectionCounters {
            allowed: Count { packets, bytes: 0 },
            ..DirectionCounters::default()
        };
        Counters {
            egress: direction(sent),
            ingress: direction(received),
            ..Counters::default()
        }
    }

    #[test]
    fn what_passes_in_one_direction_says_nothing_of_the_other() {
        let at = Duration::from_secs;
        let mut quiet = None;
        for (now, sent, received, known) in [
            // What was before the first look is not known.
            (100, 5, 5, (0, 0)),
            (110, 5, 5, (10, 10)),
            (115, 6, 5, (0, 15)),
            (120, 6, 7, (5, 0)),
            // A guard of another life begins at 0.
            (130, 0, 0, (0, 0)),
            (131, 0, 0, (1, 1)),
        ] {
            let looked = Quiet::look(quiet, at(now), &counters(sent, received));
            let found = looked.at(at(now));
            assert_eq!(
                (found.sent, found.received),
                (at(known.0), at(known.1)),
                "{now}"
            );
            quiet = Some(looked);
        }
    }
}
