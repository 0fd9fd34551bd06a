//! Counting rogue frames, and publishing few of many.

use std::collections::BTreeMap;

use omerta_verdict::Reason;

use crate::Monotonic;

/// Lets one thing through per interval and counts the rest.
///
/// A guest decides how often it misbehaves, reboots or reports; it must not decide how fast the
/// event history turns over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limiter {
    last: Option<Monotonic>,
    suppressed: u64,
}

impl Limiter {
    /// Nanoseconds between two things let through.
    pub(crate) const INTERVAL: u64 = Monotonic::SECOND;

    /// How many were suppressed since the last, if this one may pass.
    pub(crate) fn pass(&mut self, now: Monotonic) -> Option<u64> {
        match self.last {
            Some(last) if !now.is_after(last, Self::INTERVAL) => {
                self.suppressed += 1;
                None
            }
            _ => {
                self.last = Some(now);
                Some(std::mem::take(&mut self.suppressed))
            }
        }
    }
}

/// The rogue frames of one guest, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    reasons: BTreeMap<Reason, (u64, Limiter)>,
}

impl Tally {
    /// Counts a frame; tells whether it is the first of its reason.
    pub(crate) fn count(&mut self, reason: Reason) -> bool {
        let count = &mut self.reasons.entry(reason).or_default().0;
        *count += 1;
        *count == 1
    }

    /// How many of the reason were suppressed since the last published, if one may be published.
    pub(crate) fn pass(&mut self, reason: Reason, now: Monotonic) -> Option<u64> {
        self.reasons.entry(reason).or_default().1.pass(now)
    }

    /// Frames counted, by reason.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        self.reasons
            .iter()
            .map(|(reason, (count, _))| (*reason, *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_passes_once_an_interval_and_the_rest_is_told() {
        let mut limiter = Limiter::default();
        assert_eq!(limiter.pass(Monotonic(5)), Some(0));
        for step in 0..1000 {
            assert_eq!(limiter.pass(Monotonic(5 + step)), None);
        }
        assert_eq!(limiter.pass(Monotonic(5 + Limiter::INTERVAL)), Some(1000));
        assert_eq!(limiter.pass(Monotonic(5 + 2 * Limiter::INTERVAL)), Some(0));
    }

    #[test]
    fn a_second_reason_is_not_hidden_by_the_first() {
        let mut tally = Tally::default();
        tally.count(Reason::Endpoint);
        assert_eq!(tally.pass(Reason::Endpoint, Monotonic(0)), Some(0));
        assert_eq!(tally.pass(Reason::Fragment, Monotonic(1)), Some(0));
        assert_eq!(tally.counts().map(|(_, count)| count).sum::<u64>(), 1);
    }
}
