//! Two devices that are each other's peers, in two namespaces with a cable between.

use std::io::Write;
use std::net::UdpSocket;
use std::num::NonZero;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use omerta_test_support::{Namespace, Veth};
use omerta_tunnel::{
    AllowedIp, Device, DeviceError, Kernel, Peer, PeerStatus, Peers, PublicKey, Secret, Setup,
    Userspace,
};
use tempfile::TempDir;

/// Whom userspace devices run as here: a user of nobody's.
pub const USER: u32 = 64_999;

/// A back end, and how a device of it is made.
pub trait Make: Device + Sized + Send {
    fn make(interface: &str, directory: &Path) -> Result<Self, DeviceError>;
}

impl Make for Userspace {
    fn make(interface: &str, directory: &Path) -> Result<Self, DeviceError> {
        Self::create(interface, &directory.join(interface), USER, false)
    }
}

impl Make for Kernel {
    fn make(interface: &str, _: &Path) -> Result<Self, DeviceError> {
        Self::create(interface)
    }
}

pub fn kernel_has_wireguard() -> bool {
    let namespace = Namespace::new("wghas").unwrap();
    let made = namespace
        .enter(|| Kernel::create("omhas0").map(drop))
        .unwrap();
    match made {
        Ok(()) => true,
        Err(DeviceError::NoWireGuard) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A private key.
pub fn key(n: u16) -> Secret {
    let mut bytes = [7; 32];
    bytes[1..3].copy_from_slice(&n.to_be_bytes());
    // As every key is made (RFC 7748), so that it comes back as it was given.
    bytes[0] &= 0xf8;
    bytes[31] = (bytes[31] & 0x7f) | 0x40;
    Secret::from(bytes)
}

/// By WireGuard's own tools.
pub fn public_of(private: &Secret) -> PublicKey {
    let mut child = Command::new("wg")
        .arg("pubkey")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("wireguard-tools");
    child
        .stdin
        .take()
        .unwrap()
        .write_all(private.base64().as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// A peer that is nobody.
pub fn stranger(n: u16) -> Peer {
    let mut bytes = [0x55; 32];
    bytes[1..3].copy_from_slice(&n.to_be_bytes());
    let [high, low] = n.to_be_bytes();
    Peer {
        public_key: PublicKey::try_from(bytes).unwrap(),
        preshared_key: None,
        endpoint: None,
        allowed_ips: [AllowedIp::host([10, 200, high, low].into())].into(),
        keepalive: None,
    }
}

/// One of two.
pub struct Side<D> {
    // Before the namespace that it is in.
    pub device: D,
    pub peers: Peers,
    pub namespace: Namespace,
    other: &'static str,
    own: &'static str,
    _directory: TempDir,
}

pub struct Pair<D> {
    pub near: Side<D>,
    pub far: Side<D>,
}

impl<D: Make> Pair<D> {
    /// Two that know each other's keys and endpoints, and have not spoken.
    pub fn new() -> Self {
        let namespaces = [
            Namespace::new("wgnear").unwrap(),
            Namespace::new("wgfar").unwrap(),
        ];
        let [near, far] = namespaces;
        Veth::across((&near, "near"), (&far, "far")).unwrap();
        for (namespace, commands) in [
            (
                &near,
                ["address add 192.0.2.1/24 dev near", "link set near up"],
            ),
            (
                &far,
                ["address add 192.0.2.2/24 dev far", "link set far up"],
            ),
        ] {
            for command in commands {
                namespace.ip(command).unwrap();
            }
        }
        let mut near = Side::<D>::new(near, key(1), "10.9.0.1", "10.9.0.2");
        let mut far = Side::<D>::new(far, key(2), "10.9.0.2", "10.9.0.1");
        let (near_port, far_port) = (near.port(), far.port());
        near.meet(public_of(&key(2)), ([192, 0, 2, 2], far_port).into());
        far.meet(public_of(&key(1)), ([192, 0, 2, 1], near_port).into());
        Self { near, far }
    }

    /// Whether a datagram of each side's arrives at the other in time.
    pub fn speaks(&mut self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let hear = |side: &Side<D>| {
            let own = side.own;
            let socket = side
                .namespace
                .enter(|| UdpSocket::bind((own, 7)).unwrap())
                .unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            socket
        };
        let (near, far) = (hear(&self.near), hear(&self.far));
        let mut heard = [false; 2];
        while heard != [true; 2] && Instant::now() < end {
            self.near.say(b"ping");
            self.far.say(b"pong");
            let mut bytes = [0; 16];
            heard[0] |= near.recv(&mut bytes).is_ok();
            heard[1] |= far.recv(&mut bytes).is_ok();
        }
        heard == [true; 2]
    }
}

impl<D: Make> Side<D> {
    fn new(
        namespace: Namespace,
        private_key: Secret,
        own: &'static str,
        other: &'static str,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut device = namespace
            .enter(|| D::make("omtest0", directory.path()))
            .unwrap()
            .unwrap();
        let listen_port = NonZero::new(51820);
        device
            .set_up(&Setup {
                private_key,
                listen_port,
            })
            .unwrap();
        namespace
            .ip(&format!("address add {own}/24 dev omtest0"))
            .unwrap();
        namespace.ip("link set omtest0 mtu 1420 up").unwrap();
        Self {
            device,
            peers: Peers::new(),
            namespace,
            other,
            own,
            _directory: directory,
        }
    }

    fn meet(&mut self, public_key: PublicKey, endpoint: std::net::SocketAddr) {
        let peer = Peer {
            public_key,
            preshared_key: None,
            endpoint: Some(endpoint),
            allowed_ips: [AllowedIp::host(self.other.parse().unwrap())].into(),
            keepalive: None,
        };
        let mut wanted = Peers::new();
        wanted.add(peer).unwrap();
        self.device.sync(&self.peers, &wanted).unwrap();
        self.peers = wanted;
    }

    /// Wants the other otherwise.
    pub fn want(&mut self, edit: impl FnOnce(&mut Peer)) {
        let mut peer = self.peers.iter().next().unwrap().clone();
        edit(&mut peer);
        let mut wanted = Peers::new();
        wanted.add(peer).unwrap();
        self.device.sync(&self.peers, &wanted).unwrap();
        self.peers = wanted;
    }

    /// What the device says of the other.
    pub fn status(&mut self) -> PeerStatus {
        let status = self.device.status().unwrap();
        let key = self.peers.iter().next().unwrap().public_key;
        status.peer(&key).unwrap().clone()
    }

    pub fn port(&mut self) -> u16 {
        self.device.status().unwrap().listen_port
    }

    /// Sends a datagram to the other. What there is no way for is not sent.
    pub fn say(&self, bytes: &[u8]) {
        let own = self.own;
        let socket = self
            .namespace
            .enter(|| UdpSocket::bind((own, 0)).unwrap())
            .unwrap();
        let _ = socket.send_to(bytes, (self.other, 7));
    }
}
