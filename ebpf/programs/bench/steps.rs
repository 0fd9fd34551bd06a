//! The egress program in steps, each with all that those before it do: what an allowed frame costs,
//! part by part. They judge by the guard's own functions and maps, with parts left out.

use aya_ebpf::{macros::classifier, programs::TcContext};
use omerta_verdict::{
    Address, Bucket, Direction, Flow, Guard, Mac, Meter, Mode, Outcome, Policy, Protocol,
    RX_COUNTER, Rate, Verdict, usual_egress,
};

use crate::accounting::Counters;
use crate::buffer::PlainBuffer;
use crate::state::{KernelGuard, StraightGuard, place_of};

const NEXT: i32 = -1;
const SHOT: i32 = 2;
const ALLOWED: u32 = Outcome::Allowed.index() as u32;
/// Ethernet, IPv4 and UDP.
const HEADERS: usize = 14 + 20 + 8;

/// As in tests/kernel/src/stage.rs. What the compiler knows costs no load.
static KNOWN: Policy = {
    let mut policy = Policy::EMPTY;
    policy.mode = Mode::Filtered as u32;
    policy.mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0x01]);
    policy.gateway_mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0xfe]);
    policy.addresses[0] = Address::from_words(0, 0xffff_0a4d_0002);
    policy
};

/// A guard of one policy that the compiler knows; it lists everything and remembers nothing.
struct Known;

impl Guard for Known {
    #[inline(always)]
    fn policy(&self) -> Option<&Policy> {
        Some(&KNOWN)
    }

    #[inline(always)]
    fn bucket(&self, _index: u32) -> Option<&Bucket> {
        None
    }

    #[inline(always)]
    fn owns(&self, policy: &Policy, address: Address) -> bool {
        policy.addresses[0] == address
    }

    #[inline(always)]
    fn lists(&self, _: &Policy, _: Protocol, _: Address, _: u16) -> bool {
        true
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        0
    }

    #[inline(always)]
    fn lease_until(&self) -> u64 {
        0
    }

    #[inline(always)]
    fn take(&self, _: Meter, _: Rate, _: u32) -> bool {
        true
    }

    #[inline(always)]
    fn put_back(&self, _: Meter, _: Rate, _: u32) {}

    #[inline(always)]
    fn open_flow(&self, _: &Flow) -> bool {
        true
    }

    #[inline(always)]
    fn flow_seen(&self, _: &Flow) -> Option<u64> {
        None
    }

    #[inline(always)]
    fn note_sent(&self, _: &Flow) {}

    #[inline(always)]
    fn last_sent(&self, _: &Flow) -> Option<u64> {
        None
    }
}

/// The guard without its allowlist where not `LISTS`, and without a memory where not `NOTES`.
struct Part<'a, const LISTS: bool, const NOTES: bool>(StraightGuard<'a>);

impl<const LISTS: bool, const NOTES: bool> Guard for Part<'_, LISTS, NOTES> {
    #[inline(always)]
    fn policy(&self) -> Option<&Policy> {
        self.0.policy()
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.0.bucket(index)
    }

    #[inline(always)]
    fn owns(&self, policy: &Policy, address: Address) -> bool {
        self.0.owns(policy, address)
    }

    #[inline(always)]
    fn lists(&self, policy: &Policy, protocol: Protocol, address: Address, port: u16) -> bool {
        !LISTS || self.0.lists(policy, protocol, address, port)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        self.0.random()
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        self.0.now()
    }

    #[inline(always)]
    fn lease_until(&self) -> u64 {
        self.0.lease_until()
    }

    #[inline(always)]
    fn take(&self, meter: Meter, rate: Rate, units: u32) -> bool {
        self.0.take(meter, rate, units)
    }

    #[inline(always)]
    fn put_back(&self, meter: Meter, rate: Rate, units: u32) {
        self.0.put_back(meter, rate, units);
    }

    #[inline(always)]
    fn open_flow(&self, flow: &Flow) -> bool {
        self.0.open_flow(flow)
    }

    #[inline(always)]
    fn flow_seen(&self, flow: &Flow) -> Option<u64> {
        self.0.flow_seen(flow)
    }

    #[inline(always)]
    fn note_sent(&self, flow: &Flow) {
        if NOTES {
            self.0.note_sent(flow);
        }
    }

    #[inline(always)]
    fn last_sent(&self, flow: &Flow) -> Option<u64> {
        self.0.last_sent(flow)
    }
}

#[inline(always)]
fn judge(frame: &PlainBuffer, guard: &impl Guard) -> bool {
    matches!(usual_egress(frame, guard), Some(Verdict::Allow))
}

#[inline(always)]
fn judge_in_part<const LISTS: bool, const NOTES: bool>(context: &TcContext) -> bool {
    let Some(frame) = PlainBuffer::of(context) else {
        return false;
    };
    let Some(guard) = KernelGuard::of_tap(context.skb.skb) else {
        return false;
    };
    let Some(straight) = guard.straight() else {
        return false;
    };
    judge(&frame, &Part::<LISTS, NOTES>(straight)) && guard.holds()
}

#[inline(always)]
fn action(allowed: bool) -> i32 {
    if allowed { NEXT } else { SHOT }
}

/// The headers can be read.
#[classifier]
pub fn step_bounds(context: TcContext) -> i32 {
    action(context.data() + HEADERS <= context.data_end())
}

/// And nothing is left to be done to the frame: no tag, checksum or cut.
#[classifier]
pub fn step_plain(context: TcContext) -> i32 {
    action(PlainBuffer::of(&context).is_some() && context.data() + HEADERS <= context.data_end())
}

/// And the headers are sound, and say what the compiler knows.
#[classifier]
pub fn step_headers(context: TcContext) -> i32 {
    action(PlainBuffer::of(&context).is_some_and(|frame| judge(&frame, &Known)))
}

/// And they say what the policy says.
#[classifier]
pub fn step_policy(context: TcContext) -> i32 {
    action(judge_in_part::<false, false>(&context))
}

/// And the peer is on the allowlist.
#[classifier]
pub fn step_list(context: TcContext) -> i32 {
    action(judge_in_part::<true, false>(&context))
}

/// And the flow is remembered.
#[classifier]
pub fn step_flow(context: TcContext) -> i32 {
    action(judge_in_part::<true, true>(&context))
}

/// And the frame is counted, as it comes and as it leaves.
#[classifier]
pub fn step_count(context: TcContext) -> i32 {
    let Some(counters) = Counters::of(place_of(context.skb.skb), Direction::Egress) else {
        return SHOT;
    };
    let length = context.len();
    counters.count(RX_COUNTER as u32, length);
    if !judge_in_part::<true, true>(&context) {
        return SHOT;
    }
    counters.count(ALLOWED, length);
    NEXT
}
