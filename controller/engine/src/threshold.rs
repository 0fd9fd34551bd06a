//! How many frames of a reason, in how long a time, act.

use std::collections::{BTreeMap, VecDeque};

use omerta_verdict::Reason;
use thiserror::Error;

use crate::Monotonic;

/// As many frames as a threshold may wait for. A guard tells of so many at once, whatever the rate of its
/// events; so a flood reaches every threshold.
pub const MOST_FRAMES: u32 = 200;
/// As many seconds as a threshold may look back.
pub const MOST_SECONDS: u32 = 3600;

/// So many frames in so many seconds act; fewer are counted and told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threshold {
    frames: u32,
    seconds: u32,
}

/// A threshold that cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "{frames} frames in {seconds} s: give 1 to {MOST_FRAMES} frames and 1 to {MOST_SECONDS} seconds"
)]
pub struct ThresholdError {
    frames: u32,
    seconds: u32,
}

impl Threshold {
    /// The first frame acts.
    pub const FIRST: Self = Self {
        frames: 1,
        seconds: 1,
    };

    /// `frames` in `seconds`.
    ///
    /// # Errors
    /// Where one of them is out of range.
    pub fn new(frames: u32, seconds: u32) -> Result<Self, ThresholdError> {
        if (1..=MOST_FRAMES).contains(&frames) && (1..=MOST_SECONDS).contains(&seconds) {
            Ok(Self { frames, seconds })
        } else {
            Err(ThresholdError { frames, seconds })
        }
    }
}

/// The thresholds of all reasons: the first frame acts where nothing else is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thresholds(BTreeMap<Reason, Threshold>);

impl Thresholds {
    /// Frames of `reason` act by `threshold`.
    pub fn set(&mut self, reason: Reason, threshold: Threshold) {
        self.0.insert(reason, threshold);
    }

    fn of(&self, reason: Reason) -> Threshold {
        self.0.get(&reason).copied().unwrap_or(Threshold::FIRST)
    }
}

/// When the last frames of one guest came: of each reason as many as its threshold waits for, and of all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Windows {
    by_reason: BTreeMap<Reason, VecDeque<Monotonic>>,
    all: VecDeque<Monotonic>,
}

impl Windows {
    /// Whether the frame that came `at` for `reason` makes them enough: of its reason, or of any in one
    /// second, so that nobody stays below many thresholds at once.
    pub(crate) fn reached(
        &mut self,
        thresholds: &Thresholds,
        reason: Reason,
        at: Monotonic,
    ) -> bool {
        let of_reason = self.by_reason.entry(reason).or_default();
        let enough = is_full(of_reason, thresholds.of(reason), at);
        let flood = Threshold {
            frames: MOST_FRAMES,
            seconds: 1,
        };
        is_full(&mut self.all, flood, at) || enough
    }
}

fn is_full(times: &mut VecDeque<Monotonic>, threshold: Threshold, at: Monotonic) -> bool {
    times.push_back(at);
    let frames = threshold.frames as usize;
    while times.len() > frames {
        times.pop_front();
    }
    let window = u64::from(threshold.seconds) * Monotonic::SECOND;
    times.len() == frames
        && times
            .front()
            .is_some_and(|first| !at.is_after(*first, window))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_frame_acts_where_nothing_is_said() {
        let thresholds = Thresholds::default();
        for reason in Reason::ALL {
            assert!(Windows::default().reached(&thresholds, *reason, Monotonic(7)));
        }
    }

    #[test]
    fn what_no_guard_could_tell_is_refused() {
        for (frames, seconds) in [(0, 1), (1, 0), (201, 1), (1, 3601)] {
            assert!(Threshold::new(frames, seconds).is_err());
        }
        assert!(Threshold::new(200, 3600).is_ok());
    }

    proptest! {
        #[test]
        fn a_threshold_acts_exactly_when_so_many_came_in_so_long(
            frames in 1..20_u32,
            seconds in 1..5_u32,
            steps in prop::collection::vec(0..3000_u64, 1..200),
        ) {
            let mut thresholds = Thresholds::default();
            thresholds.set(Reason::ArpTarget, Threshold::new(frames, seconds).unwrap());
            let mut windows = Windows::default();
            let mut times: Vec<u64> = Vec::new();
            let mut now = 0;
            for step in steps {
                now += step;
                times.push(now);
                let at = Monotonic(now * 1_000_000);
                let within = |span: u64| times.iter().filter(|time| now - **time < span).count();
                let enough = within(u64::from(seconds) * 1000) >= frames as usize;
                let flood = within(1000) >= MOST_FRAMES as usize;
                prop_assert_eq!(windows.reached(&thresholds, Reason::ArpTarget, at), enough || flood);
            }
        }

        #[test]
        fn no_mixture_of_reasons_stays_below_all_thresholds(
            reasons in prop::collection::vec(0..Reason::ALL.len(), MOST_FRAMES as usize),
        ) {
            let mut thresholds = Thresholds::default();
            for reason in Reason::ALL {
                thresholds.set(*reason, Threshold::new(MOST_FRAMES, MOST_SECONDS).unwrap());
            }
            let mut windows = Windows::default();
            let reached = reasons
                .into_iter()
                .enumerate()
                .map(|(at, reason)| windows.reached(&thresholds, Reason::ALL[reason], Monotonic(at as u64)))
                .collect::<Vec<_>>();
            prop_assert!(reached.last().copied().unwrap());
        }
    }
}
