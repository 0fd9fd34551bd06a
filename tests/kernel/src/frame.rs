//! Builds frames byte by byte, right by default and wrong where a test says so.

use std::net::{Ipv4Addr, Ipv6Addr};

use omerta_verdict::Mac;

/// An Ethernet II frame.
pub fn ethernet(from: Mac, to: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat()
}

/// An IPv4 header to come; [`Ipv4::packet`] makes it.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4 {
    /// Source.
    pub from: Ipv4Addr,
    /// Destination.
    pub to: Ipv4Addr,
    /// Protocol number.
    pub protocol: u8,
    /// Flags and fragment offset; 0x4000 is "don't fragment".
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
}

impl Ipv4 {
    /// A header without oddities.
    pub fn new(from: Ipv4Addr, to: Ipv4Addr, protocol: u8) -> Self {
        Self {
            from,
            to,
            protocol,
            fragment: 0x4000,
            ttl: 64,
        }
    }

    /// The packet, header checksum included.
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let total = (20 + payload.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(total.to_be_bytes());
        packet.extend([0x12, 0x34]);
        packet.extend(self.fragment.to_be_bytes());
        packet.extend([self.ttl, self.protocol, 0, 0]);
        packet.extend(self.from.octets());
        packet.extend(self.to.octets());
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(payload);
        packet
    }
}

/// An IPv6 header to come; [`Ipv6::packet`] makes it.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6 {
    /// Source.
    pub from: Ipv6Addr,
    /// Destination.
    pub to: Ipv6Addr,
    /// Next header.
    pub next: u8,
    /// Hop limit.
    pub hops: u8,
}

impl Ipv6 {
    /// A header without oddities.
    pub fn new(from: Ipv6Addr, to: Ipv6Addr, next: u8) -> Self {
        Self {
            from,
            to,
            next,
            hops: 64,
        }
    }

    /// The packet.
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([self.next, self.hops]);
        packet.extend(self.from.octets());
        packet.extend(self.to.octets());
        packet.extend(payload);
        packet
    }

    /// The packet with an ICMPv6 message, whose checksum field is filled in.
    pub fn icmp(&self, mut message: Vec<u8>) -> Vec<u8> {
        let mut covered = Vec::new();
        covered.extend(self.from.octets());
        covered.extend(self.to.octets());
        covered.extend((message.len() as u32).to_be_bytes());
        covered.extend([0, 0, 0, 58]);
        covered.extend(&message);
        let sum = checksum(&covered);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        self.packet(&message)
    }
}

/// A UDP datagram without checksum.
pub fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    [
        &from.to_be_bytes()[..],
        &to.to_be_bytes(),
        &length.to_be_bytes(),
        &[0, 0],
        payload,
    ]
    .concat()
}

/// A TCP SYN.
pub fn tcp(from: u16, to: u16) -> Vec<u8> {
    [
        &from.to_be_bytes()[..],
        &to.to_be_bytes(),
        &[0; 8],
        &[0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0],
    ]
    .concat()
}

/// An ICMP or ICMPv6 echo message of the given type, without a checksum.
pub fn icmp_echo(kind: u8, identifier: u16) -> Vec<u8> {
    [
        &[kind, 0, 0, 0][..],
        &identifier.to_be_bytes(),
        &[0, 1],
        b"omerta",
    ]
    .concat()
}

/// "Port unreachable", which quotes `packet`.
pub fn icmp_unreachable(packet: &[u8]) -> Vec<u8> {
    [&[3, 3, 0, 0, 0, 0, 0, 0], packet].concat()
}

/// An Ethernet/IPv4 ARP message: operation, sender pair, target pair.
pub fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    [
        &[0, 1, 8, 0, 6, 4][..],
        &operation.to_be_bytes(),
        &sender.0.0,
        &sender.1.octets(),
        &target.0.0,
        &target.1.octets(),
    ]
    .concat()
}

/// The Internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| {
            u32::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]))
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
