//! What only time or numbers show: the lease, rates, flows' ends, and the guard's own answers.

use omerta_dataplane::{Guard, PolicyStore, Programs};
use omerta_kernel_tests::*;
use omerta_verdict::{
    Direction, FixedInputs, Flow, MemoryGuard, Meter, Mode, Policy, Protocol, Rate, Reason,
    Verdict, egress,
};

use crate::frames::to_consumer;
use crate::stage::{PATIENCE, Stage};

use aya::programs::{TestRun, TestRunOptions};

const NEXT: u32 = -1_i32 as u32;
const NOW: u64 = 1_000_000_000_000;

/// Programs whose clock stands still at [`NOW`], under a policy that `change` makes.
fn programs(mode: Mode, change: impl FnOnce(&mut Policy)) -> Programs {
    let inputs = FixedInputs {
        now_ns: NOW,
        ..FixedInputs::NONE
    };
    let programs = Programs::load_with("limits", mode, inputs).unwrap();
    let mut policy = config(mode).policy("guest").unwrap();
    change(&mut policy);
    let mut store = PolicyStore::of(&programs, "limits").unwrap();
    store.commit(policy, &allowlist()).unwrap();
    programs
}

fn passes(programs: &mut Programs, direction: Direction, frame: &[u8]) -> bool {
    let options = TestRunOptions {
        data_in: Some(frame),
        ..TestRunOptions::new()
    };
    let program = programs.program(direction).unwrap();
    program.test_run(options).unwrap().return_value == NEXT
}

#[test]
fn a_lease_ends_and_is_renewed_by_one_word() {
    let mut programs = programs(Mode::Filtered, |_| {});
    for (until, allowed) in [(0, true), (NOW, false), (NOW + 1, true), (1, false)] {
        PolicyStore::of(&programs, "limits")
            .unwrap()
            .set_lease_until_ns(until);
        let passed = passes(&mut programs, Direction::Egress, &to_consumer(b"x"));
        assert_eq!(passed, allowed, "{until}");
        let policy = config(Mode::Filtered).policy("guest").unwrap();
        let native = MemoryGuard {
            now_ns: NOW,
            lease_until_ns: until,
            ..MemoryGuard::new(&policy, &[])
        };
        let expired =
            egress(&to_consumer(b"x")[..], &native) == Verdict::Drop(Reason::LeaseExpired);
        assert_eq!(expired, !allowed, "{until}");
    }
}

#[test]
fn a_rate_lets_its_burst_through_and_no_more() {
    for (meter, burst, expected) in [
        (Meter::EgressPackets, 10, 10),
        // Frames of 43 bytes.
        (Meter::EgressBytes, 430, 10),
        (Meter::IngressPackets, 10, 1000),
    ] {
        let mut programs = programs(Mode::Filtered, |policy| {
            policy.rates[meter as usize] = Rate::per_second(1, burst);
        });
        let frame = to_consumer(b"x");
        assert_eq!(frame.len(), 43);
        let passed = (0..1000)
            .filter(|_| passes(&mut programs, Direction::Egress, &frame))
            .count();
        assert_eq!(passed, expected, "{meter:?}");
    }
}

#[test]
fn a_flow_lives_as_long_as_its_protocol_says() {
    let mut programs = programs(Mode::Conntrack, |_| {});
    let reply = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, b"x"));
    let frame = ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &reply);
    let (guest, peer) = (
        std::net::IpAddr::from(GUEST).into(),
        std::net::IpAddr::from(CONSUMER).into(),
    );
    let flow = Flow::new(Protocol::Udp, (guest, 40000), (peer, CONSUMER_PORT));
    let timeout = flow.timeout_ns();
    for (seen, live) in [
        (None, false),
        (Some(NOW), true),
        (Some(NOW - timeout + 1), true),
        (Some(NOW - timeout), false),
        // Another CPU's clock may be ahead.
        (Some(NOW + 5), true),
    ] {
        programs.set_flow(&flow, seen).unwrap();
        assert_eq!(
            passes(&mut programs, Direction::Ingress, &frame),
            live,
            "{seen:?}"
        );
    }
}

/// Root in a guest must not be able to leave its own address undefended: the provider's network
/// would give it to another.
#[test]
fn a_guest_that_probes_without_end_leaves_the_others_their_answer() {
    let mut programs = programs(Mode::Filtered, |_| {});
    let broadcast = omerta_verdict::Mac::BROADCAST;
    let own = arp(
        1,
        (GUEST_MAC, std::net::Ipv4Addr::UNSPECIFIED),
        (omerta_verdict::Mac([0; 6]), GUEST),
    );
    let own = ethernet(GUEST_MAC, broadcast, 0x0806, &own);
    for _ in 0..100 {
        assert!(!passes(&mut programs, Direction::Egress, &own));
    }
    let group: std::net::Ipv6Addr = "ff02::1:ff00:2".parse().unwrap();
    let mut solicitation = vec![135, 0, 0, 0, 0, 0, 0, 0];
    solicitation.extend(GUEST6.octets());
    let header = Ipv6 {
        hops: 255,
        ..Ipv6::new(std::net::Ipv6Addr::UNSPECIFIED, group, 58)
    };
    let probe = ethernet(
        STRANGER_MAC,
        omerta_verdict::Mac([0x33, 0x33, 0xff, 0, 0, 2]),
        0x86dd,
        &header.icmp(solicitation),
    );
    let options = TestRunOptions {
        data_in: Some(&probe),
        ..TestRunOptions::new()
    };
    let program = programs.program(Direction::Ingress).unwrap();
    let returned = program.test_run(options).unwrap().return_value;
    // `TC_ACT_REDIRECT`: answered.
    assert_eq!(returned, 7);
}

#[test]
fn own_answers_are_counted_apart_from_what_the_guest_sends() {
    let stage = Stage::new(Mode::Filtered);
    let reply = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, b"x"));
    stage.send_from_world(&reply);
    assert!(stage.tap.recv(PATIENCE).unwrap().is_some());
    let counters = stage.guarded(Guard::counters);
    assert_eq!(
        counters.egress.own_answers.packets,
        counters.ingress.answered.packets
    );
    assert!(counters.ingress.answered.packets > 0);
    assert_eq!(counters.egress.rx().packets, 0);
}
