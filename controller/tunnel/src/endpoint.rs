//! Where a peer's WireGuard listens.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// Where a peer's WireGuard listens, by address or by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerEndpoint {
    /// An address and a port.
    Address(SocketAddr),
    /// A name that is still to be resolved, and a port.
    Name {
        /// The name, in lower case, without a final dot.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Text that is not an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an endpoint: write ADDRESS:PORT, [ADDRESS6]:PORT or NAME:PORT")]
pub struct PeerEndpointError;

impl PeerEndpoint {
    /// The port.
    pub const fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Name { port, .. } => *port,
        }
    }
}

impl FromStr for PeerEndpoint {
    type Err = PeerEndpointError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            let scoped = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0);
            return if address.port() == 0 || scoped {
                Err(PeerEndpointError)
            } else {
                Ok(Self::Address(address))
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or(PeerEndpointError)?;
        if !is_host_name(host) || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(PeerEndpointError);
        }
        match port.parse() {
            Ok(0) | Err(_) => Err(PeerEndpointError),
            Ok(port) => Ok(Self::Name {
                host: host.trim_end_matches('.').to_ascii_lowercase(),
                port,
            }),
        }
    }
}

/// Labels of letters, digits and hyphens; the last is no number, so that no spelling of an address passes for a name
/// (`127.1` is one to resolvers).
fn is_host_name(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    text.len() <= 253
        && text.split('.').all(is_label)
        && last.starts_with(|first: char| first.is_ascii_alphabetic())
}

impl fmt::Display for PeerEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        for text in [
            "192.0.2.1:51820",
            "[2001:db8::1]:51820",
            "vpn.example.org:1",
            "localhost:65535",
        ] {
            assert_eq!(text.parse::<PeerEndpoint>().unwrap().to_string(), text);
        }
        let spelled: PeerEndpoint = "VPN.Example.ORG.:1".parse().unwrap();
        assert_eq!(spelled.to_string(), "vpn.example.org:1");
    }

    #[test]
    fn malformed_endpoints_are_refused() {
        for text in [
            "",
            ":",
            "192.0.2.1",
            "192.0.2.1:0",
            "192.0.2.1:65536",
            "192.0.2.1:+1",
            "2001:db8::1:51820x",
            "[fe80::1%2]:1",
            "127.1:1",
            "0x7f000001.1:1",
            "2130706433:1",
            "a b:1",
            "-a.example:1",
            "a..example:1",
            "a.example:",
            "a.example:x",
        ] {
            assert_eq!(
                text.parse::<PeerEndpoint>(),
                Err(PeerEndpointError),
                "{text:?}"
            );
        }
    }
}
