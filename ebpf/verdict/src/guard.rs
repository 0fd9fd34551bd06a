//! What a frame is judged against.

use crate::{Address, Bucket, Policy, Protocol};

/// One flow of a guest, as conntrack mode remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Flow {
    /// The remote's address.
    pub peer: Address,
    /// The guest's address.
    pub guest: Address,
    /// The remote's port; 0 for ICMP.
    pub peer_port: u16,
    /// The guest's port; the echo identifier for ICMP.
    pub guest_port: u16,
    /// The IP protocol number.
    pub protocol: u16,
    /// Zero: the flow is a map key, so every byte counts.
    pub zero: u16,
}

impl Flow {
    /// A flow between `guest` and `peer`.
    #[inline(always)]
    pub const fn new(protocol: Protocol, guest: (Address, u16), peer: (Address, u16)) -> Self {
        Self {
            peer: peer.0,
            guest: guest.0,
            peer_port: peer.1,
            guest_port: guest.1,
            protocol: protocol as u16,
            zero: 0,
        }
    }
}

/// The state of one guard, as the shell holds it: maps in the kernel, plain memory elsewhere.
pub trait Guard {
    /// The policy in force, or `None` where there is none: everything is then dropped.
    fn policy(&self) -> Option<&Policy>;

    /// Bucket `index` of the allowlist that belongs to [`Guard::policy`].
    fn bucket(&self, index: u32) -> Option<&Bucket>;

    /// A uniformly random number, for sampled mode.
    fn random(&self) -> u32;

    /// Conntrack mode: remembers that the guest sent on `flow`; false where there is no room.
    fn open_flow(&self, flow: &Flow) -> bool;

    /// Conntrack mode: whether the guest has sent on `flow` within its timeout.
    fn flow_is_live(&self, flow: &Flow) -> bool;
}

/// A guard in plain memory, for platforms without BPF and for re-running kernel verdicts.
#[derive(Clone, Copy, Debug)]
pub struct MemoryGuard<'a> {
    /// The policy in force.
    pub policy: &'a Policy,
    /// Its allowlist: `policy.table_mask + 1` buckets.
    pub buckets: &'a [Bucket],
    /// What [`Guard::random`] says next.
    pub random: u32,
    /// Conntrack mode: whether a new flow finds room.
    pub flows_have_room: bool,
    /// Conntrack mode: the flows that are live.
    pub live_flows: &'a [Flow],
}

impl Guard for MemoryGuard<'_> {
    fn policy(&self) -> Option<&Policy> {
        Some(self.policy)
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index as usize)
    }

    fn random(&self) -> u32 {
        self.random
    }

    fn open_flow(&self, _flow: &Flow) -> bool {
        self.flows_have_room
    }

    fn flow_is_live(&self, flow: &Flow) -> bool {
        self.live_flows.contains(flow)
    }
}
