//! What the guest sends: the right thing, and everything that it must not.

use omerta_kernel_tests::*;
use omerta_verdict::{Mac, Reason};

pub fn to_consumer(payload: &[u8]) -> Vec<u8> {
    let packet = Ipv4::new(GUEST, CONSUMER, 17).packet(&udp(40000, CONSUMER_PORT, payload));
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

pub fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    ethernet(
        GUEST_MAC,
        GATEWAY_MAC,
        0x0800,
        &Ipv4::new(GUEST, CONSUMER, protocol).packet(payload),
    )
}

/// Frames that no guest may send, with the reason for which each is dropped.
pub fn hostile() -> Vec<(&'static str, Vec<u8>, Reason)> {
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
            Reason::PeerAddress,
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
            Reason::BridgeControl,
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
