//! Which peers a device is to have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::num::NonZero;

use crate::{AllowedIp, PublicKey, Secret};

/// One peer of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who it is.
    pub public_key: PublicKey,
    /// What both know beside their keys.
    pub preshared_key: Option<Secret>,
    /// Where it is reached.
    pub endpoint: Option<SocketAddr>,
    /// Whose packets are its own.
    pub allowed_ips: BTreeSet<AllowedIp>,
    /// Seconds between packets that only keep the way open.
    pub keepalive: Option<NonZero<u16>>,
}

/// The peers that a device is to have. No two share a key or an allowed IP: a device would move it from one to the other
/// without a word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    peers: BTreeMap<PublicKey, Peer>,
    owners: BTreeMap<AllowedIp, PublicKey>,
}

/// Why a peer cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// There is a peer with its key.
    #[error("peer {0} exists: change it, or remove it first")]
    Key(PublicKey),
    /// Another peer has one of its allowed IPs.
    #[error("allowed IP {allowed_ip} is peer {owner}'s: take it from that one first")]
    AllowedIp {
        /// What both want.
        allowed_ip: AllowedIp,
        /// Who has it.
        owner: PublicKey,
    },
}

impl Peers {
    /// No peers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a peer.
    ///
    /// # Errors
    /// Another has its key or an allowed IP of it; nothing has changed then.
    pub fn add(&mut self, peer: Peer) -> Result<(), Conflict> {
        if self.peers.contains_key(&peer.public_key) {
            return Err(Conflict::Key(peer.public_key));
        }
        for allowed_ip in &peer.allowed_ips {
            if let Some(&owner) = self.owners.get(allowed_ip) {
                return Err(Conflict::AllowedIp {
                    allowed_ip: *allowed_ip,
                    owner,
                });
            }
        }
        for allowed_ip in &peer.allowed_ips {
            self.owners.insert(*allowed_ip, peer.public_key);
        }
        self.peers.insert(peer.public_key, peer);
        Ok(())
    }

    /// Puts a peer in the place of the one with its key, or adds it.
    ///
    /// # Errors
    /// Another peer has an allowed IP of it; nothing has changed then.
    pub fn put(&mut self, peer: Peer) -> Result<(), Conflict> {
        let before = self.remove(&peer.public_key);
        let outcome = self.add(peer);
        if let (Err(_), Some(before)) = (&outcome, before) {
            // It was there a moment ago, so it has no conflict.
            self.add(before)?;
        }
        outcome
    }

    /// Removes a peer.
    pub fn remove(&mut self, public_key: &PublicKey) -> Option<Peer> {
        let peer = self.peers.remove(public_key)?;
        for allowed_ip in &peer.allowed_ips {
            self.owners.remove(allowed_ip);
        }
        Some(peer)
    }

    /// The peer with that key.
    pub fn get(&self, public_key: &PublicKey) -> Option<&Peer> {
        self.peers.get(public_key)
    }

    /// Every peer, in order of key.
    pub fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(key: u8, allowed: &[&str]) -> Peer {
        Peer {
            public_key: PublicKey::try_from([key; 32]).unwrap(),
            preshared_key: None,
            endpoint: None,
            allowed_ips: allowed.iter().map(|text| text.parse().unwrap()).collect(),
            keepalive: None,
        }
    }

    #[test]
    fn a_key_and_an_allowed_ip_have_one_owner() {
        let mut peers = Peers::new();
        peers.add(peer(1, &["10.0.0.1", "10.0.0.2"])).unwrap();
        assert!(matches!(peers.add(peer(1, &[])), Err(Conflict::Key(_))));
        let before = peers.clone();
        let refused = peers.add(peer(2, &["10.0.0.3", "10.0.0.2/32"]));
        assert!(
            matches!(refused, Err(Conflict::AllowedIp { .. })),
            "{refused:?}"
        );
        assert_eq!(peers, before, "half a peer was added");
        peers.add(peer(2, &["10.0.0.0/24"])).unwrap();
    }

    #[test]
    fn what_a_removed_peer_had_is_free() {
        let mut peers = Peers::new();
        peers.add(peer(1, &["10.0.0.1"])).unwrap();
        peers.remove(&peer(1, &[]).public_key).unwrap();
        peers.add(peer(2, &["10.0.0.1"])).unwrap();
        assert_eq!(peers.len(), 1);
    }

    #[test]
    fn a_refused_replacement_leaves_the_peer_as_it_was() {
        let mut peers = Peers::new();
        peers.add(peer(1, &["10.0.0.1"])).unwrap();
        peers.add(peer(2, &["10.0.0.2"])).unwrap();
        let before = peers.clone();
        assert!(peers.put(peer(2, &["10.0.0.1"])).is_err());
        assert_eq!(peers, before);
        peers.put(peer(2, &["10.0.0.3"])).unwrap();
        peers.add(peer(3, &["10.0.0.2"])).unwrap();
    }
}
