//! What an allowed frame must be, from the offsets in the RFCs; shares nothing with the verdict
//! but its types.

use std::net::{IpAddr, Ipv6Addr};

use omerta_verdict::{Direction, Endpoint, Mac, Protocol};

/// Whose frames, and to whom.
pub struct Owner {
    pub mac: Mac,
    pub gateway_mac: Mac,
    pub addresses: Vec<IpAddr>,
    pub gateways: Vec<IpAddr>,
    pub allow: Vec<Endpoint>,
}

/// One packet's parties, as the guest sees them.
#[derive(Debug)]
pub struct Parties {
    pub guest: IpAddr,
    pub peer: IpAddr,
    pub protocol: Protocol,
    pub peer_port: u16,
}

fn word(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*b.get(at)?, *b.get(at + 1)?]))
}

fn v4(b: &[u8], at: usize) -> Option<IpAddr> {
    Some(<[u8; 4]>::try_from(b.get(at..at + 4)?).ok()?.into())
}

fn v6(b: &[u8], at: usize) -> Option<IpAddr> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(b.get(at..at + 16)?).ok()?).into())
}

/// Source, destination, protocol, transport segment; `None` unless the frame is whole IP without
/// options, extension headers or fragments (RFC 791, 3.1; RFC 8200, 3).
fn segment(frame: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let (source, destination, protocol, start, end) = match word(frame, 12)? {
        0x0800 => {
            // Version 4, five words; of the fragment word only "don't fragment" may be set.
            if *frame.get(14)? != 0x45 || word(frame, 20)? & 0xbfff != 0 || *frame.get(22)? == 0 {
                return None;
            }
            let end = 14 + usize::from(word(frame, 16)?);
            (v4(frame, 26)?, v4(frame, 30)?, *frame.get(23)?, 34, end)
        }
        0x86dd => {
            if *frame.get(14)? >> 4 != 6 || *frame.get(21)? == 0 {
                return None;
            }
            let end = 54 + usize::from(word(frame, 18)?);
            (v6(frame, 22)?, v6(frame, 38)?, *frame.get(20)?, 54, end)
        }
        _ => return None,
    };
    // IEEE 802.3, 3.2.8: padding reaches to 60 bytes and no further.
    if end != frame.len() && (end > frame.len() || frame.len() > 60) {
        return None;
    }
    Some((source, destination, protocol, frame.get(start..end)?))
}

/// The parties of an allowed frame, or `None` where it is not a whole packet of ours.
pub fn parties(frame: &[u8], direction: Direction) -> Option<Parties> {
    let (source, destination, number, segment) = segment(frame)?;
    let egress = direction == Direction::Egress;
    let (guest, peer) = if egress {
        (source, destination)
    } else {
        (destination, source)
    };
    let (protocol, from, to) = match (number, source.is_ipv4()) {
        (17, _) => {
            if usize::from(word(segment, 4)?) != segment.len() || segment.len() < 8 {
                return None;
            }
            (Protocol::Udp, word(segment, 0)?, word(segment, 2)?)
        }
        (6, _) => {
            let header = usize::from(*segment.get(12)? >> 4) * 4;
            if header < 20 || header > segment.len() {
                return None;
            }
            (Protocol::Tcp, word(segment, 0)?, word(segment, 2)?)
        }
        (1, true) | (58, false) => {
            let echo = match (number, egress) {
                (1, true) => 8,
                (1, false) => 0,
                (_, true) => 128,
                (_, false) => 129,
            };
            if segment.len() < 8 || segment.get(..2)? != [echo, 0] {
                return None;
            }
            (Protocol::Icmp, 0, 0)
        }
        _ => return None,
    };
    let peer_port = if egress { to } else { from };
    Some(Parties {
        guest,
        peer,
        protocol,
        peer_port,
    })
}

impl Owner {
    fn lists(&self, p: &Parties) -> bool {
        self.addresses.contains(&p.guest)
            && self.allow.iter().any(|rule| {
                IpAddr::from(rule.address) == p.peer
                    && rule.protocol == p.protocol
                    && rule.port == p.peer_port
            })
    }

    /// Whether the MACs are right for a frame that is let pass.
    fn carries(&self, frame: &[u8], direction: Direction) -> bool {
        match direction {
            Direction::Egress => {
                frame.get(..6) == Some(&self.gateway_mac.0) && frame.get(6..12) == Some(&self.mac.0)
            }
            Direction::Ingress => {
                frame.get(..6) == Some(&self.mac.0)
                    && frame.get(6).is_some_and(|first| first & 1 == 0)
                    && ![Some(&[0; 6]), Some(&self.mac.0)]
                        .contains(&frame.get(6..12).and_then(<[u8]>::first_chunk))
            }
        }
    }

    /// Whether an allowed frame may be allowed; `listed` asks for the allowlist too.
    pub fn may_pass(&self, frame: &[u8], direction: Direction, listed: bool) -> bool {
        if !self.carries(frame, direction) {
            return false;
        }
        if let Some(p) = parties(frame, direction) {
            return self.addresses.contains(&p.guest) && (!listed || self.lists(&p));
        }
        direction == Direction::Ingress && (self.is_answer(frame) || self.is_error(frame, listed))
    }

    /// The guard's own answer: the gateway's ARP reply (RFC 826) or advertisement (RFC 4861, 4.4).
    fn is_answer(&self, frame: &[u8]) -> bool {
        let from_gateway = frame.get(6..12) == Some(&self.gateway_mac.0);
        let whole = match frame.get(12..14) {
            Some([0x08, 0x06]) => (|| {
                let gateway = self.gateways.contains(&v4(frame, 28)?);
                let guest =
                    self.addresses.contains(&v4(frame, 38)?) && frame.get(32..38)? == self.mac.0;
                let macs = frame.get(22..28)? == self.gateway_mac.0;
                Some(gateway && guest && macs && frame.get(14..22)? == [0, 1, 8, 0, 6, 4, 0, 2])
            })(),
            Some([0x86, 0xdd]) => {
                segment(frame).and_then(|(source, destination, next, message)| {
                    let head =
                        next == 58 && message.get(..2)? == [136, 0] && *frame.get(21)? == 255;
                    let target = v6(message, 8)? == source && self.gateways.contains(&source);
                    let option =
                        message.get(24..32)? == [&[2, 1][..], &self.gateway_mac.0].concat();
                    // fe80::/10: the guest may have asked from an address of its link.
                    let asker = self.addresses.contains(&destination)
                        || matches!(destination, IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80);
                    Some(head && target && option && asker)
                })
            }
            _ => None,
        };
        from_gateway && whole == Some(true)
    }

    /// An ICMP error (RFC 792, RFC 4443) that quotes what the guest may have sent.
    fn is_error(&self, frame: &[u8], listed: bool) -> bool {
        let Some((reporter, destination, number, message)) = segment(frame) else {
            return false;
        };
        if self.addresses.contains(&reporter) {
            return false;
        }
        let kinds: &[u8] = match number {
            1 => &[3, 11, 12],
            58 => &[1, 2, 3, 4],
            _ => return false,
        };
        let quoted = (|| {
            let (version, inner) = (message.get(8)? >> 4, message.get(8..)?);
            let (source, peer, protocol, ports) = match version {
                4 => (v4(inner, 12)?, v4(inner, 16)?, *inner.get(9)?, 20),
                6 => (v6(inner, 8)?, v6(inner, 24)?, *inner.get(6)?, 40),
                _ => return None,
            };
            let (protocol, peer_port) = match protocol {
                17 => (Protocol::Udp, word(inner, ports + 2)?),
                6 => (Protocol::Tcp, word(inner, ports + 2)?),
                1 | 58 => (Protocol::Icmp, 0),
                _ => return None,
            };
            Some(Parties {
                guest: source,
                peer,
                protocol,
                peer_port,
            })
        })();
        message.first().is_some_and(|kind| kinds.contains(kind))
            && self.addresses.contains(&destination)
            && quoted.is_some_and(|p| p.guest == destination && (!listed || self.lists(&p)))
    }
}
