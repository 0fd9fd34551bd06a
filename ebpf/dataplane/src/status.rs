//! What `omerta guard show -o json` prints.

use std::collections::BTreeMap;

use omerta_verdict::{Address, Direction, Mode, Policy};
use serde::{Serialize, Serializer};

use crate::counters::{CounterReader, Counters, DirectionCounters};
use crate::lease::{self, Lease};
use crate::pins::Pins;
use crate::store::PolicyStore;
use crate::upgrade::is_current;
use crate::{GuardError, Limits, RedirectStatus, Standing, redirect};

/// One direction's frames.
#[derive(Clone, Debug, Serialize)]
pub struct DirectionStatus {
    /// Everything that came: `allowed + answered + Σ dropped`.
    pub rx: u64,
    /// Passed on.
    pub allowed: u64,
    /// Answered by the guard itself.
    pub answered: u64,
    /// Dropped, by reason; every reason is there.
    pub dropped: BTreeMap<&'static str, u64>,
    /// The guard's own answers that entered again on their way out; not among `rx`.
    pub own_answers: u64,
}

impl From<&DirectionCounters> for DirectionStatus {
    fn from(counters: &DirectionCounters) -> Self {
        Self {
            rx: counters.rx().packets,
            allowed: counters.allowed.packets,
            answered: counters.answered.packets,
            dropped: counters
                .dropped
                .iter()
                .map(|(reason, count)| (reason.word(), count.packets))
                .collect(),
            own_answers: counters.own_answers.packets,
        }
    }
}

/// How much may travel in each direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DirectionLimits {
    /// From the guest.
    pub egress: Limits,
    /// To the guest.
    pub ingress: Limits,
}

impl DirectionLimits {
    pub(crate) fn of(policy: &Policy) -> Self {
        Self {
            egress: Limits::of(Direction::Egress, policy),
            ingress: Limits::of(Direction::Ingress, policy),
        }
    }

    pub(crate) fn put(self, policy: &mut Policy) {
        self.egress.put(Direction::Egress, policy);
        self.ingress.put(Direction::Ingress, policy);
    }
}

fn word_of<S: Serializer>(standing: &Standing, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(standing.word())
}

/// A guard's policy and counters.
#[derive(Clone, Debug, Serialize)]
pub struct GuardStatus {
    /// The interface's name.
    pub interface: String,
    /// The interface's index.
    pub ifindex: u32,
    /// The word of a [`Standing`].
    pub state: &'static str,
    /// The same.
    #[serde(serialize_with = "word_of")]
    pub standing: Standing,
    /// The mode's word.
    pub mode: &'static str,
    /// Who alone changes and removes the guard.
    pub owner: Option<String>,
    /// Whether the programs are those of this build: `current`, or `older`.
    pub programs: &'static str,
    /// The version of the policy.
    pub epoch: u64,
    /// The guest's MAC.
    pub mac: String,
    /// The guest's addresses.
    pub addresses: Vec<String>,
    /// The gateways.
    pub gateways: Vec<String>,
    /// Where the guest's IP frames must go.
    pub gateway_mac: String,
    /// The allowlist, sorted.
    pub allow: Vec<String>,
    /// How much may travel.
    pub limits: DirectionLimits,
    /// Until when anything passes; `None` is for ever.
    pub lease: Option<Lease>,
    /// From the guest.
    pub egress: DirectionStatus,
    /// To the guest.
    pub ingress: DirectionStatus,
    /// Dropped frames of which no event tells.
    pub events_lost: u64,
    /// Those of them that exceeded the guard's rate of events; the others did not fit the ring.
    pub events_limited: u64,
    /// What passes the host's stack by; `None` where nothing is redirected.
    pub redirect: Option<RedirectStatus>,
}

impl GuardStatus {
    /// What the maps of `pins` hold. Callers hold the lock of the guard.
    pub(crate) fn read(
        interface: &str,
        ifindex: u32,
        pins: &Pins,
        standing: Standing,
    ) -> Result<(Self, Counters), GuardError> {
        let store = PolicyStore::open(interface, pins)?;
        let (policy, allow) = (store.policy()?, store.endpoints()?);
        let counters = CounterReader::open(interface, pins)?.read()?;
        let present = |addresses: &[Address]| {
            let present = addresses.iter().filter(|address| !address.is_unspecified());
            present.map(ToString::to_string).collect()
        };
        let status = Self {
            interface: interface.to_owned(),
            ifindex,
            state: standing.word(),
            standing,
            mode: Mode::from_number(policy.mode).map_or("none", Mode::word),
            owner: pins.owner()?.map(|owner| owner.to_string()),
            programs: if is_current(pins)? {
                "current"
            } else {
                "older"
            },
            epoch: policy.epoch,
            mac: policy.mac.to_string(),
            addresses: present(&policy.addresses),
            gateways: present(&policy.gateways),
            gateway_mac: policy.gateway_mac.to_string(),
            allow: allow.iter().map(ToString::to_string).collect(),
            limits: DirectionLimits::of(&policy),
            lease: lease::read(interface, pins)?,
            egress: DirectionStatus::from(&counters.egress),
            ingress: DirectionStatus::from(&counters.ingress),
            events_lost: counters.events_lost.packets,
            events_limited: counters.events_limited.packets,
            redirect: redirect::read(interface, pins)?,
        };
        Ok((status, counters))
    }
}
