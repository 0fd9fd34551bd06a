//! The quota of flows in conntrack mode: what lives is kept, what is too much is refused.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::net::IpAddr;

use aya::programs::{TestRun, TestRunOptions};
use omerta_dataplane::{PolicyStore, Programs};
use omerta_kernel_tests::*;
use omerta_verdict::{Direction, FixedInputs, Flow, Mode, Protocol, Reason};

const NEXT: u32 = -1_i32 as u32;
const NOW: u64 = 1_000_000_000_000;
const QUOTA: u16 = 4096;

struct Judge(Programs);

impl Judge {
    fn new() -> Self {
        let inputs = FixedInputs {
            now_ns: NOW,
            ..FixedInputs::NONE
        };
        let mut programs = Programs::load_with("flows", Mode::Conntrack, inputs).unwrap();
        let policy = config(Mode::Conntrack).policy("guest").unwrap();
        let mut store = PolicyStore::of(&mut programs, "flows").unwrap();
        store.commit(policy, &allowlist()).unwrap();
        Self(programs)
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
