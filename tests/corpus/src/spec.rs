//! A frame as a case describes it: a template that is right, and what differs from it.

use serde::{Deserialize, Deserializer, de::Error};

/// The frame that a case starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// IPv4 and UDP, port 40000 of the guest, port 51820 of the consumer.
    Udp4,
    /// IPv4 and a TCP SYN (from the guest) or SYN and ACK (to it), port 443 of the consumer.
    Tcp4,
    /// IPv4 and an ICMP echo request (from the guest) or reply (to it).
    Icmp4,
    /// As [`Template::Udp4`] over IPv6.
    Udp6,
    /// As [`Template::Tcp4`] over IPv6.
    Tcp6,
    /// IPv6 and an ICMPv6 echo request (from the guest) or reply (to it).
    Icmp6,
    /// The guest's ARP request for the gateway, or the gateway's for the guest.
    Arp,
    /// The guest's neighbour solicitation of the gateway, or the gateway's of the guest.
    Nd,
    /// Only an Ethernet header.
    Bare,
}

/// Bytes written as hex digits; blanks are ignored, and `xx*N` repeats one byte N times.
#[derive(Clone, Debug, Default)]
pub struct Hex(pub Vec<u8>);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let text = String::deserialize(input)?;
        parse_hex(&text).map(Self).ok_or_else(|| {
            D::Error::custom(format!(
                "not hex bytes such as \"08 00\" or \"00*8\": {text}"
            ))
        })
    }
}

fn parse_hex(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for word in text.split_whitespace() {
        let (digits, times) = match word.split_once('*') {
            Some((digits, times)) => (digits, times.parse().ok()?),
            None => (word, 1),
        };
        if !digits.is_ascii() || !digits.len().is_multiple_of(2) {
            return None;
        }
        let group = (0..digits.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok())
            .collect::<Option<Vec<_>>>()?;
        for _ in 0..times {
            bytes.extend(&group);
        }
    }
    Some(bytes)
}

macro_rules! overrides {
    ($($(#[doc = $doc:literal])+ $name:ident { $($field:ident: $kind:ty,)+ })+) => {$(
        $(#[doc = $doc])+
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $(pub(crate) $field: Option<$kind>,)+ }
    )+};
}

overrides! {
    /// `eth`: MACs by name or literally, `tags` goes in front of the EtherType.
    Eth { dst: String, src: String, kind: u16, tags: Hex, }
    /// `arp`: RFC 826's fields.
    Arp {
        hardware: u16, protocol: u16, hardware_length: u8, protocol_length: u8, operation: u16,
        sender_mac: String, sender: String, target_mac: String, target: String,
    }
    /// `ip4`: RFC 791's fields; `fragment` is flags and offset together, `options` are put behind
    /// the header and counted in `ihl` and `total` unless those are given.
    Ip4 {
        src: String, dst: String, version: u8, ihl: u8, tos: u8, total: u16, fragment: u16,
        ttl: u8, protocol: u8, options: Hex,
    }
    /// `ip6`: RFC 8200's fields; `extensions` stand between the header and the rest, the last of
    /// them naming the protocol that follows.
    Ip6 {
        src: String, dst: String, version: u8, length: u16, next: u8, hops: u8, extensions: Hex,
    }
    /// `udp`: RFC 768's fields; a checksum that is not given is right.
    Udp { src: u16, dst: u16, length: u16, checksum: u16, }
    /// `tcp`: RFC 9293's fields; `offset` in words of four bytes, `options` are counted in it.
    Tcp { src: u16, dst: u16, offset: u8, flags: u8, options: Hex, }
    /// `icmp`: type, code, the four bytes behind the checksum, and for an error the packet that it
    /// quotes, described as one that the guest has sent.
    Icmp { kind: u8, code: u8, rest: Hex, quote: Box<Spec>, }
    /// `nd`: RFC 4861, 4.3 and 4.4; `options` replaces the link-layer option.
    Nd { kind: u8, code: u8, flags: u8, target: String, options: Hex, }
}

/// What a case says of its frame.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub(crate) frame: Template,
    #[serde(default)]
    pub(crate) eth: Eth,
    pub(crate) arp: Option<Arp>,
    pub(crate) ip4: Option<Ip4>,
    pub(crate) ip6: Option<Ip6>,
    pub(crate) udp: Option<Udp>,
    pub(crate) tcp: Option<Tcp>,
    pub(crate) icmp: Option<Icmp>,
    pub(crate) nd: Option<Nd>,
    /// In place of everything behind the IP header.
    pub(crate) l4: Option<Hex>,
    /// A packet (without its Ethernet header) behind `l4`.
    pub(crate) inner: Option<Box<Spec>>,
    /// What UDP, TCP or an echo message carries.
    pub(crate) payload: Option<Hex>,
    /// Bytes that replace those at an offset of the finished frame, before the next three.
    #[serde(default)]
    pub(crate) poke: Vec<(usize, Hex)>,
    /// How many bytes of the frame are left.
    pub(crate) truncate: Option<usize>,
    pub(crate) append: Option<Hex>,
    /// Zeroes up to this length.
    pub(crate) pad: Option<usize>,
}
