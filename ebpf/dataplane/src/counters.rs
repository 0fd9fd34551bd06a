//! What became of every frame, summed over CPUs.

use std::borrow::Borrow;

use aya::maps::{MapData, PerCpuArray};
use omerta_verdict::{Direction, Outcome, Reason};

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectionCounters {
    /// Passed on.
    pub allowed: Count,
    /// Answered by the guard itself.
    pub answered: Count,
    /// Dropped: every reason in index order, also those that never occurred.
    pub dropped: Vec<(Reason, Count)>,
}

impl DirectionCounters {
    /// Everything that came: allowed, answered and dropped. It is their sum because each frame is
    /// counted exactly once, by its outcome.
    pub fn rx(&self) -> Count {
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

/// Both directions' counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// From the guest.
    pub egress: DirectionCounters,
    /// To the guest.
    pub ingress: DirectionCounters,
    /// Dropped frames whose event did not fit the ring.
    pub events_lost: Count,
}

pub(crate) fn read<M: Borrow<MapData>>(
    interface: &str,
    counters: &PerCpuArray<M, Count>,
    lost: &PerCpuArray<M, Count>,
) -> Result<Counters, GuardError> {
    let sum = |map: &PerCpuArray<M, Count>, name, index: usize| {
        let values = map
            .get(&(index as u32), 0)
            .map_err(|source| map_error(interface, "read", name, source))?;
        let mut total = Count::default();
        for value in values.iter() {
            total += *value;
        }
        Ok(total)
    };
    let direction = |direction: Direction| {
        let at = |outcome: Outcome| {
            sum(
                counters,
                "COUNTERS",
                direction as usize * Outcome::COUNT + outcome.index(),
            )
        };
        Ok(DirectionCounters {
            allowed: at(Outcome::Allowed)?,
            answered: at(Outcome::Answered)?,
            dropped: Reason::ALL
                .iter()
                .map(|reason| Ok((*reason, at(Outcome::Dropped(*reason))?)))
                .collect::<Result<_, GuardError>>()?,
        })
    };
    Ok(Counters {
        egress: direction(Direction::Egress)?,
        ingress: direction(Direction::Ingress)?,
        events_lost: sum(lost, "LOST", 0)?,
    })
}
