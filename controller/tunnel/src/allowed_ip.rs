//! The networks whose packets belong to a peer.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A network, without bits beyond its prefix: two that are equal are one entry of a device's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AllowedIp {
    address: IpAddr,
    prefix: u8,
}

/// Text that is not a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a network: write ADDRESS or ADDRESS/PREFIX, as in 10.0.0.0/24 or 2001:db8::/64")]
pub struct AllowedIpError;

impl AllowedIp {
    /// The network of an address; bits beyond the prefix are cleared, as WireGuard does.
    ///
    /// # Errors
    /// The prefix is longer than the address.
    pub fn new(address: IpAddr, prefix: u8) -> Result<Self, AllowedIpError> {
        let address = match address {
            IpAddr::V4(v4) if prefix <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask))
            }
            IpAddr::V6(v6) if prefix <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask))
            }
            _ => return Err(AllowedIpError),
        };
        Ok(Self { address, prefix })
    }

    /// One address alone.
    pub const fn host(address: IpAddr) -> Self {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        Self { address, prefix }
    }

    /// Whether an address lies in it.
    pub fn holds(&self, address: IpAddr) -> bool {
        Self::new(address, self.prefix) == Ok(*self)
    }

    /// Its first address.
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// How many bits of it are fixed.
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether it is one address alone.
    pub const fn is_host(&self) -> bool {
        self.prefix == if self.address.is_ipv4() { 32 } else { 128 }
    }
}

impl FromStr for AllowedIp {
    type Err = AllowedIpError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((address, prefix)) = text.split_once('/') else {
            return text.parse().map(Self::host).map_err(|_| AllowedIpError);
        };
        // `+8` is a number to Rust and none to WireGuard.
        if !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(AllowedIpError);
        }
        let address = address.parse().map_err(|_| AllowedIpError)?;
        Self::new(address, prefix.parse().map_err(|_| AllowedIpError)?)
    }
}

impl fmt::Display for AllowedIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_beyond_the_prefix_are_cleared() {
        for (text, canonical) in [
            ("10.1.2.3/24", "10.1.2.0/24"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("10.1.2.3/0", "0.0.0.0/0"),
            ("2001:db8::1/64", "2001:db8::/64"),
            ("2001:db8::1", "2001:db8::1/128"),
            ("::1/0", "::/0"),
        ] {
            assert_eq!(text.parse::<AllowedIp>().unwrap().to_string(), canonical);
        }
    }

    #[test]
    fn malformed_networks_are_refused() {
        for text in [
            "",
            "/",
            "10.0.0.0/",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/+8",
            "10.0.0.0/8/8",
        ] {
            assert_eq!(text.parse::<AllowedIp>(), Err(AllowedIpError), "{text:?}");
        }
    }
}
