//! The buckets of an allowlist, as userspace fills and asks them: millions of rules in tens of
//! milliseconds, straight in the memory that programs read next.
//!
//! Layout, hash and order of search are the verdict's (its `table.rs`, which the programs look up by);
//! tests hold the two together. Here are besides: room made by moving rules, so that a table may have as
//! many buckets as rules; rules counted; and several cache lines asked for at once.

use std::{array, ptr, slice};

use omerta_verdict::{BUCKET_RULES, Bucket, Endpoint, MAX_PROBES};

/// How far from its place a rule's room may be found; moving other rules brings it near.
const REACH: usize = 32;
/// Rules whose buckets are asked for before those that were asked for are used, so that memory is not
/// waited for by each.
const TOGETHER: usize = 16;
const PROBES: usize = MAX_PROBES as usize;

/// [`Bucket`], field by field.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line {
    high: [u64; BUCKET_RULES],
    low: [u64; BUCKET_RULES],
    service: [u32; BUCKET_RULES],
    overflowed: u32,
}

const _: () =
    assert!(size_of::<Line>() == size_of::<Bucket>() && align_of::<Line>() == align_of::<Bucket>());

#[derive(Clone, Copy, PartialEq, Eq)]
struct Rule {
    high: u64,
    low: u64,
    service: u32,
}

impl Rule {
    fn of(endpoint: &Endpoint) -> Self {
        let (high, low) = endpoint.address.words();
        Self {
            high,
            low,
            service: (endpoint.protocol as u32) << 16 | u32::from(endpoint.port),
        }
    }

    fn home(&self, seed: u64) -> usize {
        let mut x = (self.low ^ seed).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x ^= x >> 32;
        x = (x ^ self.high).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        x ^= x >> 29;
        x = (x ^ u64::from(self.service)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        (x >> 32) as usize
    }
}

impl Line {
    fn rule(&self, place: usize) -> Rule {
        Rule {
            high: self.high[place],
            low: self.low[place],
            service: self.service[place],
        }
    }

    fn put(&mut self, place: usize, rule: Rule) {
        self.high[place] = rule.high;
        self.low[place] = rule.low;
        self.service[place] = rule.service;
    }

    /// The first place that is free; [`BUCKET_RULES`] where none is. Places are taken in order, so it is
    /// their number: no branch that cannot be foreseen.
    fn free(&self) -> usize {
        self.service
            .iter()
            .map(|&taken| usize::from(taken != 0))
            .sum()
    }

    fn place_of(&self, rule: Rule) -> Option<usize> {
        (0..BUCKET_RULES).find(|place| self.rule(*place) == rule)
    }
}

/// A table being filled. Its buckets are all empty at first.
pub struct Filling<'a> {
    lines: &'a mut [Line],
    seed: u64,
    held: usize,
}

impl<'a> Filling<'a> {
    /// `buckets`, whose number is a power of two and more than [`REACH`], are empty.
    pub fn new(buckets: &'a mut [Bucket], seed: u64) -> Self {
        let (start, count) = (buckets.as_mut_ptr().cast(), buckets.len());
        debug_assert!(count.is_power_of_two() && count > REACH);
        // SAFETY: `Line` is a `Bucket` in size, alignment and fields, of which every bit pattern is
        // valid; the borrow is the same.
        let lines = unsafe { slice::from_raw_parts_mut(start, count) };
        Self {
            lines,
            seed,
            held: 0,
        }
    }

    /// Adds `endpoints`. Returns how many the table holds, each once; `None` where one found no place:
    /// the table is then of no use.
    pub fn hold(mut self, endpoints: impl Iterator<Item = Endpoint>) -> Option<usize> {
        let mut rules = endpoints.map(|endpoint| Rule::of(&endpoint));
        let mut asked = self.ask(&mut rules);
        loop {
            let next = self.ask(&mut rules);
            for rule in asked {
                match rule {
                    Some((rule, home)) if self.insert(rule, home) => {}
                    Some(_) => return None,
                    None => return Some(self.held),
                }
            }
            asked = next;
        }
    }

    /// The next rules and where they belong, whose buckets are on their way to the caches.
    fn ask(&self, rules: &mut impl Iterator<Item = Rule>) -> [Option<(Rule, usize)>; TOGETHER] {
        array::from_fn(|_| {
            let rule = rules.next()?;
            let home = rule.home(self.seed);
            fetch(&self.lines[self.at(home)]);
            Some((rule, home))
        })
    }

    fn at(&self, number: usize) -> usize {
        number & (self.lines.len() - 1)
    }

    fn insert(&mut self, rule: Rule, home: usize) -> bool {
        for probe in 0..PROBES {
            let at = self.at(home.wrapping_add(probe));
            let line = &mut self.lines[at];
            if line.place_of(rule).is_some() {
                return true;
            }
            let free = line.free();
            if free < BUCKET_RULES {
                line.put(free, rule);
                self.held += 1;
                return true;
            }
            line.overflowed = 1;
        }
        self.make_room(home, rule)
    }

    /// Puts `rule` near its `home`, all of whose buckets are full, by moving others towards the nearest
    /// room (hopscotch hashing). A bucket that was full stays full.
    fn make_room(&mut self, home: usize, rule: Rule) -> bool {
        // Once round, so that nothing before it is below zero.
        let home = self.at(home) + self.lines.len();
        let has_room = |at: &usize| self.lines[self.at(*at)].free() < BUCKET_RULES;
        let Some(mut room) = (home + PROBES..home + REACH).find(has_room) else {
            return false;
        };
        while room - home >= PROBES {
            // What may stand in `room` and stands nearest to `home`.
            let nearer = (room - (PROBES - 1)..room).find_map(|from| {
                let line = self.lines[self.at(from)];
                (0..BUCKET_RULES).find_map(|place| {
                    let moved = line.rule(place);
                    let origin = from - self.at(from.wrapping_sub(moved.home(self.seed)));
                    (room - origin < PROBES).then_some((from, place, moved, origin))
                })
            });
            let Some((from, place, moved, origin)) = nearer else {
                return false;
            };
            self.put_last(origin, room, moved);
            // The free place is the last.
            let at = self.at(from);
            let last = self.lines[at].rule(BUCKET_RULES - 1);
            self.lines[at].put(place, last);
            self.lines[at].service[BUCKET_RULES - 1] = 0;
            room = from;
        }
        self.put_last(home, room, rule);
        self.held += 1;
        true
    }

    /// Puts `rule` into the bucket `room`; the buckets from its `home` on are full.
    fn put_last(&mut self, home: usize, room: usize, rule: Rule) {
        for before in home..room {
            let at = self.at(before);
            self.lines[at].overflowed = 1;
        }
        let at = self.at(room);
        let free = self.lines[at].free();
        self.lines[at].put(free, rule);
    }
}

/// The number of endpoints in `buckets`.
pub fn count(buckets: &[Bucket]) -> usize {
    lines(buckets).iter().map(Line::free).sum()
}

/// Whether `buckets`, filled with `seed`, hold each of `endpoints` and no other.
pub fn hold_exactly(
    buckets: &[Bucket],
    seed: u64,
    endpoints: impl Iterator<Item = Endpoint>,
) -> bool {
    let lines = lines(buckets);
    let mut seen = vec![false; lines.len() * BUCKET_RULES];
    let mut found = 0;
    for endpoint in endpoints {
        match position(lines, seed, Rule::of(&endpoint)) {
            Some(at) if seen[at] => {}
            Some(at) => {
                seen[at] = true;
                found += 1;
            }
            None => return false,
        }
    }
    found == count(buckets)
}

/// Whether `buckets`, filled with `seed`, hold `endpoint`.
pub fn hold(buckets: &[Bucket], seed: u64, endpoint: &Endpoint) -> bool {
    position(lines(buckets), seed, Rule::of(endpoint)).is_some()
}

fn position(lines: &[Line], seed: u64, rule: Rule) -> Option<usize> {
    let home = rule.home(seed);
    for probe in 0..PROBES {
        let at = home.wrapping_add(probe) & (lines.len() - 1);
        if let Some(place) = lines[at].place_of(rule) {
            return Some(at * BUCKET_RULES + place);
        }
        if lines[at].overflowed == 0 {
            return None;
        }
    }
    None
}

/// Lets the processor fetch a line that is needed soon, where it can be told so.
#[inline(always)]
fn fetch(line: &Line) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: it reads nothing, and has no effect but on caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr::from_ref(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

fn lines(buckets: &[Bucket]) -> &[Line] {
    // SAFETY: as in `Filling::new`.
    unsafe { slice::from_raw_parts(buckets.as_ptr().cast(), buckets.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;
    use omerta_verdict::{Guard, MemoryGuard, Policy, Protocol, Table};
    use std::collections::BTreeSet;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

    fn endpoints(range: std::ops::Range<u32>) -> Vec<Endpoint> {
        range
            .map(|index| {
                let address: IpAddr = match index % 3 {
                    0 => Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(index) << 40).into(),
                    _ => Ipv4Addr::from(0xc000_0200 + index / 7).into(),
                };
                Endpoint {
                    protocol: [Protocol::Udp, Protocol::Tcp][index as usize % 2],
                    address: address.into(),
                    port: 1 + (index % 7) as u16,
                }
            })
            .collect()
    }

    fn filled(size: usize, seed: u64, endpoints: &[Endpoint]) -> Option<(Vec<Bucket>, usize)> {
        let mut buckets = vec![Bucket::EMPTY; size];
        let held = Filling::new(&mut buckets, seed).hold(endpoints.iter().copied())?;
        Some((buckets, held))
    }

    /// What the programs find.
    fn finds(buckets: &[Bucket], seed: u64, endpoint: &Endpoint) -> bool {
        let policy = Policy {
            table_seed: seed,
            table_mask: buckets.len() as u32 - 1,
            ..Policy::EMPTY
        };
        let Endpoint {
            protocol,
            address,
            port,
        } = *endpoint;
        MemoryGuard::new(&policy, buckets).lists(&policy, protocol, address, port)
    }

    #[test]
    fn programs_find_every_endpoint_of_a_list_of_any_size_and_no_other() {
        for (length, seeds) in [
            (0, 1),
            (1, 1),
            (96, 32),
            (97, 8),
            (1024, 8),
            (6000, 8),
            (65_536, 2),
        ] {
            let (listed, others) = (endpoints(0..length), endpoints(length..length + 1000));
            let listed: BTreeSet<_> = listed.into_iter().collect();
            let in_order: Vec<_> = listed.iter().copied().collect();
            let size = rules::sizes(listed.len()).next().unwrap();
            let mut built = 0;
            for seed in (1..=seeds).map(|number| SEED.wrapping_mul(number)) {
                let Some((buckets, held)) = filled(size, seed, &in_order) else {
                    continue;
                };
                built += 1;
                assert_eq!((held, count(&buckets)), (listed.len(), listed.len()));
                assert_eq!(Table::endpoints(&buckets).collect::<BTreeSet<_>>(), listed);
                for endpoint in &listed {
                    assert!(finds(&buckets, seed, endpoint), "{endpoint} of {length}");
                    assert!(hold(&buckets, seed, endpoint));
                }
                for endpoint in others.iter().filter(|e| !listed.contains(e)) {
                    assert!(!finds(&buckets, seed, endpoint), "{endpoint} of {length}");
                    assert!(!hold(&buckets, seed, endpoint));
                }
            }
            assert!(built * 2 >= seeds, "{built} of {seeds} seeds for {length}");
        }
    }

    #[test]
    fn where_no_rule_must_move_the_buckets_are_those_of_the_verdicts_own_table() {
        let listed = endpoints(0..1500);
        let mut theirs = vec![Bucket::EMPTY; 2048];
        let mut table = Table::new(&mut theirs, SEED).unwrap();
        assert!(listed.iter().all(|endpoint| table.insert(endpoint)));
        assert!(filled(2048, SEED, &listed).unwrap().0 == theirs);
    }

    #[test]
    fn rules_move_where_the_verdicts_own_table_has_no_room() {
        let (mut moved, listed) = (0, endpoints(0..2000));
        for seed in (1..=16).map(|number| SEED.wrapping_mul(number)) {
            let mut theirs = vec![Bucket::EMPTY; 1024];
            let mut table = Table::new(&mut theirs, seed).unwrap();
            let has_room = listed.iter().all(|endpoint| table.insert(endpoint));
            if let Some((buckets, _)) = filled(1024, seed, &listed) {
                moved += usize::from(!has_room);
                assert!(listed.iter().all(|e| finds(&buckets, seed, e)));
            }
        }
        assert!(moved > 0);
    }

    #[test]
    fn an_endpoint_named_twice_is_held_once() {
        let mut listed = endpoints(0..3000);
        let distinct = listed.iter().collect::<BTreeSet<_>>().len();
        listed.extend_from_within(..);
        assert_eq!(filled(4096, SEED, &listed).unwrap().1, distinct);
    }

    #[test]
    fn more_than_a_table_has_places_for_are_not_held() {
        assert!(filled(64, SEED, &endpoints(0..193)).is_none());
    }

    #[test]
    fn buckets_hold_exactly_what_they_were_filled_with() {
        let listed = endpoints(0..500);
        let (buckets, _) = filled(512, SEED, &listed).unwrap();
        let exactly = |list: &[Endpoint]| hold_exactly(&buckets, SEED, list.iter().copied());
        let turned: Vec<_> = listed.iter().rev().copied().collect();
        assert!(exactly(&listed) && exactly(&turned));
        assert!(exactly(&[&listed[..], &listed[..10]].concat()));
        assert!(!exactly(&listed[1..]));
        assert!(!exactly(&[&listed[1..], &listed[1..2]].concat()));
        assert!(!exactly(&endpoints(0..501)));
        assert!(!exactly(&[]));
    }
}
