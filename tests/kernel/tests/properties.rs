//! What an allowed frame must be, said a second time through another parser (etherparse).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::HashSet;
use std::net::IpAddr;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use omerta_kernel_tests::{GATEWAY_MAC, GUEST_MAC, Generator, NativeGuard, allowlist, config};
use omerta_verdict::{
    Bucket, Direction, Endpoint, FixedInputs, Frame, MemoryGuard, Meter, Mode, PendingChecksum,
    Policy, Protocol, Rate, Reason, Segments, Table, Verdict, egress, ingress,
};

const FRAMES: usize = 300_000;

fn guard_state(mode: Mode) -> (Policy, Vec<Bucket>) {
    let mut policy = config(mode).policy("guest").unwrap();
    policy.table_seed = 0x5eed;
    policy.table_mask = 63;
    let mut buckets = vec![Bucket::EMPTY; 64];
    let mut table = Table::new(&mut buckets, policy.table_seed).unwrap();
    for endpoint in allowlist() {
        assert!(table.insert(&endpoint));
    }
    (policy, buckets)
}

fn memory<'a>(policy: &'a Policy, buckets: &'a [Bucket]) -> MemoryGuard<'a> {
    MemoryGuard::new(policy, buckets)
}

/// (guest address, endpoint) of a frame, or `None` where etherparse or a rule of ours rejects it.
fn parties(frame: &[u8], direction: Direction) -> Option<(IpAddr, Endpoint)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (source, destination) = match packet.net? {
        NetSlice::Ipv4(v4) => {
            assert!(!v4.is_payload_fragmented(), "a fragment was allowed");
            assert!(v4.header().options().is_empty(), "options were allowed");
            (
                IpAddr::from(v4.header().source_addr()),
                IpAddr::from(v4.header().destination_addr()),
            )
        }
        NetSlice::Ipv6(v6) => {
            assert!(
                v6.extensions().first_header().is_none(),
                "an extension header was allowed"
            );
            (
                v6.header().source_addr().into(),
                v6.header().destination_addr().into(),
            )
        }
        _ => return None,
    };
    let (guest, peer) = match direction {
        Direction::Egress => (source, destination),
        Direction::Ingress => (destination, source),
    };
    let (protocol, from, to) = match packet.transport? {
        TransportSlice::Udp(udp) => (Protocol::Udp, udp.source_port(), udp.destination_port()),
        TransportSlice::Tcp(tcp) => (Protocol::Tcp, tcp.source_port(), tcp.destination_port()),
        TransportSlice::Igmp(_) => return None,
        TransportSlice::Icmpv4(icmp) => {
            assert_eq!(
                icmp.type_u8(),
                if direction == Direction::Egress { 8 } else { 0 }
            );
            (Protocol::Icmp, 0, 0)
        }
        TransportSlice::Icmpv6(icmp) => {
            assert_eq!(
                icmp.type_u8(),
                if direction == Direction::Egress {
                    128
                } else {
                    129
                }
            );
            (Protocol::Icmp, 0, 0)
        }
    };
    let port = if direction == Direction::Egress {
        to
    } else {
        from
    };
    Some((
        guest,
        Endpoint {
            protocol,
            address: peer.into(),
            port,
        },
    ))
}

/// Addresses, protocol and ports (or echo identifier) of a packet of the guest's.
fn flow(packet: &[u8]) -> Option<Vec<u8>> {
    let (addresses, protocol, transport) = match packet.first()? >> 4 {
        4 => (12..20, *packet.get(9)?, 20),
        _ => (8..40, *packet.get(6)?, 40),
    };
    let ports = if matches!(protocol, 1 | 58) {
        4..6
    } else {
        0..4
    };
    let ports = packet.get(transport..)?.get(ports)?;
    Some([packet.get(addresses)?, &[protocol], ports].concat())
}

fn is_error(frame: &[u8]) -> bool {
    match frame[12..14] {
        [0x08, 0x00] => frame[23] == 1 && matches!(frame[34], 3 | 11 | 12),
        _ => frame[20] == 58 && matches!(frame[54], 1..=4),
    }
}

#[test]
fn what_is_allowed_is_owned_listed_and_whole() {
    let (policy, buckets) = guard_state(Mode::Filtered);
    let guard = NativeGuard::new(policy, buckets, FixedInputs::NONE);
    let (config, list) = (config(Mode::Filtered), allowlist());
    let mut generator = Generator::new(11);
    let (mut allowed, mut errors) = (0, 0);
    let mut sent = HashSet::new();
    for _ in 0..FRAMES {
        let frame = generator.frame();
        let out = egress(&frame[..], &guard);
        if out == Verdict::Allow {
            allowed += 1;
            assert_eq!(frame[6..12], GUEST_MAC.0, "{frame:02x?}");
            assert_eq!(frame[..6], GATEWAY_MAC.0, "{frame:02x?}");
            let (guest, endpoint) =
                parties(&frame, Direction::Egress).expect("etherparse reads it");
            assert!(config.addresses.contains(&guest), "{frame:02x?}");
            assert!(list.contains(&endpoint), "{frame:02x?}");
            sent.insert(flow(&frame[14..]));
        }
        let input = ingress(&frame[..], &guard);
        // The guard's own ARP and neighbour answers are the only other frames let in.
        let is_answer = frame[12..14] == [8, 6]
            || (frame[12..14] == [0x86, 0xdd] && frame.get(54) == Some(&136));
        if input == Verdict::Allow && is_error(&frame) {
            errors += 1;
            // What it quotes was sent by whom it is for.
            let (quoted, receiver) = match frame[12..14] {
                [0x08, 0x00] => (&frame[54..58], &frame[30..34]),
                _ => (&frame[70..86], &frame[38..54]),
            };
            assert_eq!(quoted, receiver, "{frame:02x?}");
            let message = if frame[12..14] == [0x08, 0x00] {
                42
            } else {
                62
            };
            assert!(sent.contains(&flow(&frame[message..])), "{frame:02x?}");
        } else if input == Verdict::Allow && !is_answer {
            allowed += 1;
            assert_eq!(frame[..6], GUEST_MAC.0, "{frame:02x?}");
            let (guest, endpoint) =
                parties(&frame, Direction::Ingress).expect("etherparse reads it");
            assert!(config.addresses.contains(&guest), "{frame:02x?}");
            assert!(list.contains(&endpoint), "{frame:02x?}");
        }
    }
    assert!(errors > 100, "{errors}");
    println!("{allowed} allowed of {FRAMES} in two directions");
    assert!(allowed > FRAMES / 100);
}

#[test]
fn no_other_source_mac_is_ever_allowed_or_answered() {
    let mut generator = Generator::new(12);
    for mode in Mode::ALL {
        let (policy, buckets) = guard_state(mode);
        let guard = memory(&policy, &buckets);
        for _ in 0..FRAMES / 10 {
            let mut frame = generator.frame();
            let at = 6 + frame.len() % 6;
            frame[at] ^= 0x40;
            if frame[6..12] != GUEST_MAC.0 {
                assert!(
                    matches!(egress(&frame[..], &guard), Verdict::Drop(_)),
                    "{frame:02x?}"
                );
            }
        }
    }
}

/// A frame that the host is still to change.
struct Offloaded<'a> {
    bytes: &'a [u8],
    segment: u32,
    kind: Option<Segments>,
    checksum: Option<PendingChecksum>,
}

impl Frame for Offloaded<'_> {
    fn length(&self) -> u32 {
        self.bytes.length()
    }

    fn mtu(&self) -> u32 {
        u32::MAX
    }

    fn is_tagged(&self) -> bool {
        false
    }

    fn segment_size(&self) -> u32 {
        self.segment
    }

    fn is_cut_into(&self, kind: Segments) -> bool {
        self.kind == Some(kind)
    }

    fn pending_checksum(&self) -> Option<PendingChecksum> {
        self.checksum
    }

    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        self.bytes.bytes(offset)
    }
}

#[test]
fn what_the_host_is_asked_to_change_never_widens_a_verdict() {
    let (policy, buckets) = guard_state(Mode::Filtered);
    let guard = memory(&policy, &buckets);
    let mut generator = Generator::new(15);
    let mut rng = fastrand::Rng::with_seed(15);
    let (mut kept, mut dropped) = (0, 0);
    for _ in 0..FRAMES / 3 {
        let bytes = generator.frame();
        let start = [34, 54, rng.u32(..80)][rng.usize(..3)];
        let field = start + [2, 6, 16, rng.u32(..80)][rng.usize(..4)];
        let frame = Offloaded {
            bytes: &bytes,
            segment: [0, 0, 700][rng.usize(..3)],
            kind: [
                None,
                Some(Segments::TcpV4),
                Some(Segments::TcpV6),
                Some(Segments::Udp),
            ][rng.usize(..4)],
            checksum: rng.bool().then_some(PendingChecksum { start, field }),
        };
        for (plain, offloaded) in [
            (egress(&bytes[..], &guard), egress(&frame, &guard)),
            (ingress(&bytes[..], &guard), ingress(&frame, &guard)),
        ] {
            if plain == offloaded {
                kept += u32::from(plain == Verdict::Allow);
                if plain == Verdict::Allow && frame.segment != 0 {
                    let wanted = match (&bytes[12..14], bytes[23], bytes[20]) {
                        ([0x08, 0x00], 6, _) => Segments::TcpV4,
                        ([0x86, 0xdd], _, 6) => Segments::TcpV6,
                        ([0x08, 0x00], 17, _) | ([0x86, 0xdd], _, 17) => Segments::Udp,
                        _ => panic!("the host may cut {bytes:02x?}"),
                    };
                    assert_eq!(frame.kind, Some(wanted), "{bytes:02x?}");
                }
                if plain == Verdict::Allow && frame.checksum.is_some() {
                    let v6 = bytes[12..14] == [0x86, 0xdd];
                    let (transport, protocol) = if v6 { (54, bytes[20]) } else { (34, bytes[23]) };
                    let own = match protocol {
                        6 => 16,
                        17 => 6,
                        _ => 2,
                    };
                    assert_eq!((start, field), (transport, transport + own), "{bytes:02x?}");
                }
                continue;
            }
            dropped += 1;
            assert!(
                matches!(
                    offloaded,
                    Verdict::Drop(Reason::ChecksumOffload | Reason::Fragment)
                ),
                "{plain:?} became {offloaded:?}: {bytes:02x?}"
            );
        }
    }
    assert!(kept > 1000 && dropped > 1000, "{kept} {dropped}");
}

#[test]
fn an_empty_allowlist_allows_nothing() {
    let (policy, _) = guard_state(Mode::Filtered);
    let empty = vec![Bucket::EMPTY; 64];
    let guard = memory(&policy, &empty);
    let mut generator = Generator::new(13);
    for _ in 0..FRAMES / 10 {
        let frame = generator.frame();
        assert_ne!(egress(&frame[..], &guard), Verdict::Allow, "{frame:02x?}");
    }
}

#[test]
fn conntrack_lets_in_only_what_the_guest_opened() {
    let (policy, buckets) = guard_state(Mode::Conntrack);
    let guard = memory(&policy, &buckets);
    let mut limited = policy;
    limited.rates[Meter::EgressPackets as usize] = Rate::per_second(1, 1);
    let full = MemoryGuard {
        flows_have_room: false,
        meters_have_room: false,
        ..memory(&limited, &buckets)
    };
    let mut generator = Generator::new(14);
    for _ in 0..FRAMES / 10 {
        let frame = generator.frame();
        assert_ne!(egress(&frame[..], &full), Verdict::Allow, "{frame:02x?}");
        if egress(&frame[..], &guard) == Verdict::Allow {
            // A frame that a rate drops is not asked for a place.
            let policed = Verdict::Drop(Reason::Policed);
            assert_eq!(egress(&frame[..], &full), policed, "{frame:02x?}");
        }
        if ingress(&frame[..], &guard) == Verdict::Allow {
            assert!(
                frame[12..14] == [8, 6] || frame.get(54) == Some(&136),
                "{frame:02x?}"
            );
        }
    }
}
