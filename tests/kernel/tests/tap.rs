//! Real frames through a guarded tap into a small routed network, and back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::thread::sleep;
use std::time::{Duration, Instant};

use omerta_dataplane::{Guard, GuardError};
use omerta_kernel_tests::*;
use omerta_test_support::{Capture, FrameSender, Namespace, Tap, Veth};
use omerta_verdict::{Direction, Mac, Mode, Reason};

const PATIENCE: Duration = Duration::from_secs(2);
/// Long enough for a frame to cross two interfaces of one machine, hundreds of times over.
const SETTLE: Duration = Duration::from_millis(20);
const WORLD_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0xcc]);

/// A provider with a guarded tap and an uplink to the world; the guest is the tap's descriptor.
struct Stage {
    provider: Namespace,
    world: Namespace,
    tap: Tap,
}

impl Stage {
    fn new(mode: Mode) -> Self {
        let provider = Namespace::new("ot-prov").unwrap();
        let world = Namespace::new("ot-world").unwrap();
        for namespace in [&provider, &world] {
            namespace.disable_ipv6().unwrap();
        }
        provider.enable_forwarding().unwrap();
        Veth::across((&provider, "uplink"), (&world, "inet")).unwrap();
        provider.ip("link set uplink up").unwrap();
        world.ip("link set inet up").unwrap();
        let tap = provider.enter(|| Tap::create("guest")).unwrap().unwrap();
        provider
            .ip(&format!("link set guest address {GATEWAY_MAC}"))
            .unwrap();
        // Guarded before up: the guest has no unguarded instant.
        provider
            .enter(|| Guard::attach("guest", &config(mode)).map(drop))
            .unwrap()
            .unwrap();
        provider.enter(|| tap.up()).unwrap().unwrap();
        world
            .ip(&format!("link set inet address {WORLD_MAC}"))
            .unwrap();
        for step in [
            "addr add 10.77.0.1/32 dev guest",
            "route add 10.77.0.2/32 dev guest",
            "route add 10.77.0.3/32 dev guest",
            "addr add 203.0.113.1/24 dev uplink",
            "route add default via 203.0.113.9",
        ] {
            provider.ip(step).unwrap();
        }
        provider
            .ip(&format!(
                "neigh replace 203.0.113.9 lladdr {WORLD_MAC} dev uplink nud permanent"
            ))
            .unwrap();
        Self {
            provider,
            world,
            tap,
        }
    }

    fn guarded<T: Send>(&self, work: impl FnOnce(&Guard) -> Result<T, GuardError> + Send) -> T {
        self.provider
            .enter(|| Guard::open("guest").and_then(|guard| work(&guard)))
            .unwrap()
            .unwrap()
    }

    fn dropped(&self, direction: Direction, reason: Reason) -> u64 {
        let counters = self.guarded(Guard::counters);
        match direction {
            Direction::Egress => counters.egress.dropped_for(reason).packets,
            Direction::Ingress => counters.ingress.dropped_for(reason).packets,
        }
    }

    fn arrivals(&self) -> Capture {
        self.world.enter(|| Capture::open("inet")).unwrap().unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Pins outlive the namespace; a test that failed has more to say than this.
        let _ = self
            .provider
            .enter(|| Guard::open("guest").and_then(Guard::detach));
    }
}

fn to_consumer(payload: &[u8]) -> Vec<u8> {
    let packet = Ipv4::new(GUEST, CONSUMER, 17).packet(&udp(40000, CONSUMER_PORT, payload));
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    ethernet(
        GUEST_MAC,
        GATEWAY_MAC,
        0x0800,
        &Ipv4::new(GUEST, CONSUMER, protocol).packet(payload),
    )
}

/// Waits for `found` to give something.
fn soon<T>(mut found: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match found() {
            Some(value) => return Some(value),
            None if Instant::now() > deadline => return None,
            None => sleep(Duration::from_millis(2)),
        }
    }
}

fn udp_payload(frame: &[u8]) -> Option<&[u8]> {
    (frame.get(12..14)? == [8, 0] && frame.get(23)? == &17).then(|| &frame[42..])
}

/// Frames that no guest may send, with the reason for which each is dropped.
fn hostile() -> Vec<(&'static str, Vec<u8>, Reason)> {
    let data = udp(40000, CONSUMER_PORT, b"leak");
    let ip = |header: Ipv4| ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &header.packet(&data));
    let good = Ipv4::new(GUEST, CONSUMER, 17);
    let mut tagged = to_consumer(b"leak");
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
    let mut options = to_consumer(b"leak");
    options[14] = 0x46;
    let mut long = to_consumer(b"leak");
    long.extend([0; 40]);
    let mut cut = to_consumer(b"leak");
    cut[16..18].copy_from_slice(&2000_u16.to_be_bytes());
    let mut version = to_consumer(b"leak");
    version[14] = 0x65;
    let mut offset = tcp(40000, 443);
    offset[12] = 0x40;
    let mut udp_length = udp(40000, CONSUMER_PORT, b"leak");
    udp_length[5] = 8;
    let arp_frame = |to, message: &[u8]| ethernet(GUEST_MAC, to, 0x0806, message);
    let nobody = Mac([0; 6]);
    vec![
        (
            "the internet",
            ip(Ipv4 {
                to: STRANGER,
                ..good
            }),
            Reason::Endpoint,
        ),
        (
            "the host",
            ip(Ipv4 {
                to: GATEWAY,
                ..good
            }),
            Reason::Endpoint,
        ),
        (
            "another port of the consumer",
            v4(17, &udp(40000, 53, b"leak")),
            Reason::Endpoint,
        ),
        (
            "TCP to the WireGuard port",
            v4(6, &tcp(40000, CONSUMER_PORT)),
            Reason::Endpoint,
        ),
        (
            "broadcast",
            ip(Ipv4 {
                to: [255; 4].into(),
                ..good
            }),
            Reason::Endpoint,
        ),
        (
            "a forged address",
            ip(Ipv4 {
                from: STRANGER,
                ..good
            }),
            Reason::SourceAddress,
        ),
        (
            "no address",
            ip(Ipv4 {
                from: [0; 4].into(),
                ..good
            }),
            Reason::SourceAddress,
        ),
        (
            "a forged MAC",
            ethernet(STRANGER_MAC, GATEWAY_MAC, 0x0800, &good.packet(&data)),
            Reason::SourceMac,
        ),
        (
            "another station",
            ethernet(GUEST_MAC, STRANGER_MAC, 0x0800, &good.packet(&data)),
            Reason::DestinationMac,
        ),
        (
            "the link's group",
            ethernet(GUEST_MAC, Mac::BROADCAST, 0x0800, &good.packet(&data)),
            Reason::DestinationMac,
        ),
        (
            "a first fragment",
            ip(Ipv4 {
                fragment: 0x2000,
                ..good
            }),
            Reason::Fragment,
        ),
        (
            "a last fragment",
            ip(Ipv4 {
                fragment: 0x0010,
                ..good
            }),
            Reason::Fragment,
        ),
        (
            "the reserved flag",
            ip(Ipv4 {
                fragment: 0x8000,
                ..good
            }),
            Reason::IpHeader,
        ),
        (
            "no hops left",
            ip(Ipv4 { ttl: 0, ..good }),
            Reason::IpHeader,
        ),
        ("a VLAN tag", tagged, Reason::Vlan),
        ("IP options", options, Reason::IpOptions),
        ("bytes behind the packet", long, Reason::IpLength),
        ("a packet longer than its frame", cut, Reason::IpLength),
        ("IPv6 under IPv4's EtherType", version, Reason::IpHeader),
        (
            "a short TCP offset",
            v4(6, &offset),
            Reason::TransportHeader,
        ),
        (
            "a wrong UDP length",
            v4(17, &udp_length),
            Reason::TransportHeader,
        ),
        (
            "half a UDP header",
            v4(17, &[0x9c, 0x40, 0xca, 0x6c]),
            Reason::TransportHeader,
        ),
        ("SCTP", v4(132, &data), Reason::Protocol),
        ("IP in IP", v4(4, &data), Reason::Protocol),
        ("GRE", v4(47, &data), Reason::Protocol),
        ("an echo reply", v4(1, &icmp_echo(0, 7)), Reason::IcmpType),
        (
            "an ICMP redirect",
            v4(1, &icmp_echo(5, 7)),
            Reason::IcmpType,
        ),
        (
            "IPv6 from a stranger's address",
            ethernet(
                GUEST_MAC,
                GATEWAY_MAC,
                0x86dd,
                &Ipv6::new(GATEWAY6, CONSUMER6, 17).packet(&data),
            ),
            Reason::SourceAddress,
        ),
        (
            "an IPv6 fragment",
            ethernet(
                GUEST_MAC,
                GATEWAY_MAC,
                0x86dd,
                &Ipv6::new(GUEST6, CONSUMER6, 44).packet(&data),
            ),
            Reason::Fragment,
        ),
        (
            "a routing header",
            ethernet(
                GUEST_MAC,
                GATEWAY_MAC,
                0x86dd,
                &Ipv6::new(GUEST6, CONSUMER6, 43).packet(&data),
            ),
            Reason::ExtensionHeader,
        ),
        (
            "half an IPv4 header",
            ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &[0x45, 0, 0, 20]),
            Reason::Runt,
        ),
        (
            "half an IPv6 header",
            ethernet(GUEST_MAC, GATEWAY_MAC, 0x86dd, &[0x60; 20]),
            Reason::Runt,
        ),
        (
            "an Ethernet header alone",
            ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &[]),
            Reason::Runt,
        ),
        (
            "LLC",
            ethernet(GUEST_MAC, GATEWAY_MAC, 0x0026, &[0x42; 38]),
            Reason::Llc,
        ),
        (
            "LLDP",
            ethernet(
                GUEST_MAC,
                Mac([1, 0x80, 0xc2, 0, 0, 0x0e]),
                0x88cc,
                &[0; 46],
            ),
            Reason::Ethertype,
        ),
        (
            "ARP for a stranger",
            arp_frame(
                Mac::BROADCAST,
                &arp(1, (GUEST_MAC, GUEST), (nobody, STRANGER)),
            ),
            Reason::ArpTarget,
        ),
        (
            "gratuitous ARP",
            arp_frame(Mac::BROADCAST, &arp(1, (GUEST_MAC, GUEST), (nobody, GUEST))),
            Reason::ArpTarget,
        ),
        (
            "an ARP claim of the gateway",
            arp_frame(
                Mac::BROADCAST,
                &arp(2, (GUEST_MAC, GATEWAY), (GATEWAY_MAC, GATEWAY)),
            ),
            Reason::ArpSender,
        ),
        (
            "an unasked ARP reply",
            arp_frame(
                GATEWAY_MAC,
                &arp(2, (GUEST_MAC, GUEST), (GATEWAY_MAC, GATEWAY)),
            ),
            Reason::ArpSender,
        ),
        (
            "ARP with another MAC inside",
            arp_frame(
                Mac::BROADCAST,
                &arp(1, (STRANGER_MAC, GUEST), (nobody, GATEWAY)),
            ),
            Reason::ArpSender,
        ),
        (
            "ARP for another link type",
            arp_frame(
                Mac::BROADCAST,
                &[
                    0, 6, 8, 0, 6, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                    0, 0,
                ],
            ),
            Reason::ArpMalformed,
        ),
    ]
}

#[test]
fn the_allowed_endpoint_is_reached_and_answers() {
    let stage = Stage::new(Mode::Filtered);
    let arrivals = stage.arrivals();
    stage.tap.send(&to_consumer(b"handshake")).unwrap();
    let arrived = soon(|| {
        arrivals
            .frames()
            .unwrap()
            .into_iter()
            .find(|f| udp_payload(&f.bytes) == Some(b"handshake"))
    });
    assert!(arrived.is_some(), "the allowed frame did not arrive");

    // The provider's stack asks for the guest; the guard answers, and the guest never sees it.
    let uplink = Mac(stage
        .provider
        .enter(|| omerta_test_support::mac_of("uplink"))
        .unwrap()
        .unwrap());
    let reply = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, b"response"));
    let sender = stage
        .world
        .enter(|| FrameSender::open("inet"))
        .unwrap()
        .unwrap();
    sender
        .send(&ethernet(WORLD_MAC, uplink, 0x0800, &reply))
        .unwrap();
    let received = stage
        .tap
        .recv(PATIENCE)
        .unwrap()
        .expect("the reply reaches the guest");
    assert_eq!(udp_payload(&received), Some(&b"response"[..]));
    assert_eq!(received[..6], GUEST_MAC.0);
    let counters = stage.guarded(Guard::counters);
    assert_eq!(
        (
            counters.egress.allowed.packets,
            counters.ingress.allowed.packets
        ),
        (1, 1)
    );
    assert_eq!(
        counters.ingress.answered.packets, 1,
        "the host's ARP request was answered for the guest"
    );
}

#[test]
fn hostile_frames_are_dropped_each_for_its_reason_and_none_arrives() {
    for mode in [Mode::Filtered, Mode::Conntrack] {
        let stage = Stage::new(mode);
        let arrivals = stage.arrivals();
        let neighbours = || {
            let output = stage
                .provider
                .command("ip")
                .args(["-4", "neigh", "show", "dev", "guest"])
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let mut sent = 0;
        for (name, frame, reason) in hostile() {
            let before = stage.dropped(Direction::Egress, reason);
            stage
                .tap
                .send(&frame)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            sent += 1;
            let counted =
                soon(|| (stage.dropped(Direction::Egress, reason) == before + 1).then_some(()));
            let counters = stage.guarded(Guard::counters);
            assert!(
                counted.is_some(),
                "{name} was not dropped for {reason}: {counters:?}"
            );
            assert_eq!(counters.egress.rx().packets, sent, "{name}");
        }
        sleep(SETTLE);
        let leaked: Vec<_> = arrivals
            .frames()
            .unwrap()
            .into_iter()
            .map(|f| f.bytes)
            .collect();
        assert!(leaked.is_empty(), "{leaked:02x?}");
        assert_eq!(neighbours(), "", "the host learned from the guest");
        assert_eq!(
            stage.tap.recv(SETTLE).unwrap(),
            None,
            "nothing was answered"
        );
    }
}

#[test]
fn strangers_do_not_reach_the_guest() {
    let stage = Stage::new(Mode::Filtered);
    stage
        .provider
        .ip(&format!(
            "neigh replace 10.77.0.2 lladdr {GUEST_MAC} dev guest nud permanent"
        ))
        .unwrap();
    let uplink = Mac(stage
        .provider
        .enter(|| omerta_test_support::mac_of("uplink"))
        .unwrap()
        .unwrap());
    let sender = stage
        .world
        .enter(|| FrameSender::open("inet"))
        .unwrap()
        .unwrap();
    let from = |from, port| Ipv4::new(from, GUEST, 17).packet(&udp(port, 40000, b"attack"));
    for (packet, reason) in [
        (from(STRANGER, CONSUMER_PORT), Reason::Endpoint),
        (from(CONSUMER, 53), Reason::Endpoint),
        (
            Ipv4::new(CONSUMER, GUEST, 1).packet(&icmp_echo(8, 1)),
            Reason::IcmpType,
        ),
        (
            Ipv4 {
                fragment: 0x2000,
                ..Ipv4::new(CONSUMER, GUEST, 17)
            }
            .packet(&udp(CONSUMER_PORT, 1, b"x")),
            Reason::Fragment,
        ),
    ] {
        sender
            .send(&ethernet(WORLD_MAC, uplink, 0x0800, &packet))
            .unwrap();
        let counted = soon(|| (stage.dropped(Direction::Ingress, reason) > 0).then_some(()));
        // The provider's stack may put a fragment together before it forwards it.
        assert!(counted.is_some() || reason == Reason::Fragment, "{reason}");
    }
    assert_eq!(stage.tap.recv(SETTLE).unwrap(), None);
}

#[test]
fn conntrack_admits_replies_only_to_what_was_sent() {
    let stage = Stage::new(Mode::Conntrack);
    stage
        .provider
        .ip(&format!(
            "neigh replace 10.77.0.2 lladdr {GUEST_MAC} dev guest nud permanent"
        ))
        .unwrap();
    let uplink = Mac(stage
        .provider
        .enter(|| omerta_test_support::mac_of("uplink"))
        .unwrap()
        .unwrap());
    let sender = stage
        .world
        .enter(|| FrameSender::open("inet"))
        .unwrap()
        .unwrap();
    let reply = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, b"reply"));
    let reply = ethernet(WORLD_MAC, uplink, 0x0800, &reply);
    sender.send(&reply).unwrap();
    assert!(
        soon(|| (stage.dropped(Direction::Ingress, Reason::NoFlow) == 1).then_some(())).is_some()
    );
    stage.tap.send(&to_consumer(b"open")).unwrap();
    assert!(
        soon(|| (stage.guarded(Guard::counters).egress.allowed.packets == 1).then_some(()))
            .is_some()
    );
    sender.send(&reply).unwrap();
    assert!(stage.tap.recv(PATIENCE).unwrap().is_some());
    // A revoked endpoint is cut with the next packet, flow or not.
    stage.guarded(|guard| guard.revoke(&["udp:192.0.2.10:51820".parse().unwrap()]));
    sender.send(&reply).unwrap();
    assert!(
        soon(|| (stage.dropped(Direction::Ingress, Reason::Endpoint) == 1).then_some(())).is_some()
    );
}

#[test]
fn the_gateway_is_answered_by_the_guard() {
    let stage = Stage::new(Mode::Filtered);
    let request = arp(1, (GUEST_MAC, GUEST), (Mac([0; 6]), GATEWAY));
    stage
        .tap
        .send(&ethernet(GUEST_MAC, Mac::BROADCAST, 0x0806, &request))
        .unwrap();
    let reply = stage.tap.recv(PATIENCE).unwrap().expect("ARP is answered");
    let expected = arp(2, (GATEWAY_MAC, GATEWAY), (GUEST_MAC, GUEST));
    assert_eq!(reply, ethernet(GATEWAY_MAC, GUEST_MAC, 0x0806, &expected));

    let group = "ff02::1:ff00:1".parse().unwrap();
    let message = [
        &[135, 0, 0, 0, 0, 0, 0, 0][..],
        &GATEWAY6.octets(),
        &[1, 1],
        &GUEST_MAC.0,
    ]
    .concat();
    let solicitation = Ipv6 {
        hops: 255,
        ..Ipv6::new(GUEST6, group, 58)
    }
    .icmp(message);
    stage
        .tap
        .send(&ethernet(
            GUEST_MAC,
            Mac([0x33, 0x33, 0xff, 0, 0, 1]),
            0x86dd,
            &solicitation,
        ))
        .unwrap();
    let reply = stage
        .tap
        .recv(PATIENCE)
        .unwrap()
        .expect("the solicitation is answered");
    let message = [
        &[136, 0, 0, 0, 0xe0, 0, 0, 0][..],
        &GATEWAY6.octets(),
        &[2, 1],
        &GATEWAY_MAC.0,
    ]
    .concat();
    let advertisement = Ipv6 {
        hops: 255,
        ..Ipv6::new(GATEWAY6, GUEST6, 58)
    }
    .icmp(message);
    assert_eq!(
        reply,
        ethernet(GATEWAY_MAC, GUEST_MAC, 0x86dd, &advertisement)
    );
    let counters = stage.guarded(Guard::counters);
    assert_eq!(
        (
            counters.egress.answered.packets,
            counters.egress.rx().packets
        ),
        (2, 2)
    );
}

#[test]
fn a_drop_is_reported_with_its_frame() {
    let stage = Stage::new(Mode::Filtered);
    let mut events = stage.guarded(Guard::events);
    let frame = v4(17, &udp(40000, 53, b"query"));
    stage.tap.send(&frame).unwrap();
    let event = soon(|| events.next()).expect("an event");
    assert_eq!(
        (event.reason, event.direction, &event.head),
        (Reason::Endpoint, Direction::Egress, &frame)
    );
    assert_eq!(event.describe(), "udp 10.77.0.2:40000 → 192.0.2.10:53");
}

#[test]
fn a_flood_is_counted_exactly() {
    let stage = Stage::new(Mode::Filtered);
    let arrivals = stage.arrivals();
    let bad = v4(17, &udp(40000, 53, b"flood"));
    for _ in 0..20_000 {
        stage.tap.send(&bad).unwrap();
    }
    stage.tap.send(&to_consumer(b"good")).unwrap();
    let counters = stage.guarded(Guard::counters);
    assert_eq!(
        counters.egress.dropped_for(Reason::Endpoint).packets,
        20_000
    );
    assert_eq!(
        counters.egress.dropped_for(Reason::Endpoint).bytes,
        20_000 * bad.len() as u64
    );
    assert_eq!(counters.egress.rx().packets, 20_001);
    assert!(counters.events_lost.packets > 0 && counters.events_lost.packets < 20_000);
    let arrived = soon(|| {
        arrivals
            .frames()
            .unwrap()
            .into_iter()
            .find(|f| udp_payload(&f.bytes).is_some())
    });
    assert_eq!(udp_payload(&arrived.unwrap().bytes), Some(&b"good"[..]));
}
