//! What the programs share with userspace of one guard: the values of its maps.

use crate::{Bucket, DIRECTION_COUNTERS, Direction, Failure, Meter, Policy, SENT_FLOWS, SentFlow};

/// Guards that the same programs judge for: places in their maps.
pub const GUARDS: usize = 2048;

/// Flows that one guest may have open in conntrack mode; a power of two.
pub const FLOWS: u32 = 4096;

/// Rows of a guard's counters: each direction's, by its number, then [`LOST_ROW`].
pub const COUNTER_ROWS: usize = Direction::ALL.len() + 1;
/// The row that counts the dropped frames of which no event tells.
pub const LOST_ROW: u32 = Direction::ALL.len() as u32;
const _: () = assert!(DIRECTION_COUNTERS > 2, "a row has room for each cause");

/// Buckets of an allowlist that stand beside its policy; a longer one has a map of its own.
pub const INLINE_BUCKETS: usize = 64;

/// A policy and, where it has no more than [`INLINE_BUCKETS`], its allowlist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Slot {
    /// The policy.
    pub policy: Policy,
    /// Its allowlist.
    pub buckets: [Bucket; INLINE_BUCKETS],
}

/// The value of a guard's map `STATE`. All zero has a policy that drops everything.
///
/// Userspace writes the slot that is not in force and then [`State::generation`], one aligned word.
/// A program reads the generation before and after it judges, and judges anew where it has changed:
/// the slot that it read may then have been written meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct State {
    /// Raised by one with each commit; the lowest bit names the slot in force.
    pub generation: u64,
    /// When the guard's lease ends, nanoseconds of `CLOCK_MONOTONIC`; 0 where it has none.
    pub lease_until_ns: u64,
    /// The kernel's tick at which a program last asked for the time.
    pub tick: u64,
    /// What it was told, nanoseconds of `CLOCK_MONOTONIC`. Written before the tick.
    pub tick_ns: u64,
    /// What the programs on the guard's interface name it by, besides its place. Random, fixed when the
    /// guard is made: programs of a guard that had the place before find that it is not theirs.
    pub token: u32,
    /// Zero, as all padding here: each slot starts at a cache line.
    pub padding: u32,
    /// Zero.
    pub padding_too: [u64; 3],
    /// Two, of which one is in force.
    pub slots: [Slot; 2],
}

/// The value of a guard's map `LIVE`, which the programs alone write. All zero to begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Live {
    /// The bucket of each meter, shared by all CPUs.
    pub meters: [u64; Meter::COUNT],
    /// When each [`Failure`] was told last, nanoseconds of `CLOCK_MONOTONIC`.
    pub told: [u64; Failure::ALL.len()],
    /// How many places for flows have been looked at so far in conntrack mode: the next one to look at.
    pub flow_hand: u64,
    /// What the guest sent on outside of conntrack mode, each flow at its place by
    /// [`SentFlow::place_and_check`].
    pub sent: [SentFlow; SENT_FLOWS],
}
