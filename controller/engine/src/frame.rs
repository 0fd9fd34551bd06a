//! Rogue frames and what followed from them.

use omerta_verdict::{Direction, Reason};

use crate::{Monotonic, Target};

/// A frame that a guard dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RogueFrame {
    /// When the kernel judged it.
    pub at: Monotonic,
    /// Which way it went. Only what the guest sent is a violation.
    pub direction: Direction,
    /// Why it was dropped.
    pub reason: Reason,
    /// Its length in bytes.
    pub length: u32,
    /// One line: protocol, source, destination.
    pub description: String,
    /// Whom it was for, as far as it says.
    pub target: Option<Target>,
}

impl RogueFrame {
    /// Whether it is held against the guest. What is not, is dropped and counted by the guard alone.
    pub const fn is_violation(&self) -> bool {
        self.reason.is_violation(self.direction)
    }
}

/// The frame that condemned a guest, and how long each answer to it took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// The frame.
    pub frame: RogueFrame,
    /// When the guest was paused.
    pub paused_at: Option<Monotonic>,
    /// When its process was reaped.
    pub ended_at: Option<Monotonic>,
    /// When its tap was removed.
    pub tap_removed_at: Option<Monotonic>,
}

impl Incident {
    /// An incident that nothing has been done about yet.
    pub const fn new(frame: RogueFrame) -> Self {
        Self {
            frame,
            paused_at: None,
            ended_at: None,
            tap_removed_at: None,
        }
    }

    /// Microseconds from the frame to the paused guest.
    pub fn frame_to_paused_us(&self) -> Option<u64> {
        self.since_frame(self.paused_at)
    }

    /// Microseconds from the frame to the reaped process.
    pub fn frame_to_ended_us(&self) -> Option<u64> {
        self.since_frame(self.ended_at)
    }

    /// Microseconds from the frame to the removed tap.
    pub fn frame_to_tap_removed_us(&self) -> Option<u64> {
        self.since_frame(self.tap_removed_at)
    }

    fn since_frame(&self, at: Option<Monotonic>) -> Option<u64> {
        at.map(|at| at.microseconds_since(self.frame.at))
    }
}
