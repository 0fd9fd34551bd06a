//! A case before the verdict itself, with what travels beside its bytes.

use std::cell::RefCell;

use omerta_corpus::{Case, Special, VnetHeader, Way};
use omerta_kernel_tests::allowlist;
use omerta_verdict::{
    Bucket, Direction, Flow, Frame, Guard, Meter, Outcome, PendingChecksum, Policy, Rate, Segments,
    Table, egress, ingress,
};

use crate::guest_policy;
use crate::layout::MTU;

/// A case's frame with its metadata.
struct CaseFrame<'a> {
    bytes: &'a [u8],
    vlan: Option<u16>,
    vnet: VnetHeader,
}

impl Frame for CaseFrame<'_> {
    fn length(&self) -> u32 {
        self.bytes.length()
    }

    fn mtu(&self) -> u32 {
        MTU
    }

    fn is_tagged(&self) -> bool {
        self.vlan.is_some()
    }

    fn segment_size(&self) -> u32 {
        if self.vnet.gso_type == 0 {
            0
        } else {
            u32::from(self.vnet.gso_size)
        }
    }

    fn is_cut_into(&self, kind: Segments) -> bool {
        // VIRTIO_NET_HDR_GSO_TCPV4, _TCPV6 and _UDP_L4; the highest bit is _ECN.
        let wanted = match kind {
            Segments::TcpV4 => 1,
            Segments::TcpV6 => 4,
            Segments::Udp => 5,
        };
        self.vnet.gso_type & 0x7f == wanted
    }

    fn pending_checksum(&self) -> Option<PendingChecksum> {
        let start = u32::from(self.vnet.csum_start);
        (self.vnet.flags & 1 != 0).then(|| PendingChecksum {
            start,
            field: start + u32::from(self.vnet.csum_offset),
        })
    }

    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        self.bytes.bytes(offset)
    }
}

/// A guard that remembers flows.
struct Remembering {
    policy: Policy,
    buckets: Vec<Bucket>,
    flows: RefCell<Vec<Flow>>,
    guard: Special,
}

impl Remembering {
    fn new(case: &Case) -> Self {
        let mut policy = guest_policy(case.mode, case.guard);
        policy.table_seed = 0x5eed;
        policy.table_mask = 63;
        let mut buckets = vec![Bucket::EMPTY; 64];
        let mut table = Table::new(&mut buckets, policy.table_seed).unwrap();
        assert!(allowlist().iter().all(|endpoint| table.insert(endpoint)));
        Self {
            policy,
            buckets,
            flows: RefCell::default(),
            guard: case.guard,
        }
    }

    fn judge(&self, case: &Case) -> Outcome {
        let frame = CaseFrame {
            bytes: &case.frame,
            vlan: case.vlan,
            vnet: case.vnet.unwrap_or_default(),
        };
        match direction(case) {
            Direction::Egress => egress(&frame, self),
            Direction::Ingress => ingress(&frame, self),
        }
        .outcome()
    }
}

impl Guard for Remembering {
    fn policy(&self) -> Option<&Policy> {
        (self.guard != Special::NoPolicy).then_some(&self.policy)
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index as usize)
    }

    fn random(&self) -> u32 {
        // Sampled mode spares the frame the allowlist.
        1
    }

    fn open_flow(&self, flow: &Flow) -> bool {
        self.flows.borrow_mut().push(*flow);
        self.guard != Special::FlowsFull
    }

    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        self.flows.borrow().contains(flow).then_some(0)
    }

    fn note_sent(&self, flow: &Flow) {
        self.flows.borrow_mut().push(*flow);
    }

    fn last_sent(&self, flow: &Flow) -> Option<u64> {
        self.flow_seen(flow)
    }

    fn now(&self) -> u64 {
        1
    }

    fn lease_until(&self) -> u64 {
        u64::from(self.guard == Special::LeaseOver)
    }

    fn take(&self, _meter: Meter, rate: Rate, _units: u32) -> bool {
        rate.is_unlimited()
    }

    fn put_back(&self, _meter: Meter, _rate: Rate, _units: u32) {}
}

/// Which of the two judgements a case is for.
pub fn direction(case: &Case) -> Direction {
    match case.way {
        Way::FromGuest | Way::Between => Direction::Egress,
        Way::ToGuest => Direction::Ingress,
    }
}

/// The case that comes before `case`.
pub fn before<'a>(case: &Case, all: &'a [Case]) -> Option<&'a Case> {
    let name = case.before.as_ref()?;
    all.iter().find(|other| other.name == *name)
}

/// The verdict on a case.
pub fn outcome(case: &Case, all: &[Case]) -> Outcome {
    let guard = Remembering::new(case);
    if let Some(before) = before(case, all) {
        assert_eq!(
            guard.judge(before),
            Outcome::Allowed,
            "{} before {}",
            before.name,
            case.name
        );
    }
    guard.judge(case)
}
