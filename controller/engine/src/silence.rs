//! What happens to a guest whose tunnel has died.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What happens to a guest to which nothing comes from its consumer any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnSilence {
    /// It is told as an event.
    #[default]
    Alert,
    /// It is also paused, until someone lets it run on.
    Pause,
    /// It is also ended.
    End,
}

impl OnSilence {
    /// Every one, mildest first.
    pub const ALL: [Self; 3] = [Self::Alert, Self::Pause, Self::End];

    /// The word used in the configuration, JSON and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Alert => "alert",
            Self::Pause => "pause",
            Self::End => "end",
        }
    }
}

impl fmt::Display for OnSilence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
