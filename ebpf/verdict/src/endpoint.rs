//! Endpoints: what an allowlist is made of. Text form `PROTO:ADDR:PORT`, `icmp:ADDR`, IPv6
//! addresses in brackets.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use crate::Address;

/// A transport protocol that a guest may speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocol {
    /// ICMP echo, or ICMPv6 echo where the address is IPv6. Has no port.
    Icmp = 1,
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

impl Protocol {
    /// The word used in endpoint text.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Icmp => "icmp",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// One remote that a guest may reach: protocol, address, and port (0 for ICMP).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// The protocol.
    pub protocol: Protocol,
    /// The remote's address.
    pub address: Address,
    /// The remote's port, host byte order; 0 for ICMP.
    pub port: u16,
}

/// Why text is not an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointParseError {
    /// The protocol is not `udp`, `tcp` or `icmp`.
    Protocol,
    /// The address does not parse; IPv6 must stand in brackets.
    Address,
    /// The port is missing, zero, or not a number up to 65535.
    Port,
    /// An ICMP endpoint was given a port.
    IcmpPort,
    /// The address can never be a peer: unspecified, loopback, multicast, broadcast, link-local, or
    /// an IPv6 address that stands for an IPv4 one.
    Unreachable,
}

impl fmt::Display for EndpointParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Protocol => "the protocol must be udp, tcp or icmp",
            Self::Address => "the address must be IPv4, or IPv6 in brackets",
            Self::Port => "the port must be a number from 1 to 65535",
            Self::IcmpPort => "icmp has no port: write icmp:ADDR",
            Self::Unreachable => {
                "the address must be unicast and routable: not loopback, unspecified, multicast, broadcast, link-local, or IPv6 that stands for IPv4"
            }
        })
    }
}

impl core::error::Error for EndpointParseError {}

impl FromStr for Endpoint {
    type Err = EndpointParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (protocol, rest) = text.split_once(':').ok_or(EndpointParseError::Protocol)?;
        let protocol = match protocol {
            "icmp" => Protocol::Icmp,
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(EndpointParseError::Protocol),
        };
        let (address, port) = split_address(rest)?;
        let port = match (protocol, port) {
            (Protocol::Icmp, None) => 0,
            (Protocol::Icmp, Some(_)) => return Err(EndpointParseError::IcmpPort),
            (_, None) => return Err(EndpointParseError::Port),
            (_, Some(digits)) => parse_port(digits)?,
        };
        let address = Address::from(address);
        if !address.is_possible_peer() {
            return Err(EndpointParseError::Unreachable);
        }
        Ok(Self {
            protocol,
            address,
            port,
        })
    }
}

fn split_address(text: &str) -> Result<(IpAddr, Option<&str>), EndpointParseError> {
    if let Some(bracketed) = text.strip_prefix('[') {
        let (address, rest) = bracketed
            .split_once(']')
            .ok_or(EndpointParseError::Address)?;
        let address: Ipv6Addr = address.parse().map_err(|_| EndpointParseError::Address)?;
        if address.to_ipv4_mapped().is_some() {
            return Err(EndpointParseError::Unreachable);
        }
        let port = match rest {
            "" => None,
            _ => Some(rest.strip_prefix(':').ok_or(EndpointParseError::Port)?),
        };
        return Ok((address.into(), port));
    }
    let (address, port) = match text.split_once(':') {
        Some((address, port)) => (address, Some(port)),
        None => (text, None),
    };
    let address: Ipv4Addr = address.parse().map_err(|_| EndpointParseError::Address)?;
    Ok((address.into(), port))
}

fn parse_port(digits: &str) -> Result<u16, EndpointParseError> {
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(EndpointParseError::Port);
    }
    match digits.parse() {
        Ok(0) | Err(_) => Err(EndpointParseError::Port),
        Ok(port) => Ok(port),
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.protocol.word())?;
        match IpAddr::from(self.address) {
            IpAddr::V4(v4) => write!(f, "{v4}")?,
            IpAddr::V6(v6) => write!(f, "[{v6}]")?,
        }
        if self.protocol != Protocol::Icmp {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate alloc;
    use alloc::string::ToString;

    #[test]
    fn text_round_trips() {
        for text in [
            "udp:192.0.2.1:51820",
            "tcp:[2001:db8::1]:443",
            "icmp:192.0.2.9",
            "icmp:[2001:db8::9]",
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), text);
        }
    }

    #[test]
    fn malformed_text_is_refused_with_its_cause() {
        use EndpointParseError::*;
        for (text, cause) in [
            ("", Protocol),
            ("sctp:192.0.2.1:1", Protocol),
            ("udp", Protocol),
            ("UDP:192.0.2.1:1", Protocol),
            ("udp:192.0.2.1", Port),
            ("udp:192.0.2.1:", Port),
            ("udp:192.0.2.1:0", Port),
            ("udp:192.0.2.1:65536", Port),
            ("udp:192.0.2.1:+1", Port),
            ("udp:192.0.2.1:1:2", Port),
            ("udp:[2001:db8::1]1", Port),
            ("udp:2001:db8::1:1", Address),
            ("udp:192.0.2:1", Address),
            ("udp:[192.0.2.1]:1", Address),
            ("udp:consumer.example:1", Address),
            ("icmp:192.0.2.1:1", IcmpPort),
            ("udp:127.0.0.1:1", Unreachable),
            ("udp:0.0.0.0:1", Unreachable),
            ("udp:255.255.255.255:1", Unreachable),
            ("udp:224.0.0.1:1", Unreachable),
            ("udp:[::1]:1", Unreachable),
            ("udp:[ff02::1]:1", Unreachable),
            ("udp:[::ffff:192.0.2.1]:1", Unreachable),
            ("udp:169.254.169.254:80", Unreachable),
            ("udp:[fe80::1]:1", Unreachable),
            ("udp:[64:ff9b::192.0.2.1]:1", Unreachable),
            ("udp:[64:ff9b:1::1]:1", Unreachable),
            ("udp:[2002:c000:201::1]:1", Unreachable),
            ("udp:[2001:0:1::1]:1", Unreachable),
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(cause), "{text}");
        }
    }
}
