//! The states of a guest.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a guest stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    /// Its tap and process are being made.
    Launching,
    /// The process exists; no instruction of the guest has run; no guard is proven yet.
    Paused,
    /// The guard is proven; the guest is about to run.
    Guarded,
    /// The guest runs.
    Running,
    /// It sent rogue traffic and is being paused.
    Condemned,
    /// Paused by request; it runs again when asked to.
    Held,
    /// Paused by policy or by its own panic; it does not run again.
    Suspended,
    /// It was asked to power down and has until its deadline.
    Stopping,
    /// Its process, guard and tap are being removed.
    Ending,
    /// Nothing of it is left but the record, and what that lists as left behind.
    Ended,
}

impl GuestState {
    /// Every state, in the order of a guest's life.
    pub const ALL: [Self; 10] = [
        Self::Launching,
        Self::Paused,
        Self::Guarded,
        Self::Running,
        Self::Condemned,
        Self::Held,
        Self::Suspended,
        Self::Stopping,
        Self::Ending,
        Self::Ended,
    ];

    /// The word used in JSON, labels and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Launching => "launching",
            Self::Paused => "paused",
            Self::Guarded => "guarded",
            Self::Running => "running",
            Self::Condemned => "condemned",
            Self::Held => "held",
            Self::Suspended => "suspended",
            Self::Stopping => "stopping",
            Self::Ending => "ending",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for GuestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
