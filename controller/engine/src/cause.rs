//! Why guests are paused and end.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a guest was paused or has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// It sent rogue traffic.
    Rogue,
    /// Its agent was missed, or told of a change.
    Agent,
    /// It was asked to stop and powered down.
    Stopped,
    /// It was asked to stop and did not power down in time.
    StopDeadline,
    /// The time that it was given is over.
    Timeout,
    /// Nothing came from its consumer for too long.
    Silent,
    /// It was killed by request.
    Killed,
    /// It powered itself down, or its process exited.
    Exited,
    /// Its kernel panicked.
    Panicked,
    /// It could not be launched, guarded or resumed.
    LaunchFailed,
    /// Its guard could no longer be watched.
    GuardFailed,
    /// The daemon is shutting down.
    Shutdown,
    /// The daemon died, and the guest had not come to run, or could not be taken over by the next.
    Abandoned,
    /// The host booted.
    Rebooted,
}

impl Cause {
    /// Every cause.
    pub const ALL: [Self; 14] = [
        Self::Rogue,
        Self::Agent,
        Self::Stopped,
        Self::StopDeadline,
        Self::Timeout,
        Self::Silent,
        Self::Killed,
        Self::Exited,
        Self::Panicked,
        Self::LaunchFailed,
        Self::GuardFailed,
        Self::Shutdown,
        Self::Abandoned,
        Self::Rebooted,
    ];

    /// The word used in JSON and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Rogue => "rogue",
            Self::Agent => "agent",
            Self::Stopped => "stopped",
            Self::StopDeadline => "stop_deadline",
            Self::Timeout => "timeout",
            Self::Silent => "silent",
            Self::Killed => "killed",
            Self::Exited => "exited",
            Self::Panicked => "panicked",
            Self::LaunchFailed => "launch_failed",
            Self::GuardFailed => "guard_failed",
            Self::Shutdown => "shutdown",
            Self::Abandoned => "abandoned",
            Self::Rebooted => "rebooted",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
