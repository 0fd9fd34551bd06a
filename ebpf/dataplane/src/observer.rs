//! A guard as a bystander sees it: what it makes of frames, judged natively by its own policy, with no
//! effect on it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::time::{ClockId, clock_gettime};
use omerta_verdict::{
    Bucket, Direction, MemoryGuard, Meter, Mode, Outcome, Policy, egress, is_answer_for_guest,
};

use crate::store::PolicyStore;
use crate::{Copy, Guard, GuardError};

/// What became of a frame, and how that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// What became of it.
    pub outcome: Outcome,
    /// How that is known.
    pub basis: Basis,
}

/// How a judgement is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The frame was seen behind the guard.
    Passed,
    /// The guard's own answer, by its mark and content.
    OwnAnswer,
    /// Judged by the same verdict outside of the kernel.
    Native {
        /// The policy's epoch.
        epoch: u64,
        /// What the kernel alone knows, and may have decided otherwise by.
        unknown: Option<&'static str>,
    },
}

/// Judges as the guard of one interface does, from outside.
pub struct Observer {
    store: PolicyStore,
    state_pin: PathBuf,
    /// Of the pin: another guard has another.
    state_inode: u64,
    generation: u64,
    policy: Policy,
    buckets: Vec<Bucket>,
}

impl Guard {
    /// Judges frames as this guard does, without touching it.
    ///
    /// # Errors
    /// Where the guard is not in force, or its maps cannot be read.
    pub fn observe(&self) -> Result<Observer, GuardError> {
        let _lock = self.pins.lock()?;
        self.judging()?;
        let state_pin = self.pins.path("STATE");
        let inode = fs::metadata(&state_pin).map_err(|source| GuardError::System {
            action: "look at the pins",
            interface: self.interface().to_owned(),
            source,
        })?;
        let store = PolicyStore::open(self.interface(), &self.pins)?;
        let (generation, policy, buckets) = store.settled()?;
        Ok(Observer {
            store,
            state_pin,
            state_inode: inode.ino(),
            generation,
            policy,
            buckets,
        })
    }
}

impl Observer {
    /// What became of `frame`, by the policy that is in force now.
    ///
    /// # Errors
    /// Where the policy has changed and cannot be read.
    pub fn judge(&mut self, frame: &Copy<'_>) -> Result<Judgement, GuardError> {
        if frame.direction == Direction::Ingress {
            return Ok(Judgement {
                outcome: Outcome::Allowed,
                basis: Basis::Passed,
            });
        }
        if self.store.generation() != self.generation {
            (self.generation, self.policy, self.buckets) = self.store.settled()?;
        }
        let mut guard = MemoryGuard::new(&self.policy, &self.buckets);
        guard.lease_until_ns = self.store.lease_until_ns();
        guard.now_ns = now_ns();
        if frame.is_marked && is_answer_for_guest(frame, &guard) {
            return Ok(Judgement {
                outcome: Outcome::Answered,
                basis: Basis::OwnAnswer,
            });
        }
        Ok(Judgement {
            outcome: egress(frame, &guard).outcome(),
            basis: Basis::Native {
                epoch: self.policy.epoch,
                unknown: self.unknown(),
            },
        })
    }

    /// Whether the guard that was opened still has its place.
    pub fn is_current(&self) -> bool {
        fs::metadata(&self.state_pin).is_ok_and(|found| found.ino() == self.state_inode)
    }

    /// By what the kernel alone may have decided otherwise about a frame of the guest's.
    fn unknown(&self) -> Option<&'static str> {
        let limited = [Meter::EgressPackets, Meter::EgressBytes]
            .into_iter()
            .any(|meter| !self.policy.rates[meter as usize].is_unlimited());
        match (Mode::from_number(self.policy.mode), limited) {
            (Some(Mode::Sampled), false) => Some("which frames are sampled"),
            (Some(Mode::Sampled), true) => Some("which frames are sampled, and the rates"),
            (Some(Mode::Conntrack), false) => Some("whether a flow had room"),
            (Some(Mode::Conntrack), true) => Some("whether a flow had room, and the rates"),
            (_, true) => Some("the rates"),
            (_, false) => None,
        }
    }
}

fn now_ns() -> u64 {
    // The clock cannot fail; were it to, the lease would be over.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(u64::MAX, |time| {
        std::time::Duration::from(time).as_nanos() as u64
    })
}
