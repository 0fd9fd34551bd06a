//! What came, and what became of it, summed over CPUs.

use std::borrow::Borrow;

use aya::maps::{MapData, PerCpuArray};
use omerta_verdict::{
    DIRECTION_COUNTERS, Direction, OWN_ANSWERS_COUNTER, Outcome, RX_COUNTER, Reason,
};

use crate::GuardError;
use crate::store::map_error;

/// Frames and their bytes (whole frames, with Ethernet headers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Count {
    /// Frames.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

// SAFETY: `Count` is two `u64`: no padding, every bit pattern valid.
unsafe impl aya::Pod for Count {}

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

    fn of(row: &Row) -> Self {
        let at = |outcome: Outcome| row.0[outcome.index()];
        Self {
            received: row.0[RX_COUNTER],
            allowed: at(Outcome::Allowed),
            answered: at(Outcome::Answered),
            dropped: Reason::ALL
                .iter()
                .map(|reason| (*reason, at(Outcome::Dropped(*reason))))
                .collect(),
            own_answers: row.0[OWN_ANSWERS_COUNTER],
        }
    }
}

/// Both directions' counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// From the guest.
    pub egress: DirectionCounters,
    /// To the guest.
    pub ingress: DirectionCounters,
    /// Dropped frames of which no event tells.
    pub events_lost: Count,
    /// Those of them that exceeded the guard's rate of events; the others did not fit the ring.
    pub events_limited: Count,
}

/// One direction's counters on one CPU, as the programs keep them.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Row([Count; DIRECTION_COUNTERS]);

// SAFETY: an array of `Count`, which is `Pod`.
unsafe impl aya::Pod for Row {}

impl Row {
    /// Whether no program was between counting a frame's entry and its outcome when it was read.
    fn is_settled(&self) -> bool {
        DirectionCounters::of(self).outcomes() == self.0[RX_COUNTER]
    }

    fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
    }
}

/// Times that a row is read until it is found settled. Under a flood every other row is; one that
/// never is, is shown as it is.
const READS: usize = 100;

pub(crate) fn read<M: Borrow<MapData>>(
    interface: &str,
    counters: &PerCpuArray<M, Row>,
    lost: &PerCpuArray<M, Count>,
) -> Result<Counters, GuardError> {
    let direction = |direction: Direction| {
        let mut settled: Vec<Option<Row>> = Vec::new();
        let mut last = Vec::new();
        for _ in 0..READS {
            let values = counters
                .get(&(direction as u32), 0)
                .map_err(|source| map_error(interface, "read", "COUNTERS", source))?;
            last = values.iter().copied().collect::<Vec<Row>>();
            settled.resize(last.len(), None);
            for (kept, row) in settled.iter_mut().zip(&last) {
                if kept.is_none() && row.is_settled() {
                    *kept = Some(*row);
                }
            }
            if settled.iter().all(Option::is_some) {
                break;
            }
        }
        let mut sum = Row([Count::default(); DIRECTION_COUNTERS]);
        for (kept, row) in settled.iter().zip(&last) {
            sum.add(kept.as_ref().unwrap_or(row));
        }
        Ok(DirectionCounters::of(&sum))
    };
    let lost = |cause: u32| {
        let values = lost
            .get(&cause, 0)
            .map_err(|source| map_error(interface, "read", "LOST", source))?;
        let mut total = Count::default();
        for value in values.iter() {
            total += *value;
        }
        Ok(total)
    };
    let (ring_full, events_limited) = (lost(0)?, lost(1)?);
    let mut events_lost = ring_full;
    events_lost += events_limited;
    Ok(Counters {
        egress: direction(Direction::Egress)?,
        ingress: direction(Direction::Ingress)?,
        events_lost,
        events_limited,
    })
}
