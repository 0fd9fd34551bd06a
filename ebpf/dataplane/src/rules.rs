//! Builds the allowlist's table.

use omerta_verdict::{Bucket, Endpoint, Policy, Table};

use crate::GuardError;

/// Buckets of one bank; a power of two.
pub const BUCKETS: usize = 512;
/// Endpoints that one guard's allowlist holds: half of the table's places, so that a seed under
/// which every endpoint finds its place within the probe limit is found at once.
pub const MAX_ENDPOINTS: usize = 768;
/// Seeds that are tried before the table counts as full.
const SEEDS: u32 = 64;

/// One bank, ready to be written.
pub struct Bank {
    pub seed: u64,
    pub buckets: Vec<Bucket>,
}

/// A bank that holds `endpoints`, or `None` where they do not fit. `next_seed` gives random words.
pub fn build(endpoints: &[Endpoint], mut next_seed: impl FnMut() -> u64) -> Option<Bank> {
    if endpoints.len() > MAX_ENDPOINTS {
        return None;
    }
    let mut buckets = vec![Bucket::EMPTY; BUCKETS];
    for _ in 0..SEEDS {
        let seed = next_seed();
        let mut table = Table::new(&mut buckets, seed)?;
        if endpoints.iter().all(|endpoint| table.insert(endpoint)) {
            return Some(Bank { seed, buckets });
        }
    }
    None
}

/// Fails for an endpoint of a family in which the guest of `policy` has no address to speak from.
pub fn refuse_unreachable<'a>(
    interface: &str,
    policy: &Policy,
    endpoints: impl IntoIterator<Item = &'a Endpoint>,
) -> Result<(), GuardError> {
    let owns = |v4: bool| {
        let mut owned = policy.addresses.iter().filter(|a| !a.is_unspecified());
        owned.any(|address| address.is_v4() == v4)
    };
    let (owns_v4, owns_v6) = (owns(true), owns(false));
    for endpoint in endpoints {
        let v4 = endpoint.address.is_v4();
        if !(if v4 { owns_v4 } else { owns_v6 }) {
            return Err(GuardError::NoAddressOfFamily {
                interface: interface.to_owned(),
                endpoint: endpoint.to_string(),
                family: if v4 { "IPv4" } else { "IPv6" },
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use omerta_verdict::Protocol;
    use std::collections::BTreeSet;
    use std::net::{IpAddr, Ipv4Addr};

    fn endpoints(count: usize) -> Vec<Endpoint> {
        (0..count as u32)
            .map(|index| Endpoint {
                protocol: Protocol::Udp,
                address: IpAddr::from(Ipv4Addr::from(0xc000_0200 + index / 7)).into(),
                port: 1 + (index % 7) as u16,
            })
            .collect()
    }

    #[test]
    fn a_full_allowlist_is_built_whatever_the_first_seed() {
        let wanted = endpoints(MAX_ENDPOINTS);
        for first in 0..64_u64 {
            let mut seed = first.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let bank = build(&wanted, || {
                seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
                seed
            })
            .unwrap();
            let held: BTreeSet<_> = Table::endpoints(&bank.buckets).collect();
            assert_eq!(held, wanted.iter().copied().collect());
        }
    }

    #[test]
    fn one_endpoint_too_many_is_refused() {
        assert!(build(&endpoints(MAX_ENDPOINTS + 1), || 1).is_none());
    }
}
