//! What the programs of one guard share with userspace: one map value, which userspace maps.

use crate::{Bucket, Policy};

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

/// The value of the guard's map `STATE`. All zero has a policy that drops everything.
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
    /// Zero: each slot starts at a cache line.
    pub padding: [u64; 4],
    /// Two, of which one is in force.
    pub slots: [Slot; 2],
}
