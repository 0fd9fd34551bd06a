//! What a frame is judged against.

use crate::{Address, AddressClass, Bucket, Endpoint, Meter, Policy, Protocol, Rate, table};

const SECOND_NS: u64 = 1_000_000_000;

/// One flow of a guest.
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

    /// The flow as numbers: the peer's address, the guest's, then ports and protocol, of which the
    /// second 16 bits are zero.
    #[inline(always)]
    pub const fn words(&self) -> [u64; 5] {
        let (peer_high, peer_low) = self.peer.words();
        let (high, low) = self.guest.words();
        let rest =
            (self.peer_port as u64) << 48 | (self.guest_port as u64) << 32 | self.protocol as u64;
        [peer_high, peer_low, high, low, rest]
    }

    /// The flow whose [`Flow::words`] these are.
    #[inline(always)]
    pub const fn from_words([peer_high, peer_low, high, low, rest]: [u64; 5]) -> Self {
        Self {
            peer: Address::from_words(peer_high, peer_low),
            guest: Address::from_words(high, low),
            peer_port: (rest >> 48) as u16,
            guest_port: (rest >> 32) as u16,
            protocol: rest as u16,
            zero: 0,
        }
    }

    /// What the allowlist must hold for the flow; `None` where it is of no protocol that a guest may
    /// speak.
    pub const fn endpoint(&self) -> Option<Endpoint> {
        let protocol = match self.protocol {
            1 => Protocol::Icmp,
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            _ => return None,
        };
        Some(Endpoint {
            protocol,
            address: self.peer,
            port: self.peer_port,
        })
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

/// Places of [`SentFlow`] that a guard has; a power of two.
pub const SENT_FLOWS: usize = 128;

/// A flow that the guest sent on, remembered outside of conntrack mode for the errors that quote it.
/// Each has one place, which it takes from the flow that was there. All zero is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SentFlow {
    /// [`Flow::words`].
    pub flow: [u64; 5],
    /// When the guest last sent on it, in the shell's own unit.
    pub tick: u64,
    /// Of the policy that allowed it: no other lets an error in for it. Written after all else and
    /// read before it.
    pub generation: u64,
    /// [`SentFlow::place_and_check`] of all that, by which a shell may know that it need not be written.
    pub check: u64,
}

impl SentFlow {
    /// No flow.
    pub const NONE: Self = Self {
        flow: [0; 5],
        tick: 0,
        generation: 0,
        check: 0,
    };

    /// The flow's place among [`SENT_FLOWS`], and a number that is most likely another for another
    /// flow, tick or generation. Only the guest chooses flows: those that it makes collide cost it
    /// errors of its own.
    #[inline(always)]
    pub const fn place_and_check(flow: &Flow, tick: u64, generation: u64) -> (usize, u64) {
        let [peer_high, peer_low, _, low, rest] = flow.words();
        let mixed = (peer_high ^ peer_low ^ rest).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let place = mixed >> (u64::BITS - SENT_FLOWS.ilog2());
        (place as usize, mixed ^ low ^ generation << 32 ^ tick)
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

    /// Gives back to the bucket of `meter` what [`Guard::take`] has taken for a frame that does not pass.
    fn put_back(&self, meter: Meter, rate: Rate, units: u32);

    /// Conntrack mode: remembers that the guest sent on `flow` now; false where there is no room.
    fn open_flow(&self, flow: &Flow) -> bool;

    /// Conntrack mode: when the guest last sent on `flow`.
    fn flow_seen(&self, flow: &Flow) -> Option<u64>;

    /// The other modes: remembers that the guest sends on `flow` now, in place of another where there
    /// is no room.
    fn note_sent(&self, flow: &Flow);

    /// The other modes: when the guest last sent on `flow`, under the policy in force.
    fn last_sent(&self, flow: &Flow) -> Option<u64>;
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
    /// The flows on which the guest has just sent: in conntrack mode those that let anything in, in the
    /// others those that let errors in.
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

    fn put_back(&self, _meter: Meter, _rate: Rate, _units: u32) {}

    fn open_flow(&self, _flow: &Flow) -> bool {
        self.flows_have_room
    }

    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        self.live_flows.contains(flow).then_some(self.now_ns)
    }

    fn note_sent(&self, _flow: &Flow) {}

    fn last_sent(&self, flow: &Flow) -> Option<u64> {
        self.flow_seen(flow)
    }
}
