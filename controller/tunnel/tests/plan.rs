//! The plan from what a device has to what it is to have, carried out on a model of a device that moves allowed IPs as
//! WireGuard does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZero;

use omerta_tunnel::{Addresses, AllowedIp, Change, Peer, Peers, PublicKey, Secret, plan};
use proptest::prelude::*;

/// A device, and the allowed IPs that it took from one peer for another.
#[derive(Clone, Debug, Default)]
struct Device {
    peers: BTreeMap<PublicKey, Peer>,
    moved: Vec<AllowedIp>,
}

impl Device {
    fn of(peers: &Peers) -> Self {
        let peers = peers.iter().map(|peer| (peer.public_key, peer.clone()));
        Self {
            peers: peers.collect(),
            moved: Vec::new(),
        }
    }

    fn carry_out(&mut self, change: &Change) {
        match change {
            Change::Remove(key) => assert!(self.peers.remove(key).is_some(), "removed twice"),
            Change::Add(peer) => {
                for allowed_ip in &peer.allowed_ips {
                    self.take(*allowed_ip);
                }
                let before = self.peers.insert(peer.public_key, peer.clone());
                assert!(before.is_none(), "added where it was");
            }
            Change::Update(update) => {
                if let Some(Addresses::More(more)) = &update.allowed_ips {
                    for allowed_ip in more {
                        self.take(*allowed_ip);
                    }
                }
                let peer = self
                    .peers
                    .get_mut(&update.public_key)
                    .expect("updated and not there");
                if let Some(preshared_key) = &update.preshared_key {
                    peer.preshared_key.clone_from(preshared_key);
                }
                if let Some(keepalive) = update.keepalive {
                    peer.keepalive = keepalive;
                }
                peer.endpoint = update.endpoint.or(peer.endpoint);
                match &update.allowed_ips {
                    None => {}
                    Some(Addresses::More(more)) => peer.allowed_ips.extend(more),
                    Some(Addresses::Exactly(all)) => peer.allowed_ips.clone_from(all),
                }
            }
        }
    }

    fn take(&mut self, allowed_ip: AllowedIp) {
        for peer in self.peers.values_mut() {
            if peer.allowed_ips.remove(&allowed_ip) {
                self.moved.push(allowed_ip);
            }
        }
    }

    fn peers(&self) -> Vec<Peer> {
        self.peers.values().cloned().collect()
    }
}

fn peer() -> impl Strategy<Value = Peer> {
    let allowed = proptest::collection::btree_set(
        (0u8..12).prop_map(|n| AllowedIp::host(IpAddr::V4(Ipv4Addr::new(10, 0, 0, n)))),
        0..4,
    );
    let endpoint = proptest::option::of((1u8..4).prop_map(|n| ([192, 0, 2, n], 51820).into()));
    let preshared = proptest::option::of((1u8..3).prop_map(|n| Secret::from([n; 32])));
    let keepalive = (0u16..3).prop_map(NonZero::new);
    (1u8..9, preshared, endpoint, allowed, keepalive).prop_map(
        |(key, preshared_key, endpoint, allowed_ips, keepalive)| Peer {
            public_key: PublicKey::try_from([key; 32]).unwrap(),
            preshared_key,
            endpoint,
            allowed_ips,
            keepalive,
        },
    )
}

/// As many of the peers as do not conflict.
fn peers() -> impl Strategy<Value = Peers> {
    proptest::collection::vec(peer(), 0..10).prop_map(|drawn| {
        let mut peers = Peers::new();
        for peer in drawn {
            let _ = peers.add(peer);
        }
        peers
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_device_comes_to_have_what_is_wanted_and_nothing_moves_by_itself(had in peers(), wanted in peers()) {
        let mut device = Device::of(&had);
        for change in plan(&had, &wanted, &device.peers()) {
            device.carry_out(&change);
        }
        prop_assert_eq!(&device.moved, &[]);
        let keys: BTreeSet<_> = device.peers.keys().copied().collect();
        prop_assert_eq!(keys, wanted.iter().map(|peer| peer.public_key).collect());
        for peer in wanted.iter() {
            let mut has = device.peers[&peer.public_key].clone();
            if peer.endpoint.is_none() {
                has.endpoint = None;
            }
            prop_assert_eq!(&has, peer);
        }
        prop_assert_eq!(plan(&wanted, &wanted, &device.peers()), []);
    }

    #[test]
    fn a_peer_that_stays_as_it_is_is_not_touched(had in peers(), wanted in peers()) {
        let changes = plan(&had, &wanted, &Device::of(&had).peers());
        for peer in wanted.iter() {
            if had.get(&peer.public_key) == Some(peer) {
                prop_assert!(changes.iter().all(|change| change.public_key() != peer.public_key));
            }
        }
    }

    #[test]
    fn a_peer_that_roamed_stays_where_it_is_until_another_endpoint_is_wanted(peers in peers(), port in 1u16..) {
        let mut device = Device::of(&peers);
        for peer in device.peers.values_mut() {
            peer.endpoint = Some(([198, 51, 100, 7], port).into());
        }
        // Also by an omertad that does not know what was wanted before.
        for before in [&peers, &Peers::new()] {
            prop_assert_eq!(plan(before, &peers, &device.peers()), []);
        }
        for peer in peers.iter().filter(|peer| peer.endpoint.is_some()) {
            let mut wanted = peers.clone();
            let moved = Peer { endpoint: Some(([203, 0, 113, 9], port).into()), ..peer.clone() };
            wanted.put(moved.clone()).unwrap();
            let changes = plan(&peers, &wanted, &device.peers());
            let [Change::Update(update)] = &changes[..] else { panic!("{changes:?}") };
            prop_assert_eq!(update.endpoint, moved.endpoint);
            prop_assert_eq!(&update.allowed_ips, &None);
        }
    }
}
