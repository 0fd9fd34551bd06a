//! Tunnels that the host keeps, by the kernel where it has WireGuard and else by wireguard-go. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    dead_code,
    reason = "helpers of tests"
)]

mod stage;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::num::NonZero;
use std::path::Path;
use std::time::{Duration, Instant};

use omerta_test_support::{Namespace, Veth};
use omerta_tunnel::{
    AllowedIp, Device, HostTunnel, Peer, Peers, Plan, PublicKey, Setup, Userspace,
};
use stage::{Make, USER, key};

const CONSUMER: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 2);

/// A provider and a consumer with a cable between.
struct Stage {
    consumer: Userspace,
    far: Namespace,
    near: Namespace,
    directory: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let (near, far) = (
            Namespace::new("wghost").unwrap(),
            Namespace::new("wgcons").unwrap(),
        );
        Veth::across((&near, "near"), (&far, "far")).unwrap();
        near.ip("address add 192.0.2.1/24 dev near").unwrap();
        near.ip("link set near up").unwrap();
        far.ip("address add 192.0.2.2/24 dev far").unwrap();
        far.ip("link set far up").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut consumer = far
            .enter(|| Userspace::make("omcons0", directory.path()))
            .unwrap()
            .unwrap();
        let setup = Setup {
            private_key: key(2),
            listen_port: NonZero::new(51820),
        };
        consumer.set_up(&setup).unwrap();
        far.ip("address add 10.66.0.1/24 dev omcons0").unwrap();
        far.ip("link set omcons0 up").unwrap();
        Self {
            consumer,
            far,
            near,
            directory,
        }
    }

    fn plan(&self) -> Plan {
        Plan {
            interface: "omwhost0".into(),
            peer: Peer {
                public_key: key(2).public_key(),
                preshared_key: None,
                endpoint: Some("192.0.2.2:51820".parse().unwrap()),
                allowed_ips: [AllowedIp::host(CONSUMER.into())].into(),
                keepalive: NonZero::new(25),
            },
            peer_address: CONSUMER,
            directory: self.directory.path().join("host"),
            user: USER - 1,
        }
    }

    /// What the consumer does once it knows the provider's key.
    fn meet(&mut self, public_key: PublicKey) {
        let mut wanted = Peers::new();
        let peer = Peer {
            public_key,
            preshared_key: None,
            endpoint: None,
            allowed_ips: [AllowedIp::host(GUEST.into())].into(),
            keepalive: None,
        };
        wanted.add(peer).unwrap();
        self.consumer.sync(&Peers::new(), &wanted).unwrap();
    }

    /// Does `work` with a tunnel, in its namespace, on a thread as a guest's.
    fn with_tunnel<T: Send>(&mut self, work: impl FnOnce(&mut Self, HostTunnel) -> T + Send) -> T {
        let near = self.near.path();
        let host = Path::new(&near).to_owned();
        let stage = &mut *self;
        std::thread::scope(|threads| {
            let work = move || {
                let file = std::fs::File::open(host).unwrap();
                nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                let tunnel = HostTunnel::begin(stage.plan()).unwrap();
                work(stage, tunnel)
            };
            threads.spawn(work).join().unwrap()
        })
    }
}

fn interfaces() -> Vec<String> {
    let all = nix::net::if_::if_nameindex().unwrap();
    let mut names: Vec<String> = all
        .iter()
        .map(|interface| interface.name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn ip(arguments: &str) {
    let done = std::process::Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(done.success(), "ip {arguments}");
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Sends from the guest's address until the consumer answers.
fn speak(stage: &Stage) {
    let far = stage
        .far
        .enter(|| UdpSocket::bind((CONSUMER, 7)).unwrap())
        .unwrap();
    far.set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let near = UdpSocket::bind((GUEST, 0)).unwrap();
    let mut bytes = [0; 8];
    until("a datagram through the tunnel", || {
        near.send_to(b"ping", (CONSUMER, 7)).unwrap();
        far.recv_from(&mut bytes)
            .is_ok_and(|(_, from)| from.ip() == GUEST)
    });
}

#[test]
fn a_namespace_holds_one_end_of_the_tunnel_and_no_other_way_out() {
    let mut stage = Stage::new();
    stage.with_tunnel(|stage, mut tunnel| {
        println!("back end: {}", tunnel.back_end());
        let interfaces = interfaces();
        assert!(
            interfaces.contains(&"omwhost0".to_owned()),
            "{interfaces:?}"
        );
        let devices = ["near", "far", "omcons0"];
        assert!(
            !interfaces
                .iter()
                .any(|name| devices.contains(&name.as_str())),
            "{interfaces:?}"
        );
        assert!(stage.near.ip("link show omwhost0").is_err(), "it was moved");
        ip("address add 10.66.0.2/32 dev omwhost0");
        assert_eq!(tunnel.last_handshake().unwrap(), None);
        stage.meet(tunnel.public_key());
        until("a handshake", || tunnel.last_handshake().unwrap().is_some());
        speak(stage);
        // The path of the tunnel itself, and anything else, is none of what is in here.
        let socket = UdpSocket::bind((GUEST, 0)).unwrap();
        for outside in [
            "192.0.2.2:51820",
            "192.0.2.1:7",
            "10.66.0.3:7",
            "9.9.9.9:53",
        ] {
            let error = socket.send_to(b"out", outside).unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(nix::libc::ENETUNREACH),
                "{outside}"
            );
        }
        drop(tunnel);
        assert!(!self::interfaces().contains(&"omwhost0".to_owned()));
    });
    assert!(!stage.directory.path().join("host").exists());
}

#[test]
fn every_tunnel_has_a_key_of_its_own_and_leaves_it_in_no_file() {
    let mut stage = Stage::new();
    let first = stage.with_tunnel(|_, tunnel| tunnel.public_key());
    stage.with_tunnel(|stage, tunnel| {
        assert_ne!(tunnel.public_key(), first);
        let files = stage.directory.path().join("host");
        if files.exists() {
            let names: Vec<_> = std::fs::read_dir(files)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            assert_eq!(names, ["omwhost0.sock"]);
        }
    });
}

#[test]
fn the_recorded_endpoint_follows_a_consumer_that_moves() {
    let mut stage = Stage::new();
    stage.with_tunnel(|stage, mut tunnel| {
        ip("address add 10.66.0.2/32 dev omwhost0");
        stage.meet(tunnel.public_key());
        speak(stage);
        let was: SocketAddr = "192.0.2.2:51820".parse().unwrap();
        assert_eq!(tunnel.endpoint().unwrap(), Some(was));
        stage.far.ip("address del 192.0.2.2/24 dev far").unwrap();
        stage.far.ip("address add 192.0.2.3/24 dev far").unwrap();
        let moved: SocketAddr = "192.0.2.3:51820".parse().unwrap();
        let say = || {
            let socket = UdpSocket::bind((CONSUMER, 0)).unwrap();
            // On its way to who may not listen.
            let _ = socket.send_to(b"here", (GUEST, 7));
        };
        until("the move", || {
            stage.far.enter(say).unwrap();
            tunnel.endpoint().unwrap() == Some(moved)
        });
        speak(stage);
    });
}

#[test]
fn the_driver_ends_with_the_thread_that_has_the_tunnel() {
    let mut stage = Stage::new();
    // As a thread that is killed: nothing is dropped.
    stage.with_tunnel(|_, tunnel| std::mem::forget(tunnel));
    if stage::kernel_has_wireguard() {
        return;
    }
    let socket = stage.directory.path().join("host/omwhost0.sock");
    until("the end of the driver", || {
        std::os::unix::net::UnixStream::connect(&socket).is_err()
    });
    // And what it has left is in nobody's way.
    stage.with_tunnel(|_, tunnel| drop(tunnel));
}
