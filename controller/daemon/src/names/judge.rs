//! Where a consumer by name may be.
//!
//! A name is its holder's word, and may be made to say anything at any time. It must not lead a guest to the provider:
//! neither to an address that means another host to each that uses it, nor into a network that this host is in.

use std::net::{IpAddr, Ipv4Addr};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use omerta_tunnel::AllowedIp;

use super::NameSettings;
use crate::pool::GuestPool;

/// Where clouds answer their own machines about themselves, beside 169.254.169.254.
const METADATA: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];

/// Why a name is not followed to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Forbidden {
    #[error("is no address of one host on the internet")]
    Kind,
    #[error("is where clouds answer their machines about themselves")]
    Metadata,
    #[error("lies in the guests' own network")]
    Pool,
    #[error("is this host's own")]
    Host,
    #[error(
        "lies in {0}, a network of the provider's: name it in `allow` of [names] if consumers may be there"
    )]
    Network(AllowedIp),
}

/// The addresses of this host, and the networks that it is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OwnNetworks {
    addresses: Vec<IpAddr>,
    networks: Vec<AllowedIp>,
}

impl OwnNetworks {
    /// As they are now, in the network namespace of this thread.
    pub(crate) fn now() -> Result<Self, Errno> {
        let mut own = Self::default();
        for interface in getifaddrs()? {
            let ip = |address: Option<SockaddrStorage>| {
                let address = address?;
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            };
            let Some(address) = ip(interface.address) else {
                continue;
            };
            own.addresses.push(address);
            // One without a mask is its own network, and a peer of it too.
            let prefix = match ip(interface.netmask) {
                Some(IpAddr::V4(mask)) => mask.to_bits().leading_ones(),
                Some(IpAddr::V6(mask)) => mask.to_bits().leading_ones(),
                None => 128,
            };
            let network = u8::try_from(prefix).ok();
            let network = network.and_then(|prefix| AllowedIp::new(address, prefix).ok());
            own.networks
                .push(network.unwrap_or_else(|| AllowedIp::host(address)));
            if let Some(peer) = ip(interface.destination) {
                own.networks.push(AllowedIp::host(peer));
            }
        }
        Ok(own)
    }

    /// Whether a consumer by name may be there.
    pub(crate) fn judge(
        &self,
        address: Ipv4Addr,
        settings: &NameSettings,
        pool: GuestPool,
    ) -> Result<(), Forbidden> {
        let [first, ..] = address.octets();
        // 0/8 is this network, 240/4 is reserved, and with it the broadcast.
        if first == 0
            || first >= 240
            || address.is_loopback()
            || address.is_link_local()
            || address.is_multicast()
        {
            return Err(Forbidden::Kind);
        }
        if METADATA.contains(&address) {
            return Err(Forbidden::Metadata);
        }
        if pool.contains(address) {
            return Err(Forbidden::Pool);
        }
        let address = IpAddr::V4(address);
        if self.addresses.contains(&address) {
            return Err(Forbidden::Host);
        }
        if settings.allow.iter().any(|allowed| allowed.holds(address)) {
            return Ok(());
        }
        let mut forbidden = self.networks.iter().chain(&settings.forbid);
        match forbidden.find(|network| network.holds(address)) {
            Some(network) => Err(Forbidden::Network(*network)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn settings(forbid: &[&str], allow: &[&str]) -> NameSettings {
        let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        NameSettings {
            nameservers: Vec::new(),
            least: Duration::from_secs(30),
            most: Duration::from_secs(3600),
            forbid: networks(forbid),
            allow: networks(allow),
        }
    }

    fn own() -> OwnNetworks {
        OwnNetworks {
            addresses: vec!["203.0.113.4".parse().unwrap()],
            networks: vec!["203.0.113.0/24".parse().unwrap()],
        }
    }

    fn judged(address: &str, settings: &NameSettings) -> Result<(), Forbidden> {
        let pool = "10.77.0.0/16".parse().unwrap();
        own().judge(address.parse().unwrap(), settings, pool)
    }

    #[test]
    fn what_means_another_host_to_each_is_forbidden_whatever_is_allowed() {
        let settings = settings(&[], &["0.0.0.0/0"]);
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.1.1",
            "169.254.169.254",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            assert_eq!(
                judged(address, &settings),
                Err(Forbidden::Kind),
                "{address}"
            );
        }
        for address in METADATA {
            let address = address.to_string();
            assert_eq!(judged(&address, &settings), Err(Forbidden::Metadata));
        }
        assert_eq!(judged("10.77.3.2", &settings), Err(Forbidden::Pool));
        assert_eq!(judged("203.0.113.4", &settings), Err(Forbidden::Host));
    }

    #[test]
    fn providers_networks_are_forbidden_unless_allowed() {
        let network = |text: &str| Err(Forbidden::Network(text.parse().unwrap()));
        let none = settings(&["10.0.0.0/8"], &[]);
        assert_eq!(judged("203.0.113.9", &none), network("203.0.113.0/24"));
        assert_eq!(judged("10.1.2.3", &none), network("10.0.0.0/8"));
        assert_eq!(judged("192.0.2.1", &none), Ok(()));
        let some = settings(&["10.0.0.0/8"], &["203.0.113.8/30", "10.1.0.0/16"]);
        assert_eq!(judged("203.0.113.9", &some), Ok(()));
        assert_eq!(judged("10.1.2.3", &some), Ok(()));
        assert_eq!(judged("203.0.113.12", &some), network("203.0.113.0/24"));
        assert_eq!(judged("10.2.2.3", &some), network("10.0.0.0/8"));
    }
}
