//! Frames that the host, or its card, is still to change: taps with offload headers (virtio-net).

use std::num::NonZero;
use std::thread::sleep;

use omerta_dataplane::{Guard, Limits};
use omerta_kernel_tests::*;
use omerta_test_support::Tap;
use omerta_verdict::{Direction, Mode, Reason};

use crate::stage::{PATIENCE, SETTLE, Stage, soon, udp_payload};

const NEEDS_CHECKSUM: u8 = 1;
const TCP_V4: u8 = 1;
const UDP_FRAGMENTS: u8 = 3;
const TCP_V6: u8 = 4;
const UDP_DATAGRAMS: u8 = 5;
/// The first place that Linux takes as a checksum's start, in the midst of an IP header.
const NETWORK: u16 = 20;
const TRANSPORT: u16 = 14 + 20;

/// `struct virtio_net_hdr` before a frame: a checksum over all from `start`, to be written
/// `offset` bytes further on.
fn offloaded(start: u16, offset: u16, frame: &[u8]) -> Vec<u8> {
    header(NEEDS_CHECKSUM, 0, 0, (start, offset), frame)
}

fn header(flags: u8, gso: u8, segment: u16, checksum: (u16, u16), frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![flags, gso];
    let headers = frame.len().min(54) as u16;
    for number in [headers, segment, checksum.0, checksum.1] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes.extend(frame);
    bytes
}

fn from_guest(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let packet = Ipv4::new(GUEST, CONSUMER, protocol).packet(payload);
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

fn stage() -> Stage {
    stage_with(Limits::default())
}

fn stage_with(egress: Limits) -> Stage {
    let mut guard = config(Mode::Filtered);
    guard.egress = egress;
    let stage = Stage::with_guard(&guard, || Tap::create_with_offload_header("guest"));
    // The uplink leaves nothing to a card: the host finishes every checksum before it sends.
    let off = stage
        .provider
        .command("ethtool")
        .args(["-K", "uplink", "tx", "off"])
        .output()
        .unwrap();
    assert!(off.status.success(), "{off:?}");
    stage
}

#[test]
fn a_checksum_is_written_nowhere_but_into_its_own_field() {
    let stage = stage();
    let arrivals = stage.arrivals();
    let datagram = from_guest(17, &udp(40000, CONSUMER_PORT, b"leak, or not"));
    let segment = from_guest(6, &tcp(40000, 443));
    let echo = from_guest(1, &icmp_echo(8, 7));
    let request = arp(1, (GUEST_MAC, GUEST), (GATEWAY_MAC, GATEWAY));
    let request = ethernet(GUEST_MAC, GATEWAY_MAC, 0x0806, &request);
    let wrong = [
        ("the destination port", offloaded(TRANSPORT, 2, &datagram)),
        ("the source port", offloaded(TRANSPORT, 0, &datagram)),
        ("UDP's length", offloaded(TRANSPORT, 4, &datagram)),
        ("TCP's field in UDP", offloaded(TRANSPORT, 16, &datagram)),
        ("UDP's field in TCP", offloaded(TRANSPORT, 6, &segment)),
        ("TCP's port", offloaded(TRANSPORT, 2, &segment)),
        ("the destination address", offloaded(NETWORK, 10, &datagram)),
        (
            "the destination port, from the IP header on",
            offloaded(NETWORK, 16, &datagram),
        ),
        (
            "UDP's field, summed from elsewhere",
            offloaded(NETWORK, 20, &datagram),
        ),
        ("the payload", offloaded(TRANSPORT, 10, &datagram)),
        ("echo's type", offloaded(TRANSPORT, 0, &echo)),
        ("an answer's field", offloaded(NETWORK, 2, &request)),
    ];
    for (index, (name, frame)) in wrong.iter().enumerate() {
        stage
            .tap
            .send(frame)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let dropped = || stage.dropped(Direction::Egress, Reason::ChecksumOffload);
        let counted = soon(|| (dropped() == index as u64 + 1).then_some(()));
        assert!(
            counted.is_some(),
            "{name}: {:?}",
            stage.guarded(Guard::counters).egress
        );
    }
    sleep(SETTLE);
    let leaked = arrivals.frames().unwrap();
    assert!(leaked.is_empty(), "{leaked:02x?}");
    assert_eq!(
        stage.tap.recv(SETTLE).unwrap(),
        None,
        "nothing was answered"
    );
}

#[test]
fn honest_offload_passes_and_its_checksum_is_right() {
    let stage = stage();
    let arrivals = stage.arrivals();
    let datagram = from_guest(17, &udp(40000, CONSUMER_PORT, b"honest"));
    let mut with_sum = datagram.clone();
    let udp_sum = pseudo_header_sum(17, &datagram[34..]);
    with_sum[40..42].copy_from_slice(&udp_sum.to_be_bytes());
    let mut segment = from_guest(6, &tcp(40000, 443));
    let tcp_sum = pseudo_header_sum(6, &segment[34..]);
    segment[50..52].copy_from_slice(&tcp_sum.to_be_bytes());
    let echo = from_guest(1, &icmp_echo(8, 7));
    for frame in [
        offloaded(TRANSPORT, 6, &with_sum),
        offloaded(TRANSPORT, 16, &segment),
        offloaded(TRANSPORT, 2, &echo),
        header(0, 0, 0, (0, 0), &datagram),
    ] {
        stage.tap.send(&frame).unwrap();
    }
    let arrived = soon(|| {
        let frames: Vec<_> = arrivals.frames().unwrap();
        (frames.len() >= 4).then_some(frames)
    });
    let arrived = arrived.unwrap_or_else(|| {
        panic!(
            "not all arrived: {:?}",
            stage.guarded(Guard::counters).egress
        )
    });
    for frame in &arrived[..3] {
        let transport = &frame.bytes[34..];
        let seed = match frame.bytes[23] {
            1 => 0,
            protocol => pseudo_header_sum(protocol, transport),
        };
        // A right checksum makes the sum of all words zero, in its negated form.
        let words = [&seed.to_be_bytes()[..], transport].concat();
        assert_eq!(checksum(&words), 0, "{frame:02x?}");
    }
}

#[test]
fn tcp_is_cut_by_the_host_and_udp_not_into_fragments() {
    let stage = stage();
    let arrivals = stage.arrivals();
    let datagram = from_guest(17, &udp(40000, CONSUMER_PORT, &[0xaa; 1400]));
    let checksum = (TRANSPORT, 6);
    let asked = header(NEEDS_CHECKSUM, UDP_FRAGMENTS, 500, checksum, &datagram);
    stage.tap.send(&asked).unwrap();
    let dropped = || stage.dropped(Direction::Egress, Reason::Fragment);
    assert!(soon(|| (dropped() == 1).then_some(())).is_some());

    let long = [tcp(40000, 443), vec![0xaa; 1400]].concat();
    let segments = header(
        NEEDS_CHECKSUM,
        TCP_V4,
        700,
        (TRANSPORT, 16),
        &from_guest(6, &long),
    );
    stage.tap.send(&segments).unwrap();
    let payload = soon(|| {
        let frames = arrivals.frames().unwrap();
        let bytes: usize = frames.iter().map(|frame| frame.bytes.len() - 54).sum();
        (bytes >= 1400).then_some(bytes)
    });
    assert_eq!(
        payload,
        Some(1400),
        "{:?}",
        stage.guarded(Guard::counters).egress
    );
    assert_eq!(stage.tap.recv(PATIENCE / 20).unwrap(), None);
}

/// TCP to be cut into segments of `size` bytes of payload.
fn to_be_cut(payload: usize, size: u16) -> Vec<u8> {
    let whole = from_guest(6, &[tcp(40000, 443), vec![0xaa; payload]].concat());
    header(NEEDS_CHECKSUM, TCP_V4, size, (TRANSPORT, 16), &whole)
}

#[test]
fn what_the_host_cuts_counts_with_the_headers_of_each_segment() {
    // 131,098 bytes at once, and a byte a second.
    let limits = Limits {
        bits_per_second: NonZero::new(8),
        ..Limits::default()
    };
    let stage = stage_with(limits);
    // A thousand segments of 62 bytes each.
    let frame = to_be_cut(8000, 8);
    for _ in 0..10 {
        stage.tap.send(&frame).unwrap();
    }
    let egress = stage.guarded(Guard::counters).egress;
    assert_eq!(egress.allowed.packets, 2, "{egress:?}");
    assert_eq!(egress.dropped_for(Reason::Policed).packets, 8);
}

#[test]
fn the_longest_frame_of_usual_segments_passes_an_idle_rate_of_frames() {
    let limits = Limits {
        packets_per_second: NonZero::new(1),
        ..Limits::default()
    };
    let stage = stage_with(limits);
    stage.tap.send(&to_be_cut(64_000, 536)).unwrap();
    let egress = stage.guarded(Guard::counters).egress;
    assert_eq!(egress.allowed.packets, 1, "{egress:?}");
}

#[test]
fn udp_that_the_host_cuts_into_datagrams_passes_both_ways() {
    let stage = stage();
    stage.know_the_guest();
    let arrivals = stage.arrivals();
    let payload: Vec<u8> = (0..3500_u32).map(|index| index as u8).collect();
    let mut datagrams = from_guest(17, &udp(40000, CONSUMER_PORT, &payload));
    let sum = pseudo_header_sum(17, &datagrams[34..]);
    datagrams[40..42].copy_from_slice(&sum.to_be_bytes());
    let asked = header(
        NEEDS_CHECKSUM,
        UDP_DATAGRAMS,
        1000,
        (TRANSPORT, 6),
        &datagrams,
    );
    if let Err(error) = stage.tap.send(&asked) {
        println!("skipped: this kernel's taps take no UDP segmentation (Linux 6.2): {error}");
        return;
    }
    let arrived = soon(|| {
        let got: Vec<u8> = arrivals
            .frames()
            .unwrap()
            .iter()
            .filter_map(|frame| Some(udp_payload(&frame.bytes)?.to_vec()))
            .flatten()
            .collect();
        (got.len() >= payload.len()).then_some(got)
    });
    let counters = stage.guarded(Guard::counters).egress;
    assert_eq!(arrived.as_ref(), Some(&payload), "{counters:?}");
    assert_eq!(counters.allowed.packets, 1, "{counters:?}");

    for step in [
        "addr add 203.0.113.9/24 dev inet",
        &format!("addr add {CONSUMER}/32 dev inet"),
        &format!("route add {GUEST}/32 via 203.0.113.1"),
    ] {
        stage.world.ip(step).unwrap();
    }
    // What the consumer sends so, by a socket with UDP_SEGMENT, reaches the guest.
    stage
        .world
        .enter(|| send_segments(&payload, 1000))
        .unwrap()
        .unwrap();
    let mut got: Vec<u8> = Vec::new();
    while got.len() < payload.len() {
        let frame = stage.tap.recv(PATIENCE).unwrap();
        let frame = frame.unwrap_or_else(|| {
            let counters = stage.guarded(Guard::counters).ingress;
            panic!("{} bytes reached the guest: {counters:?}", got.len())
        });
        got.extend(udp_payload(&frame[10..]).unwrap_or_default());
    }
    assert_eq!(got, payload);
    let counters = stage.guarded(Guard::counters).ingress;
    assert_eq!(
        counters.allowed.packets, 1,
        "it came to the guard in one piece: {counters:?}"
    );
}

/// Sends `payload` to the guest as one datagram that the kernel is to cut into parts of `size`.
fn send_segments(payload: &[u8], size: u16) -> std::io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
    let socket = std::net::UdpSocket::bind((CONSUMER, CONSUMER_PORT))?;
    setsockopt(&socket, UdpGsoSegment, &i32::from(size))?;
    socket.send_to(payload, (GUEST, 40000)).map(drop)
}

#[test]
fn segments_longer_than_the_mtu_or_of_another_kind_are_dropped() {
    let stage = stage();
    let arrivals = stage.arrivals();
    let mut segment = from_guest(6, &[tcp(40000, 443), vec![0xaa; 4000]].concat());
    let sum = pseudo_header_sum(6, &segment[34..]);
    segment[50..52].copy_from_slice(&sum.to_be_bytes());
    let datagram = from_guest(17, &udp(40000, CONSUMER_PORT, &[0xaa; 4000]));
    let plain = from_guest(17, &udp(40000, CONSUMER_PORT, &[0xaa; 1473]));
    let cut = |kind, size, field, frame: &[u8]| {
        header(NEEDS_CHECKSUM, kind, size, (TRANSPORT, field), frame)
    };
    for (name, frame, reason) in [
        (
            "TCP",
            cut(TCP_V4, 1461, 16, &segment),
            Some(Reason::Overlength),
        ),
        (
            "UDP",
            cut(UDP_DATAGRAMS, 1473, 6, &datagram),
            Some(Reason::Overlength),
        ),
        (
            "uncut",
            header(0, 0, 0, (0, 0), &plain),
            Some(Reason::Overlength),
        ),
        (
            "TCP of the other version",
            cut(TCP_V6, 1400, 16, &segment),
            Some(Reason::Fragment),
        ),
        ("TCP of the MTU", cut(TCP_V4, 1460, 16, &segment), None),
        (
            "UDP of the MTU",
            cut(UDP_DATAGRAMS, 1472, 6, &datagram),
            None,
        ),
    ] {
        let count = || {
            let egress = stage.guarded(Guard::counters).egress;
            match reason {
                Some(reason) => egress.dropped_for(reason).packets,
                None => egress.allowed.packets,
            }
        };
        let before = count();
        // The kernel refuses some of them itself.
        if let Err(error) = stage.tap.send(&frame) {
            println!("{name}: {error}");
            continue;
        }
        let counted = soon(|| (count() == before + 1).then_some(()));
        let counters = stage.guarded(Guard::counters).egress;
        assert!(counted.is_some(), "{name}: {counters:?}");
    }
    sleep(SETTLE);
    let longest = arrivals
        .frames()
        .unwrap()
        .iter()
        .map(|f| f.bytes.len())
        .max();
    println!("longest on the uplink: {longest:?}");
}

/// The sum that a checksum field holds before the rest is added (RFC 768, RFC 9293).
fn pseudo_header_sum(protocol: u8, transport: &[u8]) -> u16 {
    let length = transport.len() as u16;
    let covered = [
        &GUEST.octets()[..],
        &CONSUMER.octets(),
        &[0, protocol],
        &length.to_be_bytes(),
    ]
    .concat();
    !checksum(&covered)
}
