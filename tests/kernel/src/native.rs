//! A guard in plain memory that remembers, as the kernel's maps do, what earlier frames did.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};

use omerta_verdict::{Bucket, FixedInputs, Flow, Guard, Meter, Policy, Rate, SENT_FLOWS, SentFlow};

/// Flows, and when each was last seen. Their order follows from what was done, so that a seed tells
/// all of a run.
pub type Flows = HashMap<Flow, u64, BuildHasherDefault<DefaultHasher>>;

/// Policy, allowlist and state of one guard.
#[derive(Debug)]
pub struct NativeGuard {
    policy: Policy,
    buckets: Vec<Bucket>,
    inputs: FixedInputs,
    /// As LEASE.
    pub lease: u64,
    /// As in [`omerta_verdict::Live`].
    pub meters: [Cell<u64>; Meter::COUNT],
    /// As FLOWS.
    pub flows: RefCell<Flows>,
    /// As SENT.
    pub sent: RefCell<Vec<SentFlow>>,
    /// As FLOW_PLACES.
    places: RefCell<Vec<Option<Flow>>>,
    /// As FLOW_HAND.
    hand: Cell<usize>,
}

/// Of a guard whose policy was committed once.
const GENERATION: u64 = 1;
/// Flows that one guest may have open.
const PLACES: usize = 4096;
/// Places that one new flow looks at.
const LOOKS: usize = 4;

impl NativeGuard {
    /// A guard that has seen no frame yet.
    pub fn new(policy: Policy, buckets: Vec<Bucket>, inputs: FixedInputs) -> Self {
        Self {
            policy,
            buckets,
            inputs,
            lease: 0,
            meters: Default::default(),
            flows: RefCell::default(),
            sent: RefCell::new(vec![SentFlow::NONE; SENT_FLOWS]),
            places: RefCell::new(vec![None; PLACES]),
            hand: Cell::new(0),
        }
    }
}

impl Guard for NativeGuard {
    fn policy(&self) -> Option<&Policy> {
        Some(&self.policy)
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index as usize)
    }

    fn random(&self) -> u32 {
        self.inputs.random
    }

    fn now(&self) -> u64 {
        self.inputs.now_ns
    }

    fn lease_until(&self) -> u64 {
        self.lease
    }

    fn take(&self, meter: Meter, rate: Rate, units: u32) -> bool {
        if rate.is_unlimited() {
            return true;
        }
        let word = &self.meters[meter as usize];
        match rate.take(word.get(), self.now(), units) {
            Some(next) => {
                word.set(next);
                true
            }
            None => false,
        }
    }

    fn put_back(&self, meter: Meter, rate: Rate, units: u32) {
        let word = &self.meters[meter as usize];
        word.set(word.get().wrapping_sub(rate.time_of(units)));
    }

    fn open_flow(&self, flow: &Flow) -> bool {
        let mut flows = self.flows.borrow_mut();
        if let Some(seen) = flows.get_mut(flow) {
            *seen = self.now();
            return true;
        }
        for _ in 0..LOOKS {
            let place = &mut self.places.borrow_mut()[self.hand.get() % PLACES];
            self.hand.set(self.hand.get() + 1);
            if let Some(old) = place {
                if flows
                    .get(old)
                    .is_some_and(|seen| old.is_live(*seen, self.now()))
                {
                    continue;
                }
                flows.remove(old);
            }
            *place = Some(*flow);
            flows.insert(*flow, self.now());
            return true;
        }
        false
    }

    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        self.flows.borrow().get(flow).copied()
    }

    fn note_sent(&self, flow: &Flow) {
        let (place, check) = SentFlow::place_and_check(flow, self.now(), GENERATION);
        // Also where that is another flow's: the guest has chosen both.
        if self.sent.borrow()[place].check == check {
            return;
        }
        self.sent.borrow_mut()[place] = SentFlow {
            flow: flow.words(),
            tick: self.now(),
            generation: GENERATION,
            check,
        };
    }

    fn last_sent(&self, flow: &Flow) -> Option<u64> {
        let (place, _) = SentFlow::place_and_check(flow, self.now(), GENERATION);
        let sent = self.sent.borrow()[place];
        (sent.generation == GENERATION && sent.flow == flow.words()).then_some(sent.tick)
    }
}
