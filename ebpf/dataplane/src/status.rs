//! What `omerta guard show -o json` prints.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::counters::DirectionCounters;

/// One direction's frames.
#[derive(Clone, Debug, Serialize)]
pub struct DirectionStatus {
    /// Everything that came: `allowed + answered + Σ dropped`.
    pub rx: u64,
    /// Passed on.
    pub allowed: u64,
    /// Answered by the guard itself.
    pub answered: u64,
    /// Dropped, by reason; every reason is there.
    pub dropped: BTreeMap<&'static str, u64>,
    /// The guard's own answers that entered again on their way out; not among `rx`.
    pub own_answers: u64,
}

impl From<&DirectionCounters> for DirectionStatus {
    fn from(counters: &DirectionCounters) -> Self {
        Self {
            rx: counters.rx().packets,
            allowed: counters.allowed.packets,
            answered: counters.answered.packets,
            dropped: counters
                .dropped
                .iter()
                .map(|(reason, count)| (reason.word(), count.packets))
                .collect(),
            own_answers: counters.own_answers.packets,
        }
    }
}

/// A guard's policy and counters.
#[derive(Clone, Debug, Serialize)]
pub struct GuardStatus {
    /// The interface's name.
    pub interface: String,
    /// The interface's index.
    pub ifindex: u32,
    /// The word of a [`Standing`](crate::Standing).
    pub state: &'static str,
    /// The mode's word.
    pub mode: &'static str,
    /// Who alone changes and removes the guard.
    pub owner: Option<String>,
    /// The version of the policy.
    pub epoch: u64,
    /// The guest's MAC.
    pub mac: String,
    /// The guest's addresses.
    pub addresses: Vec<String>,
    /// The gateways.
    pub gateways: Vec<String>,
    /// Where the guest's IP frames must go.
    pub gateway_mac: String,
    /// The allowlist, sorted.
    pub allow: Vec<String>,
    /// From the guest.
    pub egress: DirectionStatus,
    /// To the guest.
    pub ingress: DirectionStatus,
    /// Dropped frames of which no event tells.
    pub events_lost: u64,
    /// Those of them that exceeded the guard's rate of events; the others did not fit the ring.
    pub events_limited: u64,
}
