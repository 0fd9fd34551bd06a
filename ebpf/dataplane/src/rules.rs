//! What an allowlist may hold, and how large its table is.

use omerta_verdict::{BUCKET_RULES, Endpoint, INLINE_BUCKETS, Policy};

use crate::GuardError;

/// Endpoints that one guard's allowlist holds.
pub const MAX_ENDPOINTS: usize = 1_000_000;
/// Seeds that are tried before the table is made larger.
pub const SEEDS: u32 = 8;
/// How often it is made twice as large before it counts as full.
const DOUBLINGS: u32 = 3;

/// How many buckets a table of `length` endpoints may have, to be tried in this order. No more than a
/// third of the places of a long list are taken, so a seed under which every endpoint finds its place is
/// nearly always the first; and few buckets flow over, so a lookup reads one.
pub fn sizes(length: usize) -> impl Iterator<Item = usize> {
    // What may stand beside the policy should: a seed more costs nothing there.
    let fewest = match (length * 2).div_ceil(BUCKET_RULES) {
        half_full if half_full <= INLINE_BUCKETS => INLINE_BUCKETS,
        _ => length.next_power_of_two(),
    };
    (0..=DOUBLINGS).map(move |times| fewest << times)
}

/// Fails for an endpoint of a family in which the guest of `policy` has no address to speak from, and
/// for the guest's own address: what claims to come from there comes from somebody else.
pub fn refuse_unreachable<'a>(
    interface: &str,
    policy: &Policy,
    endpoints: impl IntoIterator<Item = &'a Endpoint>,
) -> Result<(), GuardError> {
    let owned = policy.addresses.iter().filter(|a| !a.is_unspecified());
    let owned: Vec<_> = owned.copied().collect();
    let owns_v4 = owned.iter().any(|address| address.is_v4());
    let owns_v6 = owned.iter().any(|address| !address.is_v4());
    for endpoint in endpoints {
        if owned.contains(&endpoint.address) {
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

    #[test]
    fn a_table_has_as_many_buckets_as_endpoints_or_up_to_twice_as_many() {
        for length in [97, 128, 129, 6000, 65_536, 100_000, MAX_ENDPOINTS] {
            let first = sizes(length).next().unwrap();
            assert!((length..2 * length).contains(&first), "{length}: {first}");
            assert!(sizes(length).all(usize::is_power_of_two));
        }
        assert_eq!(sizes(96).next(), Some(INLINE_BUCKETS));
    }
}
