//! What is recorded.

use serde::{Deserialize, Serialize};

use crate::Digest;

/// One line of the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Counted from 1.
    pub number: u64,
    /// The hash of the line before.
    pub previous: Digest,
    /// When it was written, RFC 3339, UTC.
    pub at: String,
    /// Who wrote it, with its version.
    pub program: String,
    /// What it says.
    pub what: What,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum What {
    /// A guest was caught.
    Incident(Box<Incident>),
    /// What was done about it.
    Outcome(Box<Outcome>),
    /// So many entries could not be written before this one.
    Lost {
        /// How many.
        entries: u64,
    },
    /// Segments were removed, for the record's bounds.
    Removed {
        /// The number of the last entry in them.
        through: u64,
        /// The hash of that entry.
        hash: Digest,
    },
    /// The record did not end where it had ended, or was broken, when its writer opened it.
    Damaged {
        /// What was found.
        problem: String,
    },
}

/// Who caught a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Witness {
    /// Its guard in the kernel: proof.
    Kernel,
    /// The agent in it, which was missed or said so: the guest's word, but for its silence.
    Agent,
    /// Its console, where its own firewall says so: the guest's word, which anyone in it can forge.
    Console,
    /// The host's own tables: routes, neighbours, sockets.
    Outside,
}

impl Witness {
    /// The word used in JSON and text.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Agent => "agent",
            Self::Console => "console",
            Self::Outside => "outside",
        }
    }
}

/// A frame that a guard dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frame {
    /// When the kernel judged it: nanoseconds since 1970, as the wall's clock stood when this was written.
    pub at_ns: u64,
    /// Which way it went.
    pub direction: String,
    /// Why it was dropped.
    pub reason: String,
    /// Its whole length.
    pub length: u32,
    /// Its first bytes, hexadecimal.
    pub bytes: String,
    /// The frame in one line.
    pub text: String,
}

impl Frame {
    /// Its first bytes, or `None` where they are not hexadecimal.
    pub fn head(&self) -> Option<Vec<u8>> {
        let pairs = self.bytes.as_bytes().chunks_exact(2);
        if !pairs.remainder().is_empty() {
            return None;
        }
        pairs
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
            .collect()
    }
}

/// What a guest was caught at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incident {
    /// Names the incident in what follows from it: the guest's number, and a number of its own.
    pub case: String,
    /// The guest.
    pub guest: String,
    /// Its tap.
    pub interface: String,
    /// Whose it was: `PUBLIC_KEY@ADDRESS:PORT`.
    pub consumer: String,
    /// Who caught it.
    pub witnesses: Vec<Witness>,
    /// What it tried, in one word.
    pub attempt: String,
    /// What that was inferred from.
    pub inferred_from: String,
    /// What its policy has done about it: `alert`, `pause` or `terminate`.
    pub action: String,
    /// The epoch of the guard's policy; absent where it could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// The frame that it was caught with; absent where no frame was needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame: Option<Frame>,
    /// Frames that were dropped before it, oldest first.
    pub before: Vec<Frame>,
}

/// What was done about an incident, and how long it took from the frame on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Which incident.
    pub case: String,
    /// The guest.
    pub guest: String,
    /// What was done.
    pub deed: Deed,
    /// Microseconds from the frame to the guest that stands still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame_to_paused_us: Option<u64>,
    /// Microseconds from the frame to the process that is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame_to_ended_us: Option<u64>,
    /// Microseconds from the frame to the tap that is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame_to_tap_removed_us: Option<u64>,
    /// What went wrong, where something did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Frames that were dropped since, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub since: Vec<Frame>,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deed {
    /// The guest stands still.
    Paused,
    /// It could not be made to.
    PauseFailed,
    /// It has ended.
    Ended,
}

impl Deed {
    /// The word used in JSON and text.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::PauseFailed => "pause_failed",
            Self::Ended => "ended",
        }
    }
}
