//! What a frame is judged against.

use crate::{Address, AddressClass, Bucket, Meter, Policy, Protocol, Rate, table};

const SECOND_NS: u64 = 1_000_000_000;

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

    /// Whether the flow lives at `now` (ns), when the guest last sent on it at `seen`.
    #[inline(always)]
    pub const fn is_live(&self, seen: u64, now: u64) -> bool {
        // Another CPU may have written a time that is later than this one's.
        now.saturating_sub(seen) < self.timeout_ns()
    }

    /// How long the flow lives on after the guest has sent on it, in nanoseconds.
    #[inline(always)]
    pub const fn timeout_ns(&self) -> u64 {
        match self.protocol {
            // RFC 5382, REQ-5: two hours and four minutes.
            6 => 7440 * SECOND_NS,
            // RFC 4787, REQ-5 asks for two minutes or more; WireGuard rekeys within them.
            17 => 180 * SECOND_NS,
            _ => 60 * SECOND_NS,
        }
    }
}

/// The state of one guard, as the shell holds it: maps in the kernel, plain memory elsewhere.
pub trait Guard {
    /// The policy in force, or `None` where there is none: everything is then dropped.
    fn policy(&self) -> Option<&Policy>;

    /// Bucket `index` of the allowlist that belongs to [`Guard::policy`].
    fn bucket(&self, index: u32) -> Option<&Bucket>;

    /// Whether the guest owns `address`, by `policy`, which is [`Guard::policy`].
    #[inline(always)]
    fn owns(&self, policy: &Policy, address: Address) -> bool {
        policy.owns(address)
    }

    /// What may be said of an address; a shell may keep it apart.
    #[inline(always)]
    fn class(&self, address: Address) -> AddressClass {
        AddressClass::of(address)
    }

    /// [`Address::is_possible_peer`], where nothing else is asked of the address.
    #[inline(always)]
    fn may_be_peer(&self, address: Address) -> bool {
        address.is_possible_peer()
    }

    /// Whether the allowlist that belongs to `policy` holds (protocol, address, port).
    #[inline(always)]
    fn lists(&self, policy: &Policy, protocol: Protocol, address: Address, port: u16) -> bool {
        table::lookup(self, policy, protocol, address, port)
    }

    /// A uniformly random number, for sampled mode.
    fn random(&self) -> u32;

    /// The time in nanoseconds of a clock that never goes back.
    fn now(&self) -> u64;

    /// The time at which the guard's lease ends; 0 where it has none.
    fn lease_until(&self) -> u64;

    /// Takes `units` from the bucket of `meter`, which fills at `rate`; false where they are more
    /// than it holds.
    fn take(&self, meter: Meter, rate: Rate, units: u32) -> bool;

    /// Conntrack mode: remembers that the guest sent on `flow` now; false where there is no room.
    fn open_flow(&self, flow: &Flow) -> bool;

    /// Conntrack mode: when the guest last sent on `flow`.
    fn flow_seen(&self, flow: &Flow) -> Option<u64>;
}

/// A guard in plain memory, for platforms without BPF and for tests.
#[derive(Clone, Copy, Debug)]
pub struct MemoryGuard<'a> {
    /// The policy in force.
    pub policy: &'a Policy,
    /// Its allowlist: `policy.table_mask + 1` buckets.
    pub buckets: &'a [Bucket],
    /// What [`Guard::random`] says next.
    pub random: u32,
    /// The time, in nanoseconds.
    pub now_ns: u64,
    /// The end of the lease; 0 where there is none.
    pub lease_until_ns: u64,
    /// Whether every meter whose rate is limited still holds what is asked of it.
    pub meters_have_room: bool,
    /// Conntrack mode: whether a new flow finds room.
    pub flows_have_room: bool,
    /// Conntrack mode: the flows on which the guest has just sent.
    pub live_flows: &'a [Flow],
}

impl<'a> MemoryGuard<'a> {
    /// A guard without lease and flows, whose meters hold whatever is asked and whose table of
    /// flows has room.
    pub const fn new(policy: &'a Policy, buckets: &'a [Bucket]) -> Self {
        Self {
            policy,
            buckets,
            random: 0,
            now_ns: 0,
            lease_until_ns: 0,
            meters_have_room: true,
            flows_have_room: true,
            live_flows: &[],
        }
    }
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

    fn now(&self) -> u64 {
        self.now_ns
    }

    fn lease_until(&self) -> u64 {
        self.lease_until_ns
    }

    fn take(&self, _meter: Meter, rate: Rate, _units: u32) -> bool {
        rate.is_unlimited() || self.meters_have_room
    }

    fn open_flow(&self, _flow: &Flow) -> bool {
        self.flows_have_room
    }

    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        self.live_flows.contains(flow).then_some(self.now_ns)
    }
}
