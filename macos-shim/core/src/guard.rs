//! A guard in plain memory, made from C structs.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use omerta_verdict::{
    Address, Bucket, Endpoint, MAX_ADDRESSES, MAX_GATEWAYS, Mac, MemoryGuard, Mode, Policy,
    Protocol, Table,
};

/// The allowlist's size at which building it is given up.
const MOST_BUCKETS: usize = 1 << 22;

/// `struct omerta_address`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CAddress {
    /// 4 or 6.
    pub family: u8,
    /// In network order; family 4 uses the first four.
    pub octets: [u8; 16],
}

/// `struct omerta_endpoint`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CEndpoint {
    /// The peer's address.
    pub address: CAddress,
    /// The IP protocol number.
    pub protocol: u8,
    /// In host order; 0 for ICMP.
    pub port: u16,
}

/// `struct omerta_policy`.
#[repr(C)]
pub struct CPolicy {
    /// The guest's MAC.
    pub mac: [u8; 6],
    /// Where the guest's IP frames must go.
    pub gateway_mac: [u8; 6],
    /// The guest's addresses.
    pub addresses: *const CAddress,
    /// Their number.
    pub address_count: usize,
    /// The gateways, up to one a family.
    pub gateways: *const CAddress,
    /// Their number.
    pub gateway_count: usize,
    /// The endpoints that the guest may talk with.
    pub allow: *const CEndpoint,
    /// Their number.
    pub allow_count: usize,
}

/// `struct omerta_guard`: a policy and its allowlist.
pub struct OwnedGuard {
    policy: Policy,
    buckets: Vec<Bucket>,
}

impl OwnedGuard {
    /// The guard of `policy`, or `None` where it is not valid.
    ///
    /// # Safety
    /// Each of the policy's arrays holds as many elements as it says, or none.
    pub(crate) unsafe fn new(policy: &CPolicy) -> Option<Self> {
        // SAFETY: the caller's promise for each of the three.
        let (addresses, gateways, allow) = unsafe {
            (
                slice(policy.addresses, policy.address_count)?,
                slice(policy.gateways, policy.gateway_count)?,
                slice(policy.allow, policy.allow_count)?,
            )
        };
        let (mac, gateway_mac) = (Mac(policy.mac), Mac(policy.gateway_mac));
        let sizes_fit =
            (1..=MAX_ADDRESSES).contains(&addresses.len()) && gateways.len() <= MAX_GATEWAYS;
        if !sizes_fit || !mac.is_unicast() || !gateway_mac.is_unicast() || mac == gateway_mac {
            return None;
        }
        let mut guard = Self {
            policy: Policy {
                epoch: 1,
                mode: Mode::Filtered as u32,
                mac,
                gateway_mac,
                ..Policy::EMPTY
            },
            buckets: Vec::new(),
        };
        for (place, given) in guard.policy.addresses.iter_mut().zip(addresses) {
            *place = unicast(given)?;
        }
        for given in gateways {
            let place = &mut guard.policy.gateways[usize::from(given.family == 6)];
            if !place.is_unspecified() {
                return None;
            }
            *place = unicast(given)?;
        }
        let endpoints: Vec<_> = allow.iter().map(endpoint).collect::<Option<_>>()?;
        guard.fill(&endpoints)?;
        Some(guard)
    }

    /// The guard as the verdict takes it. Filtered mode asks for neither flows nor chance.
    pub(crate) fn as_guard(&self) -> MemoryGuard<'_> {
        MemoryGuard::new(&self.policy, &self.buckets)
    }

    /// Builds the allowlist at half load, with a fresh seed and twice the room until all fit.
    fn fill(&mut self, endpoints: &[Endpoint]) -> Option<()> {
        let mut size = endpoints.len().max(1).checked_next_power_of_two()?;
        while size <= MOST_BUCKETS {
            self.buckets = vec![Bucket::EMPTY; size];
            self.policy.table_seed = RandomState::new().hash_one(size);
            self.policy.table_mask = u32::try_from(size - 1).ok()?;
            let mut table = Table::new(&mut self.buckets, self.policy.table_seed)?;
            if endpoints.iter().all(|endpoint| table.insert(endpoint)) {
                return Some(());
            }
            size *= 2;
        }
        None
    }
}

/// # Safety
/// `first` points to `count` elements, unless it is null or `count` is 0.
unsafe fn slice<'a, T>(first: *const T, count: usize) -> Option<&'a [T]> {
    match (count, first.is_null()) {
        (0, _) => Some(&[]),
        (_, true) => None,
        // SAFETY: not null, and the caller's promise.
        (_, false) => Some(unsafe { std::slice::from_raw_parts(first, count) }),
    }
}

fn unicast(given: &CAddress) -> Option<Address> {
    let octets = given.octets;
    let address = match given.family {
        4 => IpAddr::from(Ipv4Addr::from([octets[0], octets[1], octets[2], octets[3]])),
        6 => IpAddr::from(Ipv6Addr::from(octets)),
        _ => return None,
    };
    // Held as IPv4 inside: as IPv6, such an address is never accepted from the wire.
    if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
        return None;
    }
    Some(Address::from(address)).filter(|address| address.is_unicast())
}

fn endpoint(given: &CEndpoint) -> Option<Endpoint> {
    let protocol = match given.protocol {
        1 => Protocol::Icmp,
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        _ => return None,
    };
    if (given.port == 0) != (protocol == Protocol::Icmp) {
        return None;
    }
    Some(Endpoint {
        protocol,
        address: unicast(&given.address).filter(|address| address.is_possible_peer())?,
        port: given.port,
    })
}
