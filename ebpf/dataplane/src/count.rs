//! Counters as the programs keep them, and what they say.

use omerta_verdict::{DIRECTION_COUNTERS, OWN_ANSWERS_COUNTER, Outcome, RX_COUNTER, Reason};

/// Frames and their bytes (whole frames, with Ethernet headers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Count {
    /// Frames.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }
}

/// One direction's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectionCounters {
    /// Everything that came, counted on entry.
    pub received: Count,
    /// Passed on.
    pub allowed: Count,
    /// Answered by the guard itself.
    pub answered: Count,
    /// Dropped: every reason in index order, also those that never occurred.
    pub dropped: Vec<(Reason, Count)>,
    /// The guard's own answers that entered again on their way out; not among what came.
    pub own_answers: Count,
}

impl DirectionCounters {
    /// Everything that came. Equal to [`DirectionCounters::outcomes`], or the guard is at fault:
    /// the two are counted apart, on entry and by outcome.
    pub fn rx(&self) -> Count {
        self.received
    }

    /// Everything that was judged: allowed, answered and dropped.
    pub fn outcomes(&self) -> Count {
        let mut sum = self.allowed;
        sum += self.answered;
        for (_, count) in &self.dropped {
            sum += *count;
        }
        sum
    }

    /// The frames dropped for `reason`.
    pub fn dropped_for(&self, reason: Reason) -> Count {
        self.dropped
            .iter()
            .find(|(r, _)| *r == reason)
            .map_or(Count::default(), |(_, count)| *count)
    }
}

/// One direction's counters on one CPU, as the programs keep them.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Row(pub [Count; DIRECTION_COUNTERS]);

impl Row {
    pub const NOTHING: Self = Self(
        [Count {
            packets: 0,
            bytes: 0,
        }; DIRECTION_COUNTERS],
    );

    /// Whether no program was between counting a frame's entry and its outcome when it was read.
    pub fn is_settled(&self) -> bool {
        let mut sum = Count::default();
        // What follows are no outcomes.
        for count in &self.0[..RX_COUNTER] {
            sum += *count;
        }
        sum == self.0[RX_COUNTER]
    }

    pub fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
    }

    /// What it says, by name.
    pub fn direction(&self) -> DirectionCounters {
        let at = |outcome: Outcome| self.0[outcome.index()];
        DirectionCounters {
            received: self.0[RX_COUNTER],
            allowed: at(Outcome::Allowed),
            answered: at(Outcome::Answered),
            dropped: Reason::ALL
                .iter()
                .map(|reason| (*reason, at(Outcome::Dropped(*reason))))
                .collect(),
            own_answers: self.0[OWN_ANSWERS_COUNTER],
        }
    }
}
