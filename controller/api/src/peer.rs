//! Consumers' WireGuards, as guests know them.

use omerta_engine::GuestState;
use serde::{Deserialize, Serialize};

/// Body of `PUT /v1/guests/{name}/peer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerRequest {
    /// Where the consumer's WireGuard is now: `ADDRESS:PORT`, IPv4, or `NAME:PORT`, a name that omertad resolves and follows.
    pub endpoint: String,
}

/// Answer of `GET /v1/peers`, in order of the guests' names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerList {
    /// The consumer of each guest that lives.
    pub peers: Vec<Peer>,
}

/// The consumer of one guest. WireGuard runs in the guest: what passes there is known by the guard, the handshake by the
/// guest's word alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The guest.
    pub guest: String,
    /// Where the guest stands in its life.
    pub state: GuestState,
    /// The consumer's public key.
    pub public_key: String,
    /// Where its WireGuard is: the one endpoint that the guest may reach.
    pub endpoint: String,
    /// The name that is followed, `NAME:PORT`; null where the address was given.
    #[serde(default)]
    pub name: Option<String>,
    /// Where it was before, latest first.
    pub former_endpoints: Vec<String>,
    /// The guest's own public key; null until it has reported one.
    pub guest_public_key: Option<String>,
    /// Whether the guest has reported a handshake: its own word.
    pub handshake: bool,
    /// Bytes that the guard let pass to the consumer since the guest was guarded; null before, and where it cannot be read.
    pub sent_bytes: Option<u64>,
    /// Bytes that the guard let pass from the consumer.
    pub received_bytes: Option<u64>,
    /// For how many seconds at least the guard has let nothing pass to the consumer, by looks at its counters (each scrape of the
    /// metrics and each list of peers is one): 0 at the first. Null where it cannot be read.
    #[serde(default)]
    pub sent_quiet_seconds: Option<u64>,
    /// The same, from the consumer: a tunnel that is up brings a frame every two minutes.
    #[serde(default)]
    pub received_quiet_seconds: Option<u64>,
}
