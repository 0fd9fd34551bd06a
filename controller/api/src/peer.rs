//! Consumers' WireGuards, as guests know them.

use omerta_engine::{GuestState, Witness};
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

/// The consumer of one guest. Where WireGuard runs in the guest, what passes is known by the guard, and the tunnel by the
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
    /// What is said of the tunnel; null where nothing has been.
    #[serde(default)]
    pub tunnel: Option<PeerTunnel>,
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

/// What WireGuard says of a tunnel. A guest may say what it likes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerTunnel {
    /// Who says so: the host, of a tunnel that it keeps, or the guest.
    pub witness: Witness,
    /// How many seconds ago.
    pub seen_seconds: u64,
    /// Seconds since the latest handshake; null where there was none.
    pub handshake_seconds: Option<u64>,
    /// Where it sends; null where it does not know.
    pub endpoint: Option<String>,
    /// Seconds between packets that only keep the way open; null where it sends none.
    pub keepalive_seconds: Option<u16>,
    /// Bytes that it has sent, WireGuard's own among them.
    pub sent_bytes: u64,
    /// Bytes that it has received.
    pub received_bytes: u64,
}
