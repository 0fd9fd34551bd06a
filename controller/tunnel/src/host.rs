//! A tunnel that the host keeps for a guest: a network namespace that holds the guest's tap and one end of the tunnel, and
//! no other way out.
//!
//! The device is made where the uplink is and moved in, so its socket stays outside: what is in the namespace reaches the
//! tunnel's far end, in the tunnel, and nothing else, whatever it is routed by.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::netlink::Netlink;
use crate::{
    Change, Device, DeviceError, Kernel, Namespace, Peer, PeerStatus, Peers, PublicKey, Secret,
    Setup, Status, Userspace,
};

/// What every path of today carries, less WireGuard's headers over IPv6.
const MTU: u32 = 1420;

/// What a tunnel is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The interface's name, free where the uplink is and in the guest's namespace.
    pub interface: String,
    /// The consumer.
    pub peer: Peer,
    /// The consumer's address in the tunnel, the one that anything is routed to.
    pub peer_address: Ipv4Addr,
    /// Where a driver in userspace has its socket. What is there is a dead one's, and removed.
    pub directory: PathBuf,
    /// Whom such a driver runs as, and nobody else.
    pub user: u32,
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum HostTunnelError {
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Anything else of the host's.
    #[error("cannot {action} for the tunnel")]
    System {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> HostTunnelError {
    move |source| HostTunnelError::System { action, source }
}

#[derive(Debug)]
enum Driver {
    Kernel(Kernel),
    Userspace(Userspace),
}

/// The host's end of one guest's tunnel. Dropping it removes the interface, and with its driver the key.
#[derive(Debug)]
pub struct HostTunnel {
    driver: Driver,
    public_key: PublicKey,
    peer: Peer,
}

impl HostTunnel {
    /// Makes the device in the namespace of this thread, gives the thread a namespace of its own, for good, and moves the
    /// device there, with a key that is made for it and kept nowhere else, and one peer. By the kernel where that has
    /// WireGuard, and else by wireguard-go, which ends with this thread.
    ///
    /// # Errors
    /// Whatever fails. Nothing is left then but the thread, which may be anywhere and should end.
    pub fn begin(plan: Plan) -> Result<Self, HostTunnelError> {
        let driver = match Kernel::create(&plan.interface) {
            Ok(kernel) => Driver::Kernel(kernel),
            Err(DeviceError::NoWireGuard) => {
                remove_left_over(&plan.directory).map_err(failed("remove an old socket"))?;
                let made = Userspace::create(&plan.interface, &plan.directory, plan.user, true);
                Driver::Userspace(made?)
            }
            Err(error) => return Err(error.into()),
        };
        let private_key = Secret::generate().map_err(failed("make a key"))?;
        let mut tunnel = Self {
            driver,
            public_key: private_key.public_key(),
            peer: plan.peer.clone(),
        };
        let namespace = Namespace::for_this_thread().map_err(failed("make a namespace"))?;
        shut_down_ipv6_and_forward().map_err(failed("set up the namespace"))?;
        let setup = Setup {
            private_key,
            listen_port: None,
        };
        let mut wanted = Peers::new();
        let (interface, peer_address) = (plan.interface, plan.peer_address);
        // Of one, nothing can conflict.
        wanted
            .add(plan.peer)
            .map_err(|conflict| failed("have the peer")(io::Error::other(conflict)))?;
        match &mut tunnel.driver {
            Driver::Kernel(device) => fill(device, &namespace, &setup, &wanted),
            Driver::Userspace(device) => fill(device, &namespace, &setup, &wanted),
        }?;
        bring_up(&interface, peer_address).map_err(failed("bring up the interface"))?;
        Ok(tunnel)
    }

    /// What the consumer must know of it.
    pub const fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// Which back end drives it, for people.
    pub const fn back_end(&self) -> &'static str {
        match self.driver {
            Driver::Kernel(_) => Kernel::BACK_END,
            Driver::Userspace(_) => Userspace::BACK_END,
        }
    }

    /// What the device says of the consumer.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn consumer(&mut self) -> Result<PeerStatus, DeviceError> {
        let (status, interface) = match &mut self.driver {
            Driver::Kernel(device) => (device.status()?, device.interface()),
            Driver::Userspace(device) => (device.status()?, device.interface()),
        };
        let found = Status::peer(&status, &self.peer.public_key).cloned();
        found.ok_or_else(|| DeviceError::Answer {
            interface: interface.to_owned(),
            what: "its peer is not there",
        })
    }

    /// Has the peer shake hands from the beginning, at once. What was under way with it is forgotten.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn try_anew(&mut self) -> Result<(), DeviceError> {
        let changes = [
            Change::Remove(self.peer.public_key),
            Change::Add(self.peer.clone()),
        ];
        match &mut self.driver {
            Driver::Kernel(device) => device.apply(&changes),
            Driver::Userspace(device) => device.apply(&changes),
        }
    }

    /// When the consumer has last shaken hands.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn last_handshake(&mut self) -> Result<Option<SystemTime>, DeviceError> {
        self.consumer().map(|consumer| consumer.last_handshake)
    }

    /// Where the consumer is, which it proves by its key.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn endpoint(&mut self) -> Result<Option<SocketAddr>, DeviceError> {
        self.consumer().map(|consumer| consumer.peer.endpoint)
    }
}

fn fill(
    device: &mut impl Device,
    namespace: &Namespace,
    setup: &Setup,
    wanted: &Peers,
) -> Result<(), DeviceError> {
    device.move_to(namespace)?;
    device.set_up(setup)?;
    device.sync(&Peers::new(), wanted).map(drop)
}

fn remove_left_over(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Of this thread's namespace.
fn shut_down_ipv6_and_forward() -> io::Result<()> {
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        if Path::new(&path).exists() {
            fs::write(path, "1")?;
        }
    }
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")
}

/// Sets the interface of this thread's namespace up, and routes the consumer's address to it.
fn bring_up(interface: &str, consumer: Ipv4Addr) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(interface)?;
    let mut netlink = Netlink::open(NETLINK_ROUTE)?;
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes = vec![LinkAttribute::Mtu(MTU)];
    netlink.change(RouteNetlinkMessage::SetLink(link), 0)?;
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: 32,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Link,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    route.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(consumer)),
        RouteAttribute::Oif(index),
    ];
    netlink.change(
        RouteNetlinkMessage::NewRoute(route),
        NLM_F_CREATE | NLM_F_EXCL,
    )
}
