//! A guard in plain memory that remembers, as the kernel's maps do, what earlier frames did.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};

use omerta_verdict::{Bucket, FixedInputs, Flow, Guard, Meter, Policy, Rate};

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
    /// As METERS.
    pub meters: [Cell<u64>; Meter::COUNT],
    /// As FLOWS.
    pub flows: RefCell<Flows>,
}

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

    fn open_flow(&self, flow: &Flow) -> bool {
        self.flows.borrow_mut().insert(*flow, self.now());
        true
    }

    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        self.flows.borrow().get(flow).copied()
    }
}
