//! What is known of the agent in a guest.

/// What the host's end of a guest's agent has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentReport {
    /// It has come, with a program of this SHA-256, by its own word.
    Arrived {
        /// In hexadecimal.
        program: String,
    },
    /// It answers, and all is as it was sealed.
    Sound,
    /// It says that something has changed.
    Changed {
        /// What: `firewall`, `routes`, `tunnel`, `agent`.
        what: String,
    },
    /// It did not come, or did not answer, in time.
    Missed,
    /// An answer proves nothing.
    Forged,
    /// A second one came in the same boot.
    Replaced,
    /// What came on its port is not its protocol.
    Garbled,
}

impl AgentReport {
    /// The word for it.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Arrived { .. } => "arrived",
            Self::Sound => "sound",
            Self::Changed { .. } => "changed",
            Self::Missed => "missed",
            Self::Forged => "forged",
            Self::Replaced => "replaced",
            Self::Garbled => "garbled",
        }
    }

    /// Whether the guest is held to account for it.
    pub const fn is_violation(&self) -> bool {
        !matches!(self, Self::Arrived { .. } | Self::Sound)
    }

    /// What has changed, or the digest of what has arrived.
    pub fn what(&self) -> Option<&str> {
        match self {
            Self::Arrived { program } => Some(program),
            Self::Changed { what } => Some(what),
            _ => None,
        }
    }
}
