//! The guest's flows: what lives is kept, what is too much is refused, and no flow outlives its rule.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::net::IpAddr;
use std::time::Duration;

use aya::programs::{TestRun, TestRunOptions};
use nix::time::{ClockId, clock_getres};
use omerta_dataplane::{PolicyStore, Programs};
use omerta_kernel_tests::*;
use omerta_verdict::{
    Direction, Endpoint, FixedInputs, Flow, Meter, Mode, Policy, Protocol, Rate, Reason,
    SENT_FLOWS, SentFlow,
};

const NEXT: u32 = -1_i32 as u32;
const NOW: u64 = 1_000_000_000_000;
const QUOTA: u16 = 4096;
/// RFC 4787, REQ-5.
const UDP_TIMEOUT_NS: u64 = 180_000_000_000;

struct Judge(Programs);

impl Judge {
    fn new() -> Self {
        Self::in_mode(Mode::Conntrack)
    }

    fn in_mode(mode: Mode) -> Self {
        Self::with(mode, NOW)
    }

    /// By the kernel's clock where `now_ns` is 0.
    fn with(mode: Mode, now_ns: u64) -> Self {
        let inputs = FixedInputs {
            now_ns,
            ..FixedInputs::NONE
        };
        let programs = Programs::load_with("flows", mode, inputs).unwrap();
        let mut judge = Self(programs);
        judge.commit(config(mode).policy("guest").unwrap(), &allowlist());
        judge
    }

    fn commit(&mut self, policy: Policy, endpoints: &[Endpoint]) {
        let mut store = PolicyStore::of(&self.0, "flows").unwrap();
        store.commit(policy, endpoints).unwrap();
    }

    /// Puts `endpoints` in place of the allowlist.
    fn replace(&mut self, endpoints: &[Endpoint]) {
        let policy = PolicyStore::of(&self.0, "flows").unwrap().policy();
        self.commit(policy.unwrap(), endpoints);
    }

    fn passes(&mut self, direction: Direction, frame: &[u8]) -> bool {
        let options = TestRunOptions {
            data_in: Some(frame),
            ..TestRunOptions::new()
        };
        let program = self.0.program(direction).unwrap();
        program.test_run(options).unwrap().return_value == NEXT
    }

    /// Whether the guest may send from `port` to the consumer.
    fn sends(&mut self, port: u16) -> bool {
        let packet = Ipv4::new(GUEST, CONSUMER, 17).packet(&udp(port, CONSUMER_PORT, b"x"));
        let frame = ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet);
        self.passes(Direction::Egress, &frame)
    }

    /// Whether the consumer's answer to `port` reaches the guest.
    fn is_answered(&mut self, port: u16) -> bool {
        let packet = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, port, b"x"));
        let frame = ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &packet);
        self.passes(Direction::Ingress, &frame)
    }

    /// Whether an error that quotes what the guest sent from `port` to the consumer reaches it.
    fn hears_of(&mut self, port: u16) -> bool {
        let quoted = Ipv4::new(GUEST, CONSUMER, 17).packet(&udp(port, CONSUMER_PORT, b"x"));
        let packet = Ipv4::new(STRANGER, GUEST, 1).packet(&icmp_unreachable(&quoted));
        let frame = ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &packet);
        self.passes(Direction::Ingress, &frame)
    }

    /// Lets what the guest has sent be so many ticks older.
    fn set_sent_back(&mut self, ticks: u64) {
        let mut sent = [SentFlow::NONE; SENT_FLOWS];
        sent.copy_from_slice(&self.0.live().unwrap().sent);
        for entry in sent.iter_mut().filter(|entry| entry.generation != 0) {
            entry.tick -= ticks;
            entry.check = 0;
        }
        self.0.edit_live(|live| live.sent = sent).unwrap();
    }

    /// Lets the flow from `port` time out.
    fn age(&mut self, port: u16) {
        let [guest, peer] = [IpAddr::from(GUEST), IpAddr::from(CONSUMER)];
        let flow = Flow::new(
            Protocol::Udp,
            (guest.into(), port),
            (peer.into(), CONSUMER_PORT),
        );
        let seen = NOW - flow.timeout_ns();
        self.0.set_flow(&flow, Some(seen)).unwrap();
    }
}

#[test]
fn a_flood_of_flows_costs_no_flow_that_lives_and_ends_at_the_quota() {
    let mut judge = Judge::new();
    let mut events = judge.0.take_events().unwrap();
    for port in 1..=QUOTA {
        assert!(judge.sends(port), "{port}");
    }
    for port in QUOTA + 1..=3 * QUOTA {
        assert!(!judge.sends(port), "{port} is beyond the quota");
    }
    assert_eq!(events.next().unwrap().reason, Reason::FlowQuota);
    assert!(!judge.is_answered(QUOTA + 1));
    for port in 1..=QUOTA {
        assert!(judge.is_answered(port), "{port} lives");
        assert!(judge.sends(port), "{port} goes on");
    }
}

#[test]
fn the_places_of_flows_that_timed_out_are_given_again_and_no_others() {
    let mut judge = Judge::new();
    for port in 1..=QUOTA {
        assert!(judge.sends(port), "{port}");
    }
    let aged = [1, 77, QUOTA / 2, QUOTA];
    for port in aged {
        judge.age(port);
        assert!(!judge.is_answered(port), "{port} has timed out");
    }
    // Each of them finds a place some time; then there is none again.
    let mut opened = Vec::new();
    for _ in 0..2 * QUOTA {
        let port = 20_000 + opened.len() as u16;
        if judge.sends(port) {
            opened.push(port);
        }
    }
    assert_eq!(opened.len(), aged.len());
    for port in (1..=QUOTA)
        .filter(|port| !aged.contains(port))
        .chain(opened)
    {
        assert!(judge.is_answered(port), "{port} lives");
    }
    assert!(!aged.into_iter().any(|port| judge.is_answered(port)));
}

#[test]
fn a_flow_that_timed_out_is_opened_again_in_its_own_place() {
    let mut judge = Judge::new();
    for port in 1..=QUOTA {
        assert!(judge.sends(port), "{port}");
    }
    judge.age(9);
    assert!(judge.sends(9));
    assert!(judge.is_answered(9));
    assert!(
        !(0..2 * QUOTA).any(|_| judge.sends(30_000)),
        "no room was made"
    );
}

/// `count` endpoints that are not the consumer's.
fn others(count: u32) -> Vec<Endpoint> {
    let other = |index: u32| Endpoint {
        protocol: Protocol::Udp,
        address: IpAddr::from(std::net::Ipv4Addr::from(0xcb00_7100 + index / 60_000)).into(),
        port: 1 + (index % 60_000) as u16,
    };
    (0..count).map(other).collect()
}

/// A short allowlist stands beside the policy, a long one in a map of its own.
#[test]
fn a_flow_does_not_outlive_the_rule_that_it_was_opened_by() {
    for length in [1, 1000] {
        let mut judge = Judge::new();
        let consumer = allowlist();
        let (without, with) = (others(length), [others(length), consumer].concat());
        judge.replace(&with);
        assert!(judge.sends(1) && judge.is_answered(1) && judge.hears_of(1));
        judge.replace(&without);
        assert!(!judge.is_answered(1) && !judge.hears_of(1));
        // Changes between make no difference.
        judge.replace(&others(length + 1));
        judge.replace(&with);
        assert!(!judge.is_answered(1), "the guest has not sent since");
        assert!(!judge.hears_of(1));
        assert!(judge.sends(1) && judge.is_answered(1) && judge.hears_of(1));
    }
}

#[test]
fn a_flow_whose_rule_stays_lives_through_every_change_of_others() {
    for length in [1, 1000] {
        let mut judge = Judge::new();
        assert!(judge.sends(1) && judge.sends(2));
        let with = [others(length), allowlist()].concat();
        for list in [&with, &allowlist(), &with, &allowlist()] {
            judge.replace(list);
            assert!(judge.is_answered(1) && judge.is_answered(2));
        }
    }
}

#[test]
fn a_flow_does_not_outlive_its_address() {
    let mut judge = Judge::new();
    let policy = config(Mode::Conntrack).policy("guest").unwrap();
    let mut moved = policy;
    moved.addresses[0] = policy.addresses[1];
    assert!(judge.sends(1));
    judge.commit(moved, &allowlist());
    assert!(!judge.is_answered(1));
    judge.commit(policy, &allowlist());
    assert!(!judge.is_answered(1));
    assert!(judge.sends(1) && judge.is_answered(1));
}

/// The flows of rules that are gone make room, each as soon as something is allowed again.
#[test]
fn revoked_flows_keep_no_place_of_others() {
    let mut judge = Judge::new();
    for port in 1..=QUOTA {
        assert!(judge.sends(port), "{port}");
    }
    judge.replace(&[]);
    judge.replace(&allowlist());
    assert_eq!(judge.0.flows().unwrap(), []);
    for port in QUOTA + 1..=2 * QUOTA {
        assert!(judge.sends(port), "{port}");
    }
    assert!(!judge.is_answered(1));
}

#[test]
fn a_frame_that_a_rate_drops_opens_and_keeps_alive_no_flow() {
    let mut judge = Judge::new();
    let mut policy = config(Mode::Conntrack).policy("guest").unwrap();
    policy.rates[Meter::EgressPackets as usize] = Rate::per_second(1, 1);
    judge.commit(policy, &allowlist());
    let mut events = judge.0.take_events().unwrap();
    assert!(judge.sends(1) && judge.is_answered(1));
    assert!(!judge.sends(2));
    assert_eq!(events.next().unwrap().reason, Reason::Policed);
    assert!(!judge.is_answered(2), "it was not opened");
    assert_eq!(events.next().unwrap().reason, Reason::NoFlow);
    judge.age(1);
    assert!(!judge.sends(1));
    assert_eq!(events.next().unwrap().reason, Reason::Policed);
    assert!(!judge.is_answered(1), "it has timed out");
}

#[test]
fn an_error_comes_in_only_for_what_the_guest_has_sent_lately_by_this_policy() {
    for mode in [Mode::Filtered, Mode::Direct, Mode::Sampled] {
        let mut judge = Judge::in_mode(mode);
        assert!(!judge.hears_of(1), "{mode}: nothing was sent");
        assert!(judge.sends(1) && judge.hears_of(1));
        assert!(!judge.hears_of(2), "{mode}: another port");
        // The same allowlist once more.
        judge.replace(&allowlist());
        assert!(!judge.hears_of(1), "{mode}: sent by another policy");
        assert!(judge.sends(1) && judge.hears_of(1));
        judge.set_sent_back(UDP_TIMEOUT_NS);
        assert!(!judge.hears_of(1), "{mode}: too long ago");
        assert!(judge.sends(1) && judge.hears_of(1));
    }
}

#[test]
fn the_kernels_ticks_are_as_long_as_its_clock_says() {
    let tick = Duration::from(clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).unwrap());
    let ticks = |time: u64| time / tick.as_nanos() as u64;
    let mut judge = Judge::with(Mode::Filtered, 0);
    let second = 1_000_000_000;
    for (age, heard) in [
        (UDP_TIMEOUT_NS / 2, true),
        (UDP_TIMEOUT_NS - 60 * second, true),
        (UDP_TIMEOUT_NS + 60 * second, false),
    ] {
        assert!(judge.sends(1) && judge.hears_of(1));
        judge.set_sent_back(ticks(age));
        assert_eq!(judge.hears_of(1), heard, "{age}");
    }
}

#[test]
fn a_frame_that_is_dropped_lets_no_error_in() {
    let mut judge = Judge::in_mode(Mode::Filtered);
    judge.replace(&[]);
    assert!(!judge.sends(1) && !judge.hears_of(1));
    let mut policy = config(Mode::Filtered).policy("guest").unwrap();
    policy.rates[Meter::EgressPackets as usize] = Rate::per_second(1, 1);
    judge.commit(policy, &allowlist());
    assert!(judge.sends(1) && judge.hears_of(1));
    assert!(!judge.sends(2) && !judge.hears_of(2));
}

/// A guest that opens more flows than are remembered loses errors about some, and no frame.
#[test]
fn errors_are_forgotten_for_newer_flows_and_nothing_else_is() {
    let mut judge = Judge::in_mode(Mode::Filtered);
    for port in 1..=QUOTA {
        assert!(judge.sends(port), "{port}");
    }
    let heard = (1..=QUOTA).filter(|port| judge.hears_of(*port)).count();
    assert!(heard <= SENT_FLOWS && heard > SENT_FLOWS / 2, "{heard}");
    assert!(judge.hears_of(QUOTA));
}
