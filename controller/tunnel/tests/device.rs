//! Devices, by every back end that there is: the same tests for each. Needs root, wireguard-tools and wireguard-go. The
//! kernel's are skipped, aloud, where the kernel has no WireGuard.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, UdpSocket};
use std::num::NonZero;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use omerta_test_support::Namespace;
use omerta_tunnel::{
    Conf, Device, Kernel, Peer, PeerEndpoint, Peers, PublicKey, Secret, Setup, Status, Userspace,
};
use stage::{Make, Pair, USER, key, public_of, stranger};

macro_rules! for_every_back_end {
    ($($test:ident),+ $(,)?) => {
        mod userspace {
            $(#[test] fn $test() { super::$test::<super::Userspace>(); })+
        }
        mod kernel {
            $(#[test] fn $test() {
                if super::stage::kernel_has_wireguard() {
                    super::$test::<super::Kernel>();
                } else {
                    println!("skipped: this kernel has no WireGuard");
                }
            })+
        }
    };
}

for_every_back_end!(
    a_device_comes_to_have_what_is_wanted_and_is_gone_when_it_is_dropped,
    a_preshared_key_must_be_the_same_on_both_sides,
    nothing_of_a_stream_is_lost_while_a_thousand_other_peers_come_and_go,
    the_endpoint_follows_a_peer_that_moves_and_nothing_unauthenticated,
    a_peer_with_a_wrong_key_gets_nothing_through_and_changes_nothing,
    a_replayed_handshake_from_elsewhere_moves_nothing,
);

fn peers(peers: impl IntoIterator<Item = Peer>) -> Peers {
    let mut all = Peers::new();
    for peer in peers {
        all.add(peer).unwrap();
    }
    all
}

fn had(status: Status) -> Peers {
    peers(status.peers.into_iter().map(|status| status.peer))
}

fn a_device_comes_to_have_what_is_wanted_and_is_gone_when_it_is_dropped<D: Make>() {
    let namespace = Namespace::new("wgdev").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut device = namespace
        .enter(|| D::make("omtest0", directory.path()))
        .unwrap()
        .unwrap();
    assert_eq!(device.interface(), "omtest0");
    let setup = Setup {
        private_key: key(1),
        listen_port: NonZero::new(51820),
    };
    device.set_up(&setup).unwrap();
    assert_eq!(device.status().unwrap().listen_port, 51820);
    let full = Peer {
        preshared_key: Some(Secret::from([9; 32])),
        endpoint: Some("192.0.2.7:7".parse().unwrap()),
        keepalive: NonZero::new(25),
        ..stranger(2)
    };
    let many = Peer {
        allowed_ips: (0..1500u16)
            .map(|n| format!("10.8.{}.{}", n / 256, n % 256).parse().unwrap())
            .chain(["fd00::/64".parse().unwrap()])
            .collect(),
        endpoint: Some("[2001:db8::1]:9".parse().unwrap()),
        ..stranger(3)
    };
    let mut before = Peers::new();
    let moved: BTreeSet<_> = many.allowed_ips.iter().take(3).copied().collect();
    for wanted in [
        peers([full.clone(), many.clone()]),
        // One gives up what the other gets.
        peers([
            Peer {
                allowed_ips: &full.allowed_ips | &moved,
                preshared_key: None,
                keepalive: None,
                ..full.clone()
            },
            Peer {
                allowed_ips: &many.allowed_ips - &moved,
                ..many.clone()
            },
        ]),
        peers([Peer {
            endpoint: Some("192.0.2.8:8".parse().unwrap()),
            ..full
        }]),
        Peers::new(),
    ] {
        device.sync(&before, &wanted).unwrap();
        assert_eq!(had(device.status().unwrap()), wanted);
        assert_eq!(device.sync(&wanted, &wanted).unwrap(), 0);
        before = wanted;
    }
    namespace.ip("link show omtest0").unwrap();
    drop(device);
    assert!(
        namespace.ip("link show omtest0").is_err(),
        "it is there still"
    );
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

fn a_preshared_key_must_be_the_same_on_both_sides<D: Make>() {
    let mut pair = Pair::<D>::new();
    pair.near
        .want(|peer| peer.preshared_key = Some(Secret::from([1; 32])));
    pair.far
        .want(|peer| peer.preshared_key = Some(Secret::from([2; 32])));
    assert!(!pair.speaks(Duration::from_secs(3)), "with two keys");
    pair.far
        .want(|peer| peer.preshared_key = Some(Secret::from([1; 32])));
    assert!(pair.speaks(Duration::from_secs(30)), "with one key");
    let status = pair.near.status();
    assert!(status.last_handshake.is_some());
    assert!(
        status.sent_bytes > 0 && status.received_bytes > 0,
        "{status:?}"
    );
}

fn nothing_of_a_stream_is_lost_while_a_thousand_other_peers_come_and_go<D: Make>() {
    let mut pair = Pair::<D>::new();
    assert!(pair.speaks(Duration::from_secs(30)));
    let done = AtomicBool::new(false);
    let (near, far) = (pair.near.namespace.path(), pair.far.namespace.path());
    assert_ne!(near, far);
    let receiver = pair
        .far
        .namespace
        .enter(|| UdpSocket::bind("10.9.0.2:9").unwrap())
        .unwrap();
    let sender = pair
        .near
        .namespace
        .enter(|| UdpSocket::bind("10.9.0.1:0").unwrap())
        .unwrap();
    receiver
        .set_read_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    let (sent, received) = std::thread::scope(|threads| {
        let sending = threads.spawn(|| {
            let mut number = 0u32;
            while !done.load(Ordering::Relaxed) {
                sender.send_to(&number.to_be_bytes(), "10.9.0.2:9").unwrap();
                number += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            number
        });
        let receiving = threads.spawn(|| {
            let mut numbers = BTreeSet::new();
            let mut bytes = [0; 8];
            loop {
                match receiver.recv(&mut bytes) {
                    Ok(4) => drop(
                        numbers
                            .insert(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])),
                    ),
                    Ok(_) => {}
                    Err(error)
                        if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                    {
                        return numbers;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        let alone = pair.near.peers.clone();
        let mut crowd = alone.clone();
        for n in 0..1000u16 {
            crowd.add(stranger(1000 + n)).unwrap();
        }
        let device = &mut pair.near.device;
        for _ in 0..2 {
            assert_eq!(device.sync(&alone, &crowd).unwrap(), 1000);
            assert_eq!(device.status().unwrap().peers.len(), 1001);
            assert_eq!(device.sync(&crowd, &alone).unwrap(), 1000);
        }
        done.store(true, Ordering::Relaxed);
        (sending.join().unwrap(), receiving.join().unwrap())
    });
    assert!(sent > 50, "{sent} datagrams show nothing");
    let lost: Vec<_> = (0..sent)
        .filter(|number| !received.contains(number))
        .collect();
    assert_eq!(lost, [0; 0], "of {sent}");
}

fn the_endpoint_follows_a_peer_that_moves_and_nothing_unauthenticated<D: Make>() {
    let mut pair = Pair::<D>::new();
    assert!(pair.speaks(Duration::from_secs(30)));
    let port = pair.near.port();
    let was = pair.near.status().peer.endpoint.unwrap();
    assert_eq!(was.ip().to_string(), "192.0.2.2");
    // Bytes that begin as each kind of message does, of its length, from an address that is no peer's.
    pair.far
        .namespace
        .ip("address add 192.0.2.66/24 dev far")
        .unwrap();
    let forge = || {
        let socket = UdpSocket::bind("192.0.2.66:0").unwrap();
        for (kind, length) in [(1u8, 148), (2, 92), (3, 64), (4, 128), (9, 40)] {
            for filling in [0, 0x41, 0xff] {
                let mut bytes = vec![filling; length];
                bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
                socket.send_to(&bytes, ("192.0.2.1", port)).unwrap();
            }
        }
    };
    pair.far.namespace.enter(forge).unwrap();
    assert!(pair.speaks(Duration::from_secs(30)));
    assert_eq!(pair.near.status().peer.endpoint, Some(was));
    // And now the peer itself is elsewhere. With its first address the network's others go.
    pair.far
        .namespace
        .ip("address del 192.0.2.2/24 dev far")
        .unwrap();
    pair.far
        .namespace
        .ip("address add 192.0.2.3/24 dev far")
        .unwrap();
    let moved = SocketAddr::new("192.0.2.3".parse().unwrap(), was.port());
    let end = Instant::now() + Duration::from_secs(60);
    while pair.near.status().peer.endpoint != Some(moved) {
        assert!(Instant::now() < end, "{:?}", pair.near.status());
        pair.far.say(b"here I am");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(pair.speaks(Duration::from_secs(30)));
}

fn a_peer_with_a_wrong_key_gets_nothing_through_and_changes_nothing<D: Make>() {
    let mut pair = Pair::<D>::new();
    let before = pair.near.status();
    let setup = Setup {
        private_key: key(77),
        listen_port: None,
    };
    pair.far.device.set_up(&setup).unwrap();
    assert!(!pair.speaks(Duration::from_secs(3)));
    let after = pair.near.status();
    assert_eq!(after.last_handshake, None);
    assert_eq!((after.peer, after.received_bytes), (before.peer, 0));
}

/// A handshake initiation of the far side's, as it went to the near one.
fn initiation<D: Make>(pair: &mut Pair<D>) -> Vec<u8> {
    // What the far side sends first is its handshake, heard by who stands where the near side should.
    let port = pair.near.port();
    let free = pair
        .near
        .namespace
        .enter(|| UdpSocket::bind("192.0.2.1:0").unwrap())
        .unwrap();
    free.set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    pair.far
        .want(|peer| peer.endpoint = Some(free.local_addr().unwrap()));
    pair.far.say(b"anybody there?");
    let mut bytes = [0; 2048];
    let length = free.recv(&mut bytes).unwrap();
    assert_eq!((bytes[0], length), (1, 148), "no handshake initiation");
    pair.far
        .want(|peer| peer.endpoint = Some(([192, 0, 2, 1], port).into()));
    bytes[..length].to_vec()
}

fn a_replayed_handshake_from_elsewhere_moves_nothing<D: Make>() {
    let mut pair = Pair::<D>::new();
    let port = pair.near.port();
    let initiation = initiation(&mut pair);
    assert!(pair.speaks(Duration::from_secs(60)));
    let before = pair.near.status();
    pair.far
        .namespace
        .ip("address add 192.0.2.66/24 dev far")
        .unwrap();
    let replay = || {
        let socket = UdpSocket::bind("192.0.2.66:0").unwrap();
        for _ in 0..50 {
            socket.send_to(&initiation, ("192.0.2.1", port)).unwrap();
        }
    };
    pair.far.namespace.enter(replay).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(pair.speaks(Duration::from_secs(30)));
    let after = pair.near.status();
    assert_eq!(after.peer.endpoint, before.peer.endpoint);
    assert_eq!(after.last_handshake, before.last_handshake);
}

/// Initiations that are the peer's own, sent again and again, so that each costs a look: the session that there is carries on.
#[test]
fn a_flood_of_initiations_does_not_cut_a_session_and_ends_without_a_trace() {
    let mut pair = Pair::<Userspace>::new();
    let port = pair.near.port();
    let initiation = initiation(&mut pair);
    assert!(pair.speaks(Duration::from_secs(60)));
    let before = pair.near.status();
    pair.far
        .namespace
        .ip("address add 192.0.2.66/24 dev far")
        .unwrap();
    let flood = || {
        let socket = UdpSocket::bind("192.0.2.66:0").unwrap();
        let begun = Instant::now();
        for _ in 0..100_000 {
            // What the sender has no room for is no attack.
            let _ = socket.send_to(&initiation, ("192.0.2.1", port));
        }
        begun.elapsed()
    };
    let took = pair.far.namespace.enter(flood).unwrap();
    println!("measured: 100000 initiations in {} ms", took.as_millis());
    assert!(pair.speaks(Duration::from_secs(30)));
    let after = pair.near.status();
    assert_eq!(after.peer, before.peer);
    assert_eq!(after.last_handshake, before.last_handshake);
}

#[test]
fn the_userspace_program_has_one_right_and_no_files_and_ends_with_its_device() {
    let namespace = Namespace::new("wgdev").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let device = namespace
        .enter(|| Userspace::make("omtest0", directory.path()))
        .unwrap()
        .unwrap();
    let status = format!("/proc/{}/status", device.pid());
    let text = std::fs::read_to_string(&status).unwrap();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let user = USER.to_string();
    assert_eq!(field("Uid:"), [user.as_str(); 4].join(" "));
    // CAP_NET_ADMIN.
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000001000", "{set}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    drop(device);
    assert!(!std::path::Path::new(&status).exists());
}

/// A configuration that `wg` sets and shows is one that is read here, and the other way round.
#[test]
fn wg_and_this_crate_set_up_a_device_alike() {
    let namespace = Namespace::new("wgdev").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut device = namespace
        .enter(|| Userspace::make("omtest0", directory.path()))
        .unwrap()
        .unwrap();
    // It looks for devices in one place alone.
    let wg = |arguments: &str, input: &str| {
        let script = format!(
            "mkdir -p /var/run/wireguard && mount --bind {} /var/run/wireguard && exec wg {arguments}",
            directory.path().join("omtest0").display()
        );
        let mut child = namespace
            .command("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    let conf = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\n[Peer]\nPublicKey = {}\nPresharedKey = {}\n\
         AllowedIPs = 10.9.0.1/32, fd00::/64\nEndpoint = [2001:db8::1]:9\nPersistentKeepalive = 15\n[Peer]\nPublicKey = {}\n\
         AllowedIPs = 10.9.0.2/32\nEndpoint = 192.0.2.7:7\n",
        *key(1).base64(),
        public_of(&key(2)),
        *Secret::from([9; 32]).base64(),
        public_of(&key(3)),
    );
    wg("setconf omtest0 /dev/stdin", &conf);
    let told = device.status().unwrap();
    assert_eq!(told.listen_port, 51820);
    let told = had(told);
    let shown = Conf::parse(&wg("showconf omtest0", "")).unwrap();
    for read in [Conf::parse(conf.as_bytes()).unwrap(), shown] {
        assert_eq!(read.interface.private_key, Some(key(1)));
        let read = read.peers.into_iter().map(|peer| Peer {
            public_key: peer.public_key,
            preshared_key: peer.preshared_key,
            endpoint: match peer.endpoint {
                Some(PeerEndpoint::Address(address)) => Some(address),
                other => panic!("{other:?}"),
            },
            allowed_ips: peer.allowed_ips,
            keepalive: peer.keepalive,
        });
        assert_eq!(peers(read), told);
    }
}

/// What the unit leaves omertad is enough, where `/dev/net/tun` is as udev makes it.
#[test]
fn the_userspace_program_starts_with_the_capabilities_of_the_unit_alone() {
    const AS_THE_UNIT: &str = "OMERTA_TEST_AS_THE_UNIT";
    if std::env::var_os(AS_THE_UNIT).is_some() {
        let namespace = Namespace::new("wgdev").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut device = namespace
            .enter(|| Userspace::make("omtest0", directory.path()))
            .unwrap()
            .unwrap();
        assert_eq!(device.status().unwrap().peers, []);
        return;
    }
    let unit = include_str!("../../../deploy/systemd/omertad.service");
    let allowed = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .unwrap();
    let allowed: String = allowed
        .split(' ')
        .map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    const AS_UDEV_HAS_IT: &str = "mount -t tmpfs -o mode=755 none /dev/net &&
        mknod -m 666 /dev/net/tun c 10 200 && exec setpriv \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .args([AS_UDEV_HAS_IT, "sh"])
        .arg(format!("--bounding-set=-all{allowed}"))
        .arg("--no-new-privs")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("the_userspace_program_starts_with_the_capabilities_of_the_unit_alone")
        .env(AS_THE_UNIT, "1")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(told.contains("1 passed"), "{told}");
}

#[test]
fn a_name_that_is_taken_is_refused_and_leaves_nothing() {
    let namespace = Namespace::new("wgdev").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let error = namespace
        .enter(|| Userspace::create("lo", &directory.path().join("a"), USER, false).unwrap_err())
        .unwrap();
    assert!(error.to_string().contains("has ended"), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn public_keys_of_the_stage_are_those_of_its_private_keys() {
    let keys: BTreeSet<PublicKey> = (1..5).map(|n| public_of(&key(n))).collect();
    assert_eq!(keys.len(), 4);
    let made = Secret::generate().unwrap();
    assert_ne!(made, Secret::generate().unwrap());
    for private in [key(1), made] {
        assert_eq!(private.public_key(), public_of(&private));
    }
}
