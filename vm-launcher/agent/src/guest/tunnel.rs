//! The WireGuard interfaces that the kernel has: each one's key, and its peers with what they are allowed. Where a
//! peer is may change by itself (it roams), and when it was heard.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};

use super::SealError;
use super::netlink::{Netlink, attribute, attributes, encoded};

const GENERIC_CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const GET_DEVICE: u8 = 0;
const DEVICE_NAME: u16 = 2;
const DEVICE_PUBLIC_KEY: u16 = 4;
const DEVICE_PEERS: u16 = 8;
const PEER_PUBLIC_KEY: u16 = 1;
const PEER_PRESHARED_KEY: u16 = 2;
const PEER_LAST_HANDSHAKE: u16 = 6;
const PEER_ALLOWED: u16 = 9;
const GENERIC_HEADER: usize = 4;
const GET_LINK: u16 = 18;
const LINK_HEADER: usize = 16;
const LINK_NAME: u16 = 3;
const LINK_INFO: u16 = 18;
const INFO_KIND: u16 = 1;

/// Asks for tunnels.
pub(crate) struct Tunnels {
    generic: Netlink,
    route: Netlink,
}

/// What is known of the tunnels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    devices: BTreeMap<Vec<u8>, Device>,
    /// Whether a peer has ever shaken hands.
    pub(crate) shaken: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Device {
    key: Vec<u8>,
    peers: BTreeMap<Vec<u8>, BTreeSet<Vec<u8>>>,
}

impl Known {
    /// Whether `now` is the same. Until the first handshake a device may be without its peers: the image takes
    /// them away and sets them anew, which makes WireGuard try again at once.
    pub(crate) fn is_still(&self, now: &Self) -> bool {
        self.devices.len() == now.devices.len()
            && self.devices.iter().all(|(name, device)| {
                now.devices.get(name).is_some_and(|other| {
                    device.key == other.key
                        && (device.peers == other.peers || (!self.shaken && other.peers.is_empty()))
                })
            })
    }
}

impl Tunnels {
    pub(crate) fn open() -> Result<Self, SealError> {
        Ok(Self {
            generic: Netlink::open(NETLINK_GENERIC, &[])?,
            route: Netlink::open(NETLINK_ROUTE, &[])?,
        })
    }

    /// What is there once each device has its peers, or `patience` is over: an agent that begins while the image
    /// sets them anew would take their coming back for a change.
    pub(crate) fn settled(&mut self, patience: Duration) -> Result<Known, SealError> {
        let end = Instant::now() + patience;
        loop {
            let known = self.look()?;
            if known
                .devices
                .values()
                .all(|device| !device.peers.is_empty())
                || Instant::now() > end
            {
                return Ok(known);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn look(&mut self) -> Result<Known, SealError> {
        let mut known = Known::default();
        let Some(family) = self.family()? else {
            return Ok(known);
        };
        for name in self.devices()? {
            let question = [&[GET_DEVICE, 1, 0, 0][..], &encoded(DEVICE_NAME, &name)].concat();
            // Gone meanwhile.
            let Some(parts) = self.generic.dump(family, &question)? else {
                continue;
            };
            let mut device = Device::default();
            for part in parts {
                let fields = part.get(GENERIC_HEADER..).ok_or(SealError::Short)?;
                known.shaken |= take_in(&mut device, fields);
            }
            known.devices.insert(name, device);
        }
        Ok(known)
    }

    /// The number by which the kernel speaks of WireGuard; `None` where it cannot.
    fn family(&mut self) -> Result<Option<u16>, SealError> {
        let question = [
            &[GET_FAMILY, 1, 0, 0][..],
            &encoded(FAMILY_NAME, b"wireguard\0"),
        ]
        .concat();
        let Some(answer) = self.generic.get(GENERIC_CONTROL, &question)? else {
            return Ok(None);
        };
        let fields = answer.get(GENERIC_HEADER..).ok_or(SealError::Short)?;
        Ok(attribute(fields, FAMILY_ID)
            .and_then(|id| id.first_chunk().map(|id| u16::from_ne_bytes(*id))))
    }

    /// The names of the WireGuard interfaces, each with its zero.
    fn devices(&mut self) -> Result<Vec<Vec<u8>>, SealError> {
        let links = self
            .route
            .dump(GET_LINK, &[0; LINK_HEADER])?
            .unwrap_or_default();
        Ok(links
            .iter()
            .filter_map(|link| {
                let fields = link.get(LINK_HEADER..)?;
                let kind = attribute(&attribute(fields, LINK_INFO)?, INFO_KIND)?;
                (kind.strip_suffix(b"\0").unwrap_or(&kind) == b"wireguard")
                    .then(|| attribute(fields, LINK_NAME))?
            })
            .collect())
    }
}

/// Adds one part of a device; whether it tells of a handshake. A peer with much to be allowed comes in several.
fn take_in(device: &mut Device, fields: &[u8]) -> bool {
    let mut shaken = false;
    for field in attributes(fields) {
        match field.kind() {
            DEVICE_PUBLIC_KEY => device.key = field.value().to_vec(),
            DEVICE_PEERS => {
                for peer in attributes(field.value()) {
                    let peer = peer.value();
                    let key = attribute(peer, PEER_PUBLIC_KEY).unwrap_or_default();
                    let facts = device.peers.entry(key).or_default();
                    // A second part has none.
                    if let Some(preshared) = attribute(peer, PEER_PRESHARED_KEY) {
                        facts.insert(preshared);
                    }
                    let allowed = attribute(peer, PEER_ALLOWED).unwrap_or_default();
                    facts.extend(attributes(&allowed).map(|one| one.value().to_vec()));
                    shaken |= attribute(peer, PEER_LAST_HANDSHAKE)
                        .is_some_and(|time| time.iter().any(|byte| *byte != 0));
                }
            }
            _ => {}
        }
    }
    shaken
}
