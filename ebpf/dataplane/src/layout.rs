//! How the maps of a guard are to be read, told by two numbers that change with any of it: whoever finds a
//! guard of another build knows by them what it may share with it.
//!
//! They are made of samples (a policy, a table, a flow, as this build writes them) and of the words that
//! numbers stand for, so that nobody needs to remember to raise them. What no sample shows is in
//! [`REVISION`].

use std::mem::offset_of;
use std::sync::OnceLock;

use omerta_verdict::{
    Address, Bucket, COUNTER_ROWS, DIRECTION_COUNTERS, Direction, Endpoint, EventRecord, FLOWS,
    Flow, Live, Mac, Mode, OWN_ANSWERS_COUNTER, Outcome, Policy, Protocol, RX_COUNTER, Rate,
    Reason, SENT_FLOWS, SentFlow, Slot, State, Table,
};

pub use crate::note_text::Layout;
use crate::object::bytes_of;
use crate::store::Value;

/// To be raised with each change to the meaning of LIVE's words, FLOW_PLACES or the row of lost events.
const REVISION: u64 = 2;

impl Layout {
    /// That of the programs of this build.
    pub fn of_this_build() -> Self {
        static LAYOUT: OnceLock<Layout> = OnceLock::new();
        *LAYOUT.get_or_init(|| Self {
            policy: policy(),
            accounts: accounts(),
        })
    }
}

/// A number that is another for other bytes (FNV-1a, of 64 bits): these are not chosen by anybody.
#[derive(Debug)]
pub struct Digest(u64);

impl Digest {
    pub const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub const fn value(&self) -> u64 {
        self.0
    }

    fn numbers(&mut self, numbers: impl IntoIterator<Item = usize>) {
        for number in numbers {
            self.add(&(number as u64).to_ne_bytes());
        }
    }
}

fn policy() -> u64 {
    let mut digest = Digest::new();
    digest.add(&REVISION.to_ne_bytes());
    digest.numbers([
        size_of::<State>(),
        offset_of!(State, generation),
        offset_of!(State, lease_until_ns),
        offset_of!(State, tick),
        offset_of!(State, tick_ns),
        offset_of!(State, token),
        offset_of!(State, slots),
        offset_of!(Slot, buckets),
        size_of::<Bucket>(),
        size_of::<Live>(),
        offset_of!(Live, meters),
        offset_of!(Live, told),
        offset_of!(Live, flow_hand),
        offset_of!(Live, sent),
        SENT_FLOWS,
        size_of::<SentFlow>(),
        offset_of!(SentFlow, tick),
        offset_of!(SentFlow, generation),
        offset_of!(SentFlow, check),
        FLOWS as usize,
    ]);
    for mode in Mode::ALL {
        digest.add(mode.word().as_bytes());
        digest.add(&(mode as u32).to_ne_bytes());
    }
    let endpoints = [Protocol::Udp, Protocol::Tcp, Protocol::Icmp].map(|protocol| Endpoint {
        protocol,
        address: Address::from_words(0x2001_0db8_0000_0001, protocol as u64),
        port: 258,
    });
    let mut buckets = [Bucket::EMPTY; 2];
    if let Some(mut table) = Table::new(&mut buckets, 0x0123_4567_89ab_cdef) {
        for endpoint in &endpoints {
            digest.add(&[u8::from(table.insert(endpoint))]);
        }
    }
    for bucket in &buckets {
        digest.add(bytes_of(&Value(*bucket)));
    }
    // Words, and not bytes: between the fields of a slot there may be some that nobody has written.
    digest.add(format!("{:?}", sample()).as_bytes());
    digest.numbers([
        size_of::<Policy>(),
        offset_of!(Policy, epoch),
        offset_of!(Policy, table_seed),
        offset_of!(Policy, table_mask),
        offset_of!(Policy, mode),
        offset_of!(Policy, sample_every),
        offset_of!(Policy, addresses),
        offset_of!(Policy, gateways),
        offset_of!(Policy, rates),
        offset_of!(Policy, limits),
        offset_of!(Policy, mac),
        offset_of!(Policy, gateway_mac),
    ]);
    let flow = Flow::new(
        Protocol::Udp,
        (Address::from_words(1, 2), 3),
        (Address::from_words(4, 5), 6),
    );
    digest.add(bytes_of(&Value(flow)));
    let (place, check) = SentFlow::place_and_check(&flow, 7, 8);
    digest.numbers([place, check as usize]);
    for word in flow.words() {
        digest.add(&word.to_ne_bytes());
    }
    digest.value()
}

/// A policy whose every field differs from the others.
fn sample() -> Policy {
    let mut policy = Policy {
        epoch: 1,
        table_seed: 2,
        table_mask: 3,
        mode: 4,
        sample_every: 5,
        limits: [[6, 7], [8, 9]],
        mac: Mac([2, 1, 2, 3, 4, 5]),
        gateway_mac: Mac([2, 5, 4, 3, 2, 1]),
        ..Policy::EMPTY
    };
    for (number, address) in policy.addresses.iter_mut().enumerate() {
        *address = Address::from_words(10, number as u64);
    }
    for (number, address) in policy.gateways.iter_mut().enumerate() {
        *address = Address::from_words(11, number as u64);
    }
    for (number, rate) in policy.rates.iter_mut().enumerate() {
        *rate = Rate::per_second(1000 + number as u64, 100);
    }
    policy
}

fn accounts() -> u64 {
    let mut digest = Digest::new();
    digest.add(&REVISION.to_ne_bytes());
    digest.numbers([
        DIRECTION_COUNTERS,
        COUNTER_ROWS,
        RX_COUNTER,
        OWN_ANSWERS_COUNTER,
        Outcome::Allowed.index(),
        Outcome::Answered.index(),
        size_of::<EventRecord>(),
        offset_of!(EventRecord, at_ns),
        offset_of!(EventRecord, ifindex),
        offset_of!(EventRecord, length),
        offset_of!(EventRecord, direction),
        offset_of!(EventRecord, reason),
        offset_of!(EventRecord, captured),
        offset_of!(EventRecord, frame),
    ]);
    for direction in Direction::ALL {
        digest.add(direction.word().as_bytes());
        digest.numbers([direction as usize]);
    }
    for reason in Reason::ALL {
        digest.add(reason.word().as_bytes());
        digest.numbers([Outcome::Dropped(*reason).index()]);
    }
    digest.value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_the_same_whenever_it_is_made_and_read_back() {
        let layout = Layout::of_this_build();
        assert_eq!((policy(), accounts()), (layout.policy, layout.accounts));
        assert_ne!(layout.policy, layout.accounts);
        assert_eq!(layout.to_string().parse(), Ok(layout));
        for bad in ["", "1", "1-", "x-1", "1-2-3"] {
            assert!(bad.parse::<Layout>().is_err(), "{bad}");
        }
    }

    #[test]
    fn any_byte_makes_another_digest() {
        let of = |bytes: &[u8]| {
            let mut digest = Digest::new();
            digest.add(bytes);
            digest.value()
        };
        // The published test vectors of FNV-1a.
        assert_eq!(of(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(of(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
