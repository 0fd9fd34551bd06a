//! Devices of the kernel's own WireGuard.

use std::io;
use std::num::NonZero;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NetlinkMessage};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute,
    WireguardCmd, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};

use crate::device::moment;
use crate::netlink::Netlink;
use crate::{
    Addresses, AllowedIp, Change, Device, DeviceError, Namespace, Peer, PeerStatus, PublicKey,
    Secret, Setup, Status,
};

/// How many allowed IPs a request may have. Attributes are at most 64 KiB, and one takes 40 bytes.
const AT_ONCE: usize = 512;

/// A device of the kernel's.
#[derive(Debug)]
pub struct Kernel {
    interface: String,
    family: u16,
    generic: Netlink,
    route: Netlink,
}

impl Kernel {
    /// Makes the interface, down and without peers, in the network namespace of this thread.
    ///
    /// # Errors
    /// See [`DeviceError`]; [`DeviceError::NoWireGuard`] where another back end is to be used.
    pub fn create(interface: &str) -> Result<Self, DeviceError> {
        let refused = |action| {
            let interface = interface.to_owned();
            move |source| DeviceError::Refused {
                action,
                interface,
                source,
            }
        };
        let mut route = Netlink::open(NETLINK_ROUTE).map_err(refused("ask the kernel about"))?;
        let mut generic =
            Netlink::open(NETLINK_GENERIC).map_err(refused("ask the kernel about"))?;
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(interface.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
        ];
        let made = route.change(
            RouteNetlinkMessage::NewLink(link),
            NLM_F_CREATE | NLM_F_EXCL,
        );
        made.map_err(|source| match source.raw_os_error() {
            // EOPNOTSUPP: no such kind of interface.
            Some(95) => DeviceError::NoWireGuard,
            _ => refused("create")(source),
        })?;
        let family = family(&mut generic);
        let mut device = Self {
            interface: interface.to_owned(),
            family: 0,
            generic,
            route,
        };
        // From here on dropping removes the interface.
        device.family = family
            .map_err(refused("ask the kernel about"))?
            .ok_or(DeviceError::NoWireGuard)?;
        Ok(device)
    }

    fn set(
        &mut self,
        action: &'static str,
        attributes: Vec<WireguardAttribute>,
    ) -> Result<(), DeviceError> {
        let message = self.message(WireguardCmd::SetDevice, attributes);
        let made = self.generic.change(message, 0);
        made.map_err(|source| self.refused(action, source))
    }

    fn message(
        &self,
        cmd: WireguardCmd,
        mut attributes: Vec<WireguardAttribute>,
    ) -> NetlinkMessage<GenlMessage<WireguardMessage>> {
        attributes.insert(0, WireguardAttribute::IfName(self.interface.clone()));
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        message.set_resolved_family_id(self.family);
        message.finalize();
        message.into()
    }

    fn refused(&self, action: &'static str, source: io::Error) -> DeviceError {
        DeviceError::Refused {
            action,
            interface: self.interface.clone(),
            source,
        }
    }
}

/// The number by which the kernel speaks of WireGuard.
fn family(generic: &mut Netlink) -> io::Result<Option<u16>> {
    let mut question = GenlMessage::from_payload(GenlCtrl {
        cmd: GenlCtrlCmd::GetFamily,
        nlas: vec![GenlCtrlAttrs::FamilyName("wireguard".to_owned())],
    });
    question.finalize();
    let answers = generic.get(question)?;
    let attributes = answers.iter().flat_map(|answer| &answer.payload.nlas);
    Ok(attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        }))
}

impl Device for Kernel {
    const BACK_END: &'static str = "kernel";

    fn interface(&self) -> &str {
        &self.interface
    }

    fn move_to(&mut self, namespace: &Namespace) -> Result<(), DeviceError> {
        let moved = self.route.move_link(&self.interface, namespace);
        moved.map_err(|source| self.refused("move", source))?;
        // By these it is asked and removed where it is now.
        let opened = namespace.within(|| {
            let generic = Netlink::open(NETLINK_GENERIC)?;
            Ok((generic, Netlink::open(NETLINK_ROUTE)?))
        });
        let (generic, route) = opened
            .and_then(|opened: io::Result<_>| opened)
            .map_err(|source| self.refused("reach", source))?;
        self.generic = generic;
        self.route = route;
        Ok(())
    }

    fn set_up(&mut self, setup: &Setup) -> Result<(), DeviceError> {
        self.set(
            "configure",
            vec![
                WireguardAttribute::PrivateKey(*setup.private_key.expose()),
                WireguardAttribute::ListenPort(setup.listen_port.map_or(0, NonZero::get)),
            ],
        )
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), DeviceError> {
        let mut peers = Vec::new();
        let mut size = 0;
        for change in changes {
            for part in parts(change) {
                size += 8 + part.0.iter().map(size_of_attribute).sum::<usize>();
                peers.push(part);
                if size >= AT_ONCE {
                    self.set(
                        "change the peers of",
                        vec![WireguardAttribute::Peers(std::mem::take(&mut peers))],
                    )?;
                    size = 0;
                }
            }
        }
        if peers.is_empty() {
            return Ok(());
        }
        self.set(
            "change the peers of",
            vec![WireguardAttribute::Peers(peers)],
        )
    }

    fn status(&mut self) -> Result<Status, DeviceError> {
        let question = self.message(WireguardCmd::GetDevice, Vec::new());
        let answers = self.generic.dump(question);
        let answers = answers.map_err(|source| self.refused("look at", source))?;
        let mut status = Status::default();
        for attribute in answers
            .into_iter()
            .flat_map(|answer| answer.payload.attributes)
        {
            match attribute {
                WireguardAttribute::ListenPort(port) => status.listen_port = port,
                WireguardAttribute::Peers(peers) => {
                    for peer in peers {
                        take_in(&mut status.peers, peer).map_err(|what| DeviceError::Answer {
                            interface: self.interface.clone(),
                            what,
                        })?;
                    }
                }
                _ => {}
            }
        }
        status.peers.sort_by_key(|status| status.peer.public_key);
        Ok(status)
    }
}

/// How much of [`AT_ONCE`] an attribute takes.
fn size_of_attribute(attribute: &WireguardPeerAttribute) -> usize {
    match attribute {
        WireguardPeerAttribute::AllowedIps(all) => all.len(),
        _ => 0,
    }
}

/// A change as the kernel takes it: in several parts where it has many allowed IPs.
fn parts(change: &Change) -> Vec<WireguardPeer> {
    use WireguardPeerAttribute as Attribute;
    let key = Attribute::PublicKey(*change.public_key().as_bytes());
    let preshared =
        |secret: Option<&Secret>| Attribute::PresharedKey(*secret.map_or(&[0; 32], Secret::expose));
    let keepalive = |seconds: Option<NonZero<u16>>| {
        Attribute::PersistentKeepalive(seconds.map_or(0, NonZero::get))
    };
    let mut first = vec![key.clone()];
    let (flags, allowed) = match change {
        Change::Remove(_) => (WireguardPeerFlags::RemoveMe, None),
        Change::Add(peer) => {
            first.push(preshared(peer.preshared_key.as_ref()));
            first.extend(peer.endpoint.map(Attribute::Endpoint));
            first.push(keepalive(peer.keepalive));
            (
                WireguardPeerFlags::ReplaceAllowedIps,
                Some(&peer.allowed_ips),
            )
        }
        Change::Update(update) => {
            let changed = update.preshared_key.as_ref();
            first.extend(changed.map(|secret| preshared(secret.as_ref())));
            first.extend(update.endpoint.map(Attribute::Endpoint));
            first.extend(update.keepalive.map(keepalive));
            match &update.allowed_ips {
                None => (WireguardPeerFlags::UpdateOnly, None),
                Some(Addresses::More(more)) => (WireguardPeerFlags::UpdateOnly, Some(more)),
                Some(Addresses::Exactly(all)) => (
                    WireguardPeerFlags::UpdateOnly | WireguardPeerFlags::ReplaceAllowedIps,
                    Some(all),
                ),
            }
        }
    };
    first.push(Attribute::Flags(flags));
    let mut parts = vec![WireguardPeer(first)];
    let allowed: Vec<_> = allowed.into_iter().flatten().map(allowed_ip).collect();
    for some in allowed.chunks(AT_ONCE) {
        parts.push(WireguardPeer(vec![
            key.clone(),
            Attribute::Flags(WireguardPeerFlags::UpdateOnly),
            Attribute::AllowedIps(some.to_vec()),
        ]));
    }
    parts
}

fn allowed_ip(allowed: &AllowedIp) -> WireguardAllowedIp {
    let family = if allowed.address().is_ipv4() {
        WireguardAddressFamily::Ipv4
    } else {
        WireguardAddressFamily::Ipv6
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(allowed.address()),
        WireguardAllowedIpAttr::Cidr(allowed.prefix()),
    ])
}

/// Adds one part of what the kernel says of a peer. One with many allowed IPs comes in several.
fn take_in(peers: &mut Vec<PeerStatus>, part: WireguardPeer) -> Result<(), &'static str> {
    let key = part.0.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(*key),
        _ => None,
    });
    let public_key =
        PublicKey::try_from(key.ok_or("a peer without a key")?).map_err(|_| "a key")?;
    if peers
        .last()
        .is_none_or(|last| last.peer.public_key != public_key)
    {
        peers.push(PeerStatus {
            peer: Peer {
                public_key,
                preshared_key: None,
                endpoint: None,
                allowed_ips: Default::default(),
                keepalive: None,
            },
            last_handshake: None,
            sent_bytes: 0,
            received_bytes: 0,
        });
    }
    let status = peers.last_mut().ok_or("no peer")?;
    for attribute in part.0 {
        match attribute {
            WireguardPeerAttribute::PresharedKey(key) if key != [0; 32] => {
                status.peer.preshared_key = Some(Secret::from(key));
            }
            WireguardPeerAttribute::Endpoint(endpoint) => status.peer.endpoint = Some(endpoint),
            WireguardPeerAttribute::PersistentKeepalive(seconds) => {
                status.peer.keepalive = NonZero::new(seconds);
            }
            WireguardPeerAttribute::LastHandshake(time) => {
                let seconds = u64::try_from(time.seconds).unwrap_or(0);
                let nanoseconds = u32::try_from(time.nano_seconds).unwrap_or(0);
                status.last_handshake = moment(seconds, nanoseconds);
            }
            WireguardPeerAttribute::RxBytes(bytes) => status.received_bytes = bytes,
            WireguardPeerAttribute::TxBytes(bytes) => status.sent_bytes = bytes,
            WireguardPeerAttribute::AllowedIps(all) => {
                for one in all {
                    status
                        .peer
                        .allowed_ips
                        .insert(network(&one).ok_or("an allowed IP")?);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn network(one: &WireguardAllowedIp) -> Option<AllowedIp> {
    let mut address = None;
    let mut prefix = None;
    for attribute in &one.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(ip) => address = Some(*ip),
            WireguardAllowedIpAttr::Cidr(bits) => prefix = Some(*bits),
            _ => {}
        }
    }
    AllowedIp::new(address?, prefix?).ok()
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(self.interface.clone())];
        let _ = self.route.change(RouteNetlinkMessage::DelLink(link), 0);
    }
}
