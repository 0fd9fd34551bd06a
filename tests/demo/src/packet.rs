//! Captured frames, read far enough to tell what they are.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// What a frame is.
#[derive(Clone, Debug, PartialEq)]
pub struct Packet {
    pub source_mac: String,
    pub body: Body,
    /// From the end of the last header that was read.
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    Arp {
        sender: Ipv4Addr,
        target: Ipv4Addr,
    },
    Ipv4 {
        source: Ipv4Addr,
        destination: Ipv4Addr,
        protocol: u8,
        ports: Option<(u16, u16)>,
        fragment: bool,
    },
    Ipv6 {
        source: Ipv6Addr,
        destination: Ipv6Addr,
    },
    Other(u16),
}

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

impl Packet {
    /// Reads a frame; `None` where it is cut short.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let [a, b, c, d, e, f] = frame.get(6..12)?.try_into().ok()?;
        let source_mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        let rest = frame.get(14..)?;
        let (body, payload) = match word(frame, 12)? {
            0x0806 => (
                Body::Arp {
                    sender: ipv4(rest, 14)?,
                    target: ipv4(rest, 24)?,
                },
                &[][..],
            ),
            0x0800 => parse_ipv4(rest)?,
            0x86dd => (
                Body::Ipv6 {
                    source: ipv6(rest, 8)?,
                    destination: ipv6(rest, 24)?,
                },
                rest.get(40..)?,
            ),
            ethertype => (Body::Other(ethertype), rest),
        };
        Some(Self {
            source_mac,
            body,
            payload: payload.to_vec(),
        })
    }

    /// Whether the packet goes to an address in a protocol, and to a port where one is given.
    pub fn goes_to(&self, wanted: Ipv4Addr, wanted_protocol: u8, port: Option<u16>) -> bool {
        match self.body {
            Body::Ipv4 {
                destination,
                protocol,
                ports,
                ..
            } => {
                destination == wanted
                    && protocol == wanted_protocol
                    && port.is_none_or(|port| ports.is_some_and(|(_, to)| to == port))
            }
            _ => false,
        }
    }

    /// Whether the packet claims to come from an address.
    pub fn comes_from(&self, wanted: Ipv4Addr) -> bool {
        matches!(self.body, Body::Ipv4 { source, .. } if source == wanted)
    }

    /// Whether the payload holds some text.
    pub fn holds(&self, text: &str) -> bool {
        self.payload
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    }
}

fn parse_ipv4(packet: &[u8]) -> Option<(Body, &[u8])> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let protocol = *packet.get(9)?;
    // More fragments, or an offset.
    let fragment = word(packet, 6)? & 0x3fff != 0;
    let rest = packet.get(header..)?;
    let has_ports = !fragment && (protocol == TCP || protocol == UDP);
    let ports = if has_ports {
        Some((word(rest, 0)?, word(rest, 2)?))
    } else {
        None
    };
    let payload = if protocol == UDP && has_ports {
        rest.get(8..)?
    } else {
        rest
    };
    let body = Body::Ipv4 {
        source: ipv4(packet, 12)?,
        destination: ipv4(packet, 16)?,
        protocol,
        ports,
        fragment,
    };
    Some((body, payload))
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn ipv4(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into())
}

fn ipv6(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    Some(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?.into())
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.body {
            Body::Arp { sender, target } => write!(f, "arp {sender} → {target}")?,
            Body::Ipv4 {
                source,
                destination,
                protocol,
                ports,
                fragment,
            } => {
                match *protocol {
                    ICMP => f.write_str("icmp")?,
                    TCP => f.write_str("tcp")?,
                    UDP => f.write_str("udp")?,
                    other => write!(f, "protocol {other}")?,
                }
                match ports {
                    Some((from, to)) => write!(f, " {source}:{from} → {destination}:{to}")?,
                    None => write!(f, " {source} → {destination}")?,
                }
                if *fragment {
                    f.write_str(" (fragment)")?;
                }
            }
            Body::Ipv6 {
                source,
                destination,
            } => write!(f, "ipv6 {source} → {destination}")?,
            Body::Other(ethertype) => write!(f, "ethertype {ethertype:#06x}")?,
        }
        write!(f, " from {}", self.source_mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp_frame(flags: u16) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        frame.extend([0x45, 0, 0, 33, 0, 0]);
        frame.extend(flags.to_be_bytes());
        frame.extend([64, 17, 0, 0, 10, 77, 0, 2, 192, 0, 2, 1]);
        frame.extend([0x12, 0x34, 0xca, 0x6c, 0, 13, 0, 0]);
        frame.extend(b"hello");
        frame
    }

    #[test]
    fn udp_is_read_to_its_payload() {
        let packet = Packet::parse(&udp_frame(0)).unwrap();
        assert!(packet.goes_to(Ipv4Addr::new(192, 0, 2, 1), UDP, Some(51820)));
        assert!(!packet.goes_to(Ipv4Addr::new(192, 0, 2, 1), UDP, Some(51821)));
        assert!(!packet.goes_to(Ipv4Addr::new(192, 0, 2, 1), TCP, None));
        assert!(packet.comes_from(Ipv4Addr::new(10, 77, 0, 2)));
        assert!(packet.holds("hello"));
        assert_eq!(
            packet.to_string(),
            "udp 10.77.0.2:4660 → 192.0.2.1:51820 from 02:00:00:00:00:02"
        );
    }

    #[test]
    fn fragment_has_no_ports() {
        for flags in [0x2000, 0x0001] {
            let packet = Packet::parse(&udp_frame(flags)).unwrap();
            assert!(
                matches!(
                    packet.body,
                    Body::Ipv4 {
                        fragment: true,
                        ports: None,
                        ..
                    }
                ),
                "{packet}"
            );
        }
        let unfragmented = Packet::parse(&udp_frame(0x4000)).unwrap();
        assert!(matches!(
            unfragmented.body,
            Body::Ipv4 {
                fragment: false,
                ..
            }
        ));
    }

    #[test]
    fn no_cut_is_read_beyond_its_end() {
        let frame = udp_frame(0);
        for length in 0..frame.len() - 5 {
            assert_eq!(Packet::parse(&frame[..length]), None, "{length}");
        }
    }
}
