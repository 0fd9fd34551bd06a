//! Strangers who know a host tunnel's public key and where it listens: what they send changes nothing and costs a bounded
//! amount.

use std::net::{SocketAddr, UdpSocket};

use omerta_test_support::Capture;

use super::*;

/// How many initiations are sent; `OMERTA_FLOOD` says otherwise.
const INITIATIONS: usize = 200_000;
/// By how much the driver may grow: queues of a fixed length, and what Go's collector leaves for a while.
const GROWTH_KIB: u64 = 96 << 10;

/// Ethernet, IPv4 and UDP before WireGuard's own.
const HEADERS: usize = 42;
const INITIATION: usize = 148;

/// A field of a process' status in KiB.
fn kib(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Processor time of a process, all of its threads'.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // USER_HZ is 100 on every Linux of today.
    Duration::from_millis(ticks * 10)
}

impl Consumer {
    /// Has its peer be a tunnel that listens there, from the beginning, so that it sends an initiation at once.
    fn begin_anew(&mut self, public_key: PublicKey, at: SocketAddr) {
        self.device.sync(&self.peers, &Peers::new()).unwrap();
        let mut wanted = Peers::new();
        let peer = Peer {
            public_key,
            preshared_key: None,
            endpoint: Some(at),
            allowed_ips: [AllowedIp::host(IpAddr::V4(GUEST))].into(),
            keepalive: NonZero::new(25),
        };
        wanted.add(peer).unwrap();
        self.device.sync(&Peers::new(), &wanted).unwrap();
        self.peers = wanted;
    }

    fn shook_hands(&mut self) -> Option<std::time::SystemTime> {
        self.device.status().unwrap().peers[0].last_handshake
    }
}

/// An initiation by a key that the tunnel does not know, as it would go to the tunnel.
fn strangers(foe: &mut Consumer, public_key: PublicKey) -> Vec<u8> {
    let bind = || UdpSocket::bind((Ipv4Addr::new(198, 51, 100, 66), 0)).unwrap();
    let heard = foe.namespace.enter(bind).unwrap();
    heard
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    foe.begin_anew(public_key, heard.local_addr().unwrap());
    let mut bytes = [0; 256];
    let length = heard.recv(&mut bytes).unwrap();
    assert_eq!((bytes[0], length), (1, INITIATION), "no initiation");
    foe.device.sync(&foe.peers, &Peers::new()).unwrap();
    foe.peers = Peers::new();
    bytes[..length].to_vec()
}

/// The consumer's own initiation, as the tunnel has had and answered it.
fn answered(consumer: &mut Consumer, public_key: PublicKey, at: SocketAddr) -> Vec<u8> {
    let capture = || Capture::open("far").unwrap();
    let capture = consumer.namespace.enter(capture).unwrap();
    consumer.begin_anew(public_key, at);
    within_a_minute("another handshake", || consumer.shook_hands().is_some());
    let is_initiation = |bytes: &[u8]| bytes.len() == HEADERS + INITIATION && bytes[HEADERS] == 1;
    let frames = capture.frames().unwrap();
    let frame = frames.iter().rfind(|frame| is_initiation(&frame.bytes));
    frame.unwrap().bytes[HEADERS..].to_vec()
}

#[test]
fn a_flood_of_initiations_by_a_wrong_key_and_replayed_changes_nothing_of_a_host_tunnel() {
    let count = std::env::var("OMERTA_FLOOD").map_or(INITIATIONS, |text| text.parse().unwrap());
    let daemon = start("");
    let mut consumer = Consumer::of(&daemon, 1);
    let mut foe = Consumer::of(&daemon, 66);
    let guest = consumer.run(&daemon, "alpha", "bare").json();
    assert_eq!(guest["state"], "running", "{guest}");
    let public_key: PublicKey = guest["public_key"].as_str().unwrap().parse().unwrap();
    let at = consumer.device.status().unwrap().peers[0]
        .peer
        .endpoint
        .unwrap();
    let packets = [
        strangers(&mut foe, public_key),
        answered(&mut consumer, public_key, at),
    ];
    let before = consumer.shook_hands().unwrap();
    let driving = drivers(daemon.path());
    let [(pid, _)] = &driving[..] else {
        println!(
            "skipped: no process drives the tunnel here, and the kernel's costs are not told apart"
        );
        return;
    };
    let (pid, memory, used) = (*pid, kib(*pid, "VmRSS:"), cpu(*pid));
    let flood = || {
        let begun = Instant::now();
        let sent: usize = std::thread::scope(|threads| {
            let senders = [&packets[0], &packets[1]].map(|packet| {
                threads.spawn(move || {
                    let socket = UdpSocket::bind("198.51.100.66:0").unwrap();
                    // What the sender has no room for is no attack.
                    let send = |_: &usize| socket.send_to(packet, at).is_ok();
                    (0..count / 2).filter(send).count()
                })
            });
            senders
                .into_iter()
                .map(|sender| sender.join().unwrap())
                .sum()
        });
        (sent, begun.elapsed())
    };
    let (sent, took) = foe.namespace.enter(flood).unwrap();
    let used = cpu(pid) - used;
    let (peak, after) = (kib(pid, "VmHWM:"), kib(pid, "VmRSS:"));
    println!(
        "measured: {sent} initiations in {} ms; the driver used {} ms of processors, and had {memory} KiB before, {peak} at most, {after} after",
        took.as_millis(),
        used.as_millis()
    );
    assert!(sent > count / 2, "{sent}");
    assert!(peak < memory + GROWTH_KIB, "{memory} KiB became {peak}");
    // Whoever has the key still gets through, from where it is.
    consumer.begin_anew(public_key, at);
    within_a_minute("a handshake behind the flood", || {
        consumer.shook_hands().is_some_and(|at| at > before)
    });
    let tunnel = said_of(&daemon, "alpha", "host");
    assert_eq!(tunnel["endpoint"], "198.51.100.1:51820", "{tunnel}");
    let guest = daemon.get("/v1/guests/alpha").json();
    assert_eq!(guest["state"], "running", "{guest}");
    let events = daemon.get("/v1/events?guest=alpha").body;
    assert!(!events.contains("consumer_moved"), "{events}");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    assert_nothing_remains(&daemon);
}
