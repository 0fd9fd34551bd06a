//! The allowlist: a hash table with open addressing over cache lines.
//!
//! A lookup reads one 64-byte bucket in the common case and at most [`MAX_PROBES`]. The kernel
//! only reads; userspace fills a bank that no program reads and then switches (see the dataplane).

use crate::{Address, Endpoint, Guard, Policy, Protocol};

/// Rules in one bucket.
pub const BUCKET_RULES: usize = 3;
/// Buckets that one lookup may read. A rule that finds no place within them is not inserted.
pub const MAX_PROBES: u32 = 4;

/// One cache line of rules. All zero is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Bucket {
    high: [u64; BUCKET_RULES],
    low: [u64; BUCKET_RULES],
    /// Protocol << 16 | port; 0 marks an empty place (no protocol is 0).
    service: [u32; BUCKET_RULES],
    /// Not 0 where a rule of this bucket stands in a later one.
    overflowed: u32,
}

impl Bucket {
    /// No rules.
    pub const EMPTY: Self = Self {
        high: [0; BUCKET_RULES],
        low: [0; BUCKET_RULES],
        service: [0; BUCKET_RULES],
        overflowed: 0,
    };

    #[inline(always)]
    fn holds(&self, address: Address, service: u32) -> bool {
        let (high, low) = address.words();
        let mut place = 0;
        while place < BUCKET_RULES {
            if self.service[place] == service && self.low[place] == low && self.high[place] == high
            {
                return true;
            }
            place += 1;
        }
        false
    }
}

#[inline(always)]
const fn service(protocol: Protocol, port: u16) -> u32 {
    (protocol as u32) << 16 | port as u32
}

/// Finalizer-style mixing; the seed is random per commit, so nobody outside can choose collisions.
#[inline(always)]
const fn hash(seed: u64, address: Address, service: u32) -> u32 {
    let (high, low) = address.words();
    let mut x = (low ^ seed).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 32;
    x = (x ^ high).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^= x >> 29;
    x = (x ^ service as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (x >> 32) as u32
}

/// Whether the allowlist holds (protocol, address, port).
#[inline(always)]
pub(crate) fn lookup<G: Guard + ?Sized>(
    guard: &G,
    policy: &Policy,
    protocol: Protocol,
    address: Address,
    port: u16,
) -> bool {
    table_holds(guard, policy, address, service(protocol, port))
}

/// Whether the allowlist holds (protocol << 16 | port, address).
#[inline(always)]
pub fn table_holds<G: Guard + ?Sized>(
    guard: &G,
    policy: &Policy,
    address: Address,
    service: u32,
) -> bool {
    let home = hash(policy.table_seed, address, service);
    let mut probe = 0;
    while probe < MAX_PROBES {
        let Some(bucket) = guard.bucket(home.wrapping_add(probe) & policy.table_mask) else {
            return false;
        };
        if bucket.holds(address, service) {
            return true;
        }
        if bucket.overflowed == 0 {
            return false;
        }
        probe += 1;
    }
    false
}

/// Fills a slice of buckets, whose number must be a power of two.
pub struct Table<'a> {
    buckets: &'a mut [Bucket],
    seed: u64,
}

impl<'a> Table<'a> {
    /// An empty table over `buckets`, or `None` unless their number is a power of two.
    pub fn new(buckets: &'a mut [Bucket], seed: u64) -> Option<Self> {
        if !buckets.len().is_power_of_two() || u32::try_from(buckets.len()).is_err() {
            return None;
        }
        buckets.fill(Bucket::EMPTY);
        Some(Self { buckets, seed })
    }

    /// Adds `endpoint`; false where no place is left for it (take another seed or more buckets).
    #[must_use]
    pub fn insert(&mut self, endpoint: &Endpoint) -> bool {
        let service = service(endpoint.protocol, endpoint.port);
        let home = hash(self.seed, endpoint.address, service) as usize;
        let mask = self.buckets.len() - 1;
        for probe in 0..MAX_PROBES as usize {
            let bucket = &mut self.buckets[home.wrapping_add(probe) & mask];
            if bucket.holds(endpoint.address, service) {
                return true;
            }
            if let Some(place) = bucket.service.iter().position(|taken| *taken == 0) {
                (bucket.high[place], bucket.low[place]) = endpoint.address.words();
                bucket.service[place] = service;
                return true;
            }
            bucket.overflowed = 1;
        }
        false
    }

    /// The endpoints that `buckets` holds, in no order.
    pub fn endpoints(buckets: &[Bucket]) -> impl Iterator<Item = Endpoint> + '_ {
        buckets.iter().flat_map(|bucket| {
            (0..BUCKET_RULES).filter_map(move |place| {
                let protocol = match bucket.service[place] >> 16 {
                    1 => Protocol::Icmp,
                    6 => Protocol::Tcp,
                    17 => Protocol::Udp,
                    _ => return None,
                };
                Some(Endpoint {
                    protocol,
                    address: Address::from_words(bucket.high[place], bucket.low[place]),
                    port: bucket.service[place] as u16,
                })
            })
        })
    }
}
