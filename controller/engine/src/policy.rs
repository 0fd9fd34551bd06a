//! What happens to a guest that sends rogue traffic.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What happens to a guest that sends a frame that its guard drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnViolation {
    /// The frame is dropped and counted; nothing is published.
    Drop,
    /// The frame is dropped, counted and published as an event.
    Alert,
    /// The guest is paused and stays so until it is stopped or killed.
    Pause,
    /// The guest is paused at once, then ended, then its tap is removed.
    Terminate,
}

impl OnViolation {
    /// Every policy, mildest first.
    pub const ALL: [Self; 4] = [Self::Drop, Self::Alert, Self::Pause, Self::Terminate];

    /// The word used in options, JSON and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Alert => "alert",
            Self::Pause => "pause",
            Self::Terminate => "terminate",
        }
    }
}

impl fmt::Display for OnViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Text that names no policy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is not a violation policy: write drop, alert, pause or terminate")]
pub struct OnViolationParseError(String);

impl FromStr for OnViolation {
    type Err = OnViolationParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.word() == text)
            .ok_or_else(|| OnViolationParseError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_names_one_policy() {
        for policy in OnViolation::ALL {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
    }

    #[test]
    fn unknown_word_is_refused_with_the_choices() {
        let error = "Terminate".parse::<OnViolation>().unwrap_err().to_string();
        assert!(error.contains("`Terminate`") && error.contains("drop, alert, pause or terminate"));
    }
}
