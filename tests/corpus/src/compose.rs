//! A frame's bytes from its description.

use std::net::{IpAddr, Ipv6Addr};

use crate::Way;
use crate::cast::Cast;
use crate::spec::{Hex, Spec, Template};

const GUEST_PORT: u16 = 40000;
const WIREGUARD_PORT: u16 = 51820;
const HTTPS_PORT: u16 = 443;

/// The frame that `spec` describes, sent the way `way`.
pub fn compose(cast: &Cast, spec: &Spec, way: Way) -> Result<Vec<u8>, String> {
    Composer { cast, spec, way }.frame()
}

struct Composer<'a> {
    cast: &'a Cast,
    spec: &'a Spec,
    way: Way,
}

impl Composer<'_> {
    fn frame(&self) -> Result<Vec<u8>, String> {
        self.refuse_what_is_not_used()?;
        let (kind, body) = match self.spec.frame {
            Template::Bare => (0x0800, self.l4(Vec::new())?),
            Template::Arp => (0x0806, self.arp()?),
            Template::Udp4 | Template::Tcp4 | Template::Icmp4 => (0x0800, self.ip4()?),
            _ => (0x86dd, self.ip6()?),
        };
        let (src, mut dst) = match self.way {
            Way::ToGuest => ("gateway", "guest"),
            Way::FromGuest | Way::Between => ("guest", "gateway"),
        };
        let group;
        match self.spec.frame {
            Template::Arp => dst = "broadcast",
            Template::Nd => {
                let low = self.nd_target()?.octets();
                group = format!("33:33:ff:{:02x}:{:02x}:{:02x}", low[13], low[14], low[15]);
                dst = &group;
            }
            _ => {}
        }
        let eth = &self.spec.eth;
        let mut frame = self.cast.mac(eth.dst.as_deref().unwrap_or(dst))?.0.to_vec();
        frame.extend(self.cast.mac(eth.src.as_deref().unwrap_or(src))?.0);
        frame.extend(bytes(&eth.tags));
        frame.extend(eth.kind.unwrap_or(kind).to_be_bytes());
        frame.extend(body);
        self.bend(frame)
    }

    fn bend(&self, mut frame: Vec<u8>) -> Result<Vec<u8>, String> {
        for (at, Hex(bytes)) in &self.spec.poke {
            frame
                .get_mut(*at..at + bytes.len())
                .ok_or_else(|| format!("poke at {at}: the frame is shorter"))?
                .copy_from_slice(bytes);
        }
        if let Some(length) = self.spec.truncate {
            if length >= frame.len() {
                return Err(format!(
                    "truncate to {length}: the frame has {}",
                    frame.len()
                ));
            }
            frame.truncate(length);
        }
        frame.extend(bytes(&self.spec.append));
        if let Some(length) = self.spec.pad {
            if length <= frame.len() {
                return Err(format!("pad to {length}: the frame has {}", frame.len()));
            }
            frame.resize(length, 0);
        }
        Ok(frame)
    }

    /// A table that the template has no place for would be a case that tests nothing.
    fn refuse_what_is_not_used(&self) -> Result<(), String> {
        let s = self.spec;
        let (v4, v6) = match s.frame {
            Template::Udp4 | Template::Tcp4 | Template::Icmp4 => (true, false),
            Template::Bare | Template::Arp => (false, false),
            _ => (false, true),
        };
        let udp = matches!(s.frame, Template::Udp4 | Template::Udp6);
        let tcp = matches!(s.frame, Template::Tcp4 | Template::Tcp6);
        let icmp = matches!(s.frame, Template::Icmp4 | Template::Icmp6);
        for (name, given, used) in [
            ("arp", s.arp.is_some(), s.frame == Template::Arp),
            ("ip4", s.ip4.is_some(), v4),
            ("ip6", s.ip6.is_some(), v6),
            ("udp", s.udp.is_some(), udp),
            ("tcp", s.tcp.is_some(), tcp),
            ("icmp", s.icmp.is_some(), icmp),
            ("nd", s.nd.is_some(), s.frame == Template::Nd),
            ("payload", s.payload.is_some(), udp || tcp || icmp),
            (
                "l4",
                s.l4.is_some() || s.inner.is_some(),
                s.frame != Template::Arp,
            ),
        ] {
            if given && !used {
                return Err(format!("{name} has no place in {:?}", s.frame));
            }
        }
        Ok(())
    }

    fn arp(&self) -> Result<Vec<u8>, String> {
        let a = self.spec.arp.clone().unwrap_or_default();
        let (sender, target) = match self.way {
            Way::ToGuest => ("gateway", "guest"),
            Way::FromGuest | Way::Between => ("guest", "gateway"),
        };
        let mut message = a.hardware.unwrap_or(1).to_be_bytes().to_vec();
        message.extend(a.protocol.unwrap_or(0x0800).to_be_bytes());
        message.extend([
            a.hardware_length.unwrap_or(6),
            a.protocol_length.unwrap_or(4),
        ]);
        message.extend(a.operation.unwrap_or(1).to_be_bytes());
        for (mac, address, name, default_mac) in [
            (a.sender_mac, a.sender, sender, sender),
            (a.target_mac, a.target, target, "zero"),
        ] {
            message.extend(self.cast.mac(mac.as_deref().unwrap_or(default_mac))?.0);
            message.extend(octets(
                self.cast.address(address.as_deref().unwrap_or(name))?,
            ));
        }
        Ok(message)
    }

    fn ip4(&self) -> Result<Vec<u8>, String> {
        let ip = self.spec.ip4.clone().unwrap_or_default();
        let (src, dst) = self.addresses(ip.src.as_deref(), ip.dst.as_deref(), "")?;
        let protocol = match self.spec.frame {
            Template::Udp4 => 17,
            Template::Tcp4 => 6,
            _ => 1,
        };
        let body = self.l4(self.transport(src, dst)?)?;
        let options = bytes(&ip.options);
        let header_words = 5 + options.len().div_ceil(4) as u8;
        let total = ip.total.unwrap_or((20 + options.len() + body.len()) as u16);
        let mut packet = vec![ip.version.unwrap_or(4) << 4 | ip.ihl.unwrap_or(header_words)];
        packet.push(ip.tos.unwrap_or(0));
        packet.extend(total.to_be_bytes());
        packet.extend([0x12, 0x34]);
        packet.extend(ip.fragment.unwrap_or(0x4000).to_be_bytes());
        packet.extend([ip.ttl.unwrap_or(64), ip.protocol.unwrap_or(protocol), 0, 0]);
        packet.extend(octets(src));
        packet.extend(octets(dst));
        packet.extend(options);
        let sum = checksum(&packet);
        put(&mut packet, 10, sum);
        packet.extend(body);
        Ok(packet)
    }

    fn ip6(&self) -> Result<Vec<u8>, String> {
        let ip = self.spec.ip6.clone().unwrap_or_default();
        let nd = self.spec.frame == Template::Nd;
        let (mut src, mut dst) = self.addresses(ip.src.as_deref(), ip.dst.as_deref(), "6")?;
        if nd {
            if ip.src.is_none() && self.way == Way::ToGuest {
                src = self.cast.address("gateway6")?;
            }
            if ip.dst.is_none() {
                dst = solicited_node(self.nd_target()?).into();
            }
        }
        let next = match self.spec.frame {
            Template::Udp6 => 17,
            Template::Tcp6 => 6,
            _ => 58,
        };
        let message = if nd {
            self.nd(src, dst)?
        } else {
            self.transport(src, dst)?
        };
        let body = self.l4(message)?;
        let extensions = bytes(&ip.extensions);
        let length = ip.length.unwrap_or((extensions.len() + body.len()) as u16);
        let mut packet = vec![ip.version.unwrap_or(6) << 4, 0, 0, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([
            ip.next.unwrap_or(next),
            ip.hops.unwrap_or(if nd { 255 } else { 64 }),
        ]);
        packet.extend(octets(src));
        packet.extend(octets(dst));
        packet.extend(extensions);
        packet.extend(body);
        Ok(packet)
    }

    /// Source and destination; `family` is what an IPv6 name ends in.
    fn addresses(
        &self,
        src: Option<&str>,
        dst: Option<&str>,
        family: &str,
    ) -> Result<(IpAddr, IpAddr), String> {
        let far = if self.way == Way::Between {
            "neighbour"
        } else {
            "consumer"
        };
        let (guest, far) = (format!("guest{family}"), format!("{far}{family}"));
        let (from, to) = if self.way == Way::ToGuest {
            (&far, &guest)
        } else {
            (&guest, &far)
        };
        let pair = (
            self.cast.address(src.unwrap_or(from))?,
            self.cast.address(dst.unwrap_or(to))?,
        );
        if pair.0.is_ipv6() != pair.1.is_ipv6() || pair.0.is_ipv6() == family.is_empty() {
            return Err(format!(
                "addresses of the wrong family: {} {}",
                pair.0, pair.1
            ));
        }
        Ok(pair)
    }

    fn l4(&self, default: Vec<u8>) -> Result<Vec<u8>, String> {
        let mut body = match (&self.spec.l4, &self.spec.inner) {
            (None, None) => return Ok(default),
            (l4, _) => bytes(l4),
        };
        if let Some(inner) = &self.spec.inner {
            body.extend(packet_of(self.cast, inner, self.way)?);
        }
        Ok(body)
    }

    fn transport(&self, src: IpAddr, dst: IpAddr) -> Result<Vec<u8>, String> {
        let payload = self
            .spec
            .payload
            .clone()
            .map_or(b"omerta corpus".to_vec(), |hex| hex.0);
        match self.spec.frame {
            Template::Udp4 | Template::Udp6 => Ok(self.udp(src, dst, &payload)),
            Template::Tcp4 | Template::Tcp6 => Ok(self.tcp(src, dst, &payload)),
            _ => self.icmp(src, dst, payload),
        }
    }

    fn ports(&self, src: Option<u16>, dst: Option<u16>, far: u16) -> [u8; 4] {
        let (from, to) = if self.way == Way::ToGuest {
            (far, GUEST_PORT)
        } else {
            (GUEST_PORT, far)
        };
        let [a, b] = src.unwrap_or(from).to_be_bytes();
        let [c, d] = dst.unwrap_or(to).to_be_bytes();
        [a, b, c, d]
    }

    fn udp(&self, src: IpAddr, dst: IpAddr, payload: &[u8]) -> Vec<u8> {
        let u = self.spec.udp.clone().unwrap_or_default();
        let mut datagram = self.ports(u.src, u.dst, WIREGUARD_PORT).to_vec();
        datagram.extend(u.length.unwrap_or((8 + payload.len()) as u16).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(payload);
        let sum = u
            .checksum
            .unwrap_or_else(|| covered(src, dst, 17, &datagram));
        put(&mut datagram, 6, sum);
        datagram
    }

    fn tcp(&self, src: IpAddr, dst: IpAddr, payload: &[u8]) -> Vec<u8> {
        let t = self.spec.tcp.clone().unwrap_or_default();
        let options = bytes(&t.options);
        let words = 5 + options.len().div_ceil(4) as u8;
        let flags = if self.way == Way::ToGuest { 0x12 } else { 0x02 };
        let mut segment = self.ports(t.src, t.dst, HTTPS_PORT).to_vec();
        segment.extend([0, 0, 0, 1, 0, 0, 0, 0]);
        segment.extend([
            t.offset.unwrap_or(words) << 4,
            t.flags.unwrap_or(flags),
            0xff,
            0xff,
        ]);
        segment.extend([0, 0, 0, 0]);
        segment.extend(options);
        segment.extend(payload);
        let sum = covered(src, dst, 6, &segment);
        put(&mut segment, 16, sum);
        segment
    }

    fn icmp(&self, src: IpAddr, dst: IpAddr, payload: Vec<u8>) -> Result<Vec<u8>, String> {
        let i = self.spec.icmp.clone().unwrap_or_default();
        let echo = match (self.spec.frame, self.way) {
            (Template::Icmp4, Way::ToGuest) => 0,
            (Template::Icmp4, _) => 8,
            (_, Way::ToGuest) => 129,
            _ => 128,
        };
        let mut message = vec![i.kind.unwrap_or(echo), i.code.unwrap_or(0), 0, 0];
        let rest = i.rest.unwrap_or(Hex(vec![0, 7, 0, 1])).0;
        message.extend(rest);
        match i.quote {
            Some(quote) => message.extend(packet_of(self.cast, &quote, Way::FromGuest)?),
            None => message.extend(payload),
        }
        let sum = match self.spec.frame {
            Template::Icmp4 => checksum(&message),
            _ => covered(src, dst, 58, &message),
        };
        put(&mut message, 2, sum);
        Ok(message)
    }

    fn nd_target(&self) -> Result<Ipv6Addr, String> {
        let default = if self.way == Way::ToGuest {
            "guest6"
        } else {
            "gateway6"
        };
        let target = self.spec.nd.as_ref().and_then(|nd| nd.target.as_deref());
        match self.cast.address(target.unwrap_or(default))? {
            IpAddr::V6(target) => Ok(target),
            IpAddr::V4(target) => Err(format!("a neighbour's address is IPv6, not {target}")),
        }
    }

    fn nd(&self, src: IpAddr, dst: IpAddr) -> Result<Vec<u8>, String> {
        let nd = self.spec.nd.clone().unwrap_or_default();
        let sender = if self.way == Way::ToGuest {
            "gateway"
        } else {
            "guest"
        };
        let mut message = vec![nd.kind.unwrap_or(135), nd.code.unwrap_or(0), 0, 0];
        message.extend([nd.flags.unwrap_or(0), 0, 0, 0]);
        message.extend(self.nd_target()?.octets());
        match nd.options {
            Some(options) => message.extend(options.0),
            None => {
                message.extend([1, 1]);
                message.extend(self.cast.mac(sender)?.0);
            }
        }
        let sum = covered(src, dst, 58, &message);
        put(&mut message, 2, sum);
        Ok(message)
    }
}

/// The packet of a frame: what is behind the Ethernet header.
fn packet_of(cast: &Cast, spec: &Spec, way: Way) -> Result<Vec<u8>, String> {
    Ok(compose(cast, spec, way)?
        .get(14..)
        .unwrap_or_default()
        .to_vec())
}

fn bytes(hex: &Option<Hex>) -> Vec<u8> {
    hex.as_ref().map(|hex| hex.0.clone()).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (a & 0xff), b)
}

/// The checksum of a segment with its pseudo-header (RFC 768, RFC 8200, 8.1); 0 is sent as ffff.
fn covered(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    let mut covered = [octets(src), octets(dst)].concat();
    covered.extend((segment.len() as u32).to_be_bytes());
    covered.extend([0, 0, 0, protocol]);
    covered.extend(segment);
    match checksum(&covered) {
        0 => 0xffff,
        sum => sum,
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| match pair {
        [a, b] => u32::from(u16::from_be_bytes([*a, *b])),
        [a] => u32::from(*a) << 8,
        _ => 0,
    };
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}
