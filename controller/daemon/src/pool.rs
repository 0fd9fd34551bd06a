//! Addresses for guests.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use omerta_engine::GuestNetwork;
use omerta_verdict::Mac;
use thiserror::Error;

/// A network that guests' addresses are taken from, four addresses a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GuestPool {
    base: u32,
    prefix: u8,
}

/// Why text is not a pool.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum PoolError {
    #[error("`{0}` is not a network: write ADDRESS/PREFIX as in 10.77.0.0/16")]
    Malformed(String),
    #[error("prefix /{0} is out of range: give 8 to 30")]
    Prefix(u8),
    #[error("{given} has bits set below its prefix: write {network}/{prefix}")]
    HostBits {
        given: Ipv4Addr,
        network: Ipv4Addr,
        prefix: u8,
    },
}

/// What a guest and its host-side interface are addressed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// The host's address on the tap.
    pub(crate) gateway: Ipv4Addr,
    /// The guest's address.
    pub(crate) guest: Ipv4Addr,
    /// The guest's MAC.
    pub(crate) mac: Mac,
}

impl GuestPool {
    /// The network that all addresses are of.
    pub(crate) const fn network(self) -> GuestNetwork {
        GuestNetwork {
            address: Ipv4Addr::from_bits(self.base),
            prefix: self.prefix,
        }
    }
}

impl FromStr for GuestPool {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || PoolError::Malformed(text.escape_default().to_string());
        let (address, prefix) = text.split_once('/').ok_or_else(malformed)?;
        let address: Ipv4Addr = address.parse().map_err(|_| malformed())?;
        let prefix: u8 = prefix.parse().map_err(|_| malformed())?;
        if !(8..=30).contains(&prefix) {
            return Err(PoolError::Prefix(prefix));
        }
        let base = u32::from(address) & (u32::MAX << (32 - prefix));
        if base != u32::from(address) {
            let network = Ipv4Addr::from(base);
            return Err(PoolError::HostBits {
                given: address,
                network,
                prefix,
            });
        }
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for GuestPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

impl GuestPool {
    /// Its first address.
    pub(crate) const fn base(self) -> u32 {
        self.base
    }

    /// How many guests it has addresses for.
    pub(crate) const fn capacity(self) -> usize {
        1 << (30 - self.prefix)
    }

    /// Whether the address lies in the pool's network.
    pub(crate) fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & (u32::MAX << (32 - self.prefix)) == self.base
    }

    fn slot(self, place: u32) -> Slot {
        Slot(self.base / 4 + place)
    }
}

/// Four addresses, held by one guest: those that begin with four times the number, whatever pool they
/// were taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(pub(crate) u32);

impl Slot {
    /// What a guest that holds it is addressed by.
    pub(crate) fn addresses(self) -> Addresses {
        let gateway = self.0.wrapping_mul(4) + 1;
        let guest = gateway + 1;
        let [_, b, c, d] = guest.to_be_bytes();
        Addresses {
            gateway: Ipv4Addr::from(gateway),
            guest: Ipv4Addr::from(guest),
            mac: Mac([0x52, 0x54, 0x00, b, c, d]),
        }
    }
}

/// Which places in the pool are held.
#[derive(Debug)]
pub(crate) struct Slots {
    pool: GuestPool,
    held: BTreeSet<Slot>,
    /// Where the search begins: an address rests as long as possible before it is used again.
    next: u32,
}

impl Slots {
    /// A pool of which nothing is held.
    pub(crate) const fn new(pool: GuestPool) -> Self {
        Self {
            pool,
            held: BTreeSet::new(),
            next: 0,
        }
    }

    /// Takes a place; none if all are held.
    pub(crate) fn take(&mut self) -> Option<(Slot, Addresses)> {
        let capacity = u32::try_from(self.pool.capacity()).ok()?;
        let slot = (0..capacity)
            .map(|step| self.pool.slot((self.next + step) % capacity))
            .find(|slot| !self.held.contains(slot))?;
        self.held.insert(slot);
        self.next = (slot.0 - self.pool.slot(0).0 + 1) % capacity;
        Some((slot, slot.addresses()))
    }

    /// Holds the place of a guest that was there before, and tells whether nobody held it.
    pub(crate) fn hold(&mut self, slot: Slot) -> bool {
        self.held.insert(slot)
    }

    /// How many places are held.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Gives a place back.
    pub(crate) fn give_back(&mut self, slot: Slot) {
        self.held.remove(&slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_text_is_checked() {
        let pool: GuestPool = "10.77.0.0/16".parse().unwrap();
        assert_eq!(pool.capacity(), 16_384);
        assert!(pool.contains("10.77.255.255".parse().unwrap()));
        assert!(!pool.contains("10.78.0.0".parse().unwrap()));
        assert_eq!(
            "10.77.0.0/31".parse::<GuestPool>(),
            Err(PoolError::Prefix(31))
        );
        assert_eq!("10.0.0.0/7".parse::<GuestPool>(), Err(PoolError::Prefix(7)));
        for text in ["", "10.77.0.0", "10.77.0.0/x", "fd00::/64"] {
            assert!(
                matches!(text.parse::<GuestPool>(), Err(PoolError::Malformed(_))),
                "{text}"
            );
        }
        let error = "10.77.3.1/16".parse::<GuestPool>().unwrap_err().to_string();
        assert!(error.contains("write 10.77.0.0/16"), "{error}");
    }

    #[test]
    fn guests_share_no_address_and_stay_in_the_pool() {
        let pool: GuestPool = "192.168.4.0/28".parse().unwrap();
        let mut slots = Slots::new(pool);
        let mut seen = BTreeSet::new();
        for _ in 0..4 {
            let (_, addresses) = slots.take().unwrap();
            assert!(pool.contains(addresses.gateway) && pool.contains(addresses.guest));
            assert!(seen.insert(addresses.gateway) && seen.insert(addresses.guest));
            assert!(addresses.mac.is_unicast());
        }
        assert_eq!(slots.take(), None);
    }

    #[test]
    fn a_place_given_back_is_the_last_to_be_taken_again() {
        let mut slots = Slots::new("192.168.4.0/28".parse().unwrap());
        let (first, addresses) = slots.take().unwrap();
        slots.give_back(first);
        for _ in 0..3 {
            assert_ne!(slots.take().unwrap().0, first);
        }
        assert_eq!(slots.take(), Some((first, addresses)));
    }
}
