//! The smallest change from the peers that a device has to those that it is to have.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::num::NonZero;

use crate::{AllowedIp, Peer, Peers, PublicKey, Secret};

/// One step. Steps are carried out in order; a peer that no step names is not touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The device has it and is not to.
    Remove(PublicKey),
    /// The device has it and is to have it otherwise.
    Update(Update),
    /// The device is to have it.
    Add(Peer),
}

/// What of a peer becomes otherwise. `None` leaves as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update {
    /// Who it is.
    pub public_key: PublicKey,
    /// Another preshared key, or none any more.
    pub preshared_key: Option<Option<Secret>>,
    /// Another endpoint.
    pub endpoint: Option<SocketAddr>,
    /// Other allowed IPs.
    pub allowed_ips: Option<Addresses>,
    /// Another keepalive, or none any more.
    pub keepalive: Option<Option<NonZero<u16>>>,
}

/// How allowed IPs become otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// These come to those that are there.
    More(BTreeSet<AllowedIp>),
    /// These are all. Devices know no way to take single ones that every kernel has.
    Exactly(BTreeSet<AllowedIp>),
}

/// The steps from what a device has to what is wanted.
///
/// Where a peer roamed, the endpoint that the device has is newer than the wanted one. So an endpoint is set only where
/// the wanted one is not what was wanted `before`, or where the device knows none.
///
/// Allowed IPs are first taken from whom they are taken, then given, so that no device moves one by itself.
pub fn plan(before: &Peers, wanted: &Peers, device: &[Peer]) -> Vec<Change> {
    let had: BTreeMap<_, _> = device.iter().map(|peer| (peer.public_key, peer)).collect();
    let mut changes = Vec::new();
    let mut growing = Vec::new();
    for key in had.keys() {
        if wanted.get(key).is_none() {
            changes.push(Change::Remove(*key));
        }
    }
    // What a peer that shrinks and grows at once gains may be another's until that one has shrunk.
    for peer in wanted.iter() {
        let Some(had) = had.get(&peer.public_key) else {
            growing.push(Change::Add(peer.clone()));
            continue;
        };
        let mut update = differences(before.get(&peer.public_key), peer, had);
        let gained: BTreeSet<_> = &peer.allowed_ips - &had.allowed_ips;
        let kept: BTreeSet<_> = &peer.allowed_ips & &had.allowed_ips;
        if kept != had.allowed_ips {
            update.allowed_ips = Some(Addresses::Exactly(kept));
        }
        if update.is_something() {
            changes.push(Change::Update(update));
        }
        if !gained.is_empty() {
            let mut update = Update::nothing(peer.public_key);
            update.allowed_ips = Some(Addresses::More(gained));
            growing.push(Change::Update(update));
        }
    }
    changes.append(&mut growing);
    changes
}

/// Everything but the allowed IPs.
fn differences(before: Option<&Peer>, wanted: &Peer, had: &Peer) -> Update {
    let mut update = Update::nothing(wanted.public_key);
    if wanted.preshared_key != had.preshared_key {
        update.preshared_key = Some(wanted.preshared_key.clone());
    }
    if wanted.keepalive != had.keepalive {
        update.keepalive = Some(wanted.keepalive);
    }
    let wanted_anew = before.is_some_and(|before| before.endpoint != wanted.endpoint);
    if wanted.endpoint.is_some()
        && wanted.endpoint != had.endpoint
        && (wanted_anew || had.endpoint.is_none())
    {
        update.endpoint = wanted.endpoint;
    }
    update
}

impl Update {
    /// One that changes nothing.
    pub const fn nothing(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            allowed_ips: None,
            keepalive: None,
        }
    }

    fn is_something(&self) -> bool {
        *self != Self::nothing(self.public_key)
    }
}

impl Change {
    /// Whom it is about.
    pub const fn public_key(&self) -> PublicKey {
        match self {
            Self::Remove(public_key) => *public_key,
            Self::Update(update) => update.public_key,
            Self::Add(peer) => peer.public_key,
        }
    }
}
