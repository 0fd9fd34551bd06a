//! Builds the allowlist's table.

use omerta_verdict::{BUCKET_RULES, Bucket, Endpoint, INLINE_BUCKETS, Policy, Table};

use crate::GuardError;
/// Endpoints that one guard's allowlist holds.
pub const MAX_ENDPOINTS: usize = 1_000_000;
/// Seeds that are tried before the table is made larger.
const SEEDS: u32 = 8;
/// How often it is made twice as large before it counts as full.
const DOUBLINGS: u32 = 3;

/// One table, ready to be written.
pub struct BuiltTable {
    pub seed: u64,
    pub buckets: Vec<Bucket>,
}

/// A table that holds `endpoints`, or `None` where they are too many. `next_seed` gives random
/// words. So few of the places are taken, little more than a quarter of a long list's, that a seed
/// under which every endpoint finds its place within the probe limit is found soon.
pub fn build(endpoints: &[Endpoint], mut next_seed: impl FnMut() -> u64) -> Option<BuiltTable> {
    if endpoints.len() > MAX_ENDPOINTS {
        return None;
    }
    // What may stand beside the policy should: a seed more costs nothing there.
    let fewest = match (endpoints.len() * 2).div_ceil(BUCKET_RULES) {
        half_full if half_full <= INLINE_BUCKETS => INLINE_BUCKETS,
        _ => (endpoints.len() * 5 / 4).next_power_of_two(),
    };
    for size in (0..=DOUBLINGS).map(|times| fewest << times) {
        let mut buckets = vec![Bucket::EMPTY; size];
        for _ in 0..SEEDS {
            let seed = next_seed();
            let mut table = Table::new(&mut buckets, seed)?;
            if endpoints.iter().all(|endpoint| table.insert(endpoint)) {
                return Some(BuiltTable { seed, buckets });
            }
        }
    }
    None
}

/// Fails for an endpoint of a family in which the guest of `policy` has no address to speak from, and
/// for the guest's own address: what claims to come from there comes from somebody else.
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
        if policy.owns(endpoint.address) {
            return Err(GuardError::OwnAddress {
                interface: interface.to_owned(),
                endpoint: endpoint.to_string(),
            });
        }
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
    fn an_allowlist_of_any_size_is_built_whatever_the_first_seed() {
        for (count, seeds) in [(0, 1), (1, 1), (768, 32), (6000, 8), (100_000, 1)] {
            let wanted = endpoints(count);
            for first in 0..seeds {
                let mut seed = u64::wrapping_mul(first, 0x9e37_79b9_7f4a_7c15);
                let bank = build(&wanted, || {
                    seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    seed
                })
                .unwrap();
                let held: BTreeSet<_> = Table::endpoints(&bank.buckets).collect();
                assert_eq!(held, wanted.iter().copied().collect());
                assert!(bank.buckets.len() <= (4 * count).max(INLINE_BUCKETS));
            }
        }
    }

    #[test]
    fn a_long_list_is_built_with_a_few_seeds() {
        for count in [10_000, 100_000, 300_000] {
            let wanted = endpoints(count);
            let (mut seed, mut seeds) = (0_u64, 0);
            let table = build(&wanted, || {
                seeds += 1;
                seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
                seed
            });
            assert!(
                table.is_some() && seeds < SEEDS / 2,
                "{count}: {seeds} seeds"
            );
        }
    }

    #[test]
    fn one_endpoint_too_many_is_refused() {
        assert!(build(&endpoints(MAX_ENDPOINTS + 1), || 1).is_none());
    }
}
