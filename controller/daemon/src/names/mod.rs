//! Consumers by name: the provider resolves the name, and the guest's allowlist follows what it says, where that may be.
//!
//! Whoever holds the name says where a guest may send to, so an answer is judged as hostile: see [`judge`].

mod follow;
mod judge;
mod resolve;

use std::net::SocketAddr;
use std::time::Duration;

use omerta_tunnel::AllowedIp;

pub(crate) use follow::{Follower, Naming};
use judge::OwnNetworks;

/// How names are resolved, and where they may lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NameSettings {
    /// Who is asked; those of /etc/resolv.conf where none is named.
    pub(crate) nameservers: Vec<SocketAddr>,
    /// An answer is taken for true for so long at least, whatever it says.
    pub(crate) least: Duration,
    /// And for so long at most.
    pub(crate) most: Duration,
    /// Where no consumer by name is, beside the networks of this host's interfaces.
    pub(crate) forbid: Vec<AllowedIp>,
    /// Of these and those, where one may be all the same.
    pub(crate) allow: Vec<AllowedIp>,
}

/// A consumer's WireGuard by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerName {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl std::fmt::Display for PeerName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl NameSettings {
    /// When a name is asked again that was answered so.
    fn until(&self, ttl: Duration) -> Duration {
        ttl.clamp(self.least, self.most)
    }
}
