//! Real frames through a guarded tap into a small routed network, and back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod capture;
mod diagnostics;
mod flood;
mod frames;
mod limits;
mod offload;
mod redirect;
mod stage;
mod upgrade;

use std::thread::sleep;

use omerta_dataplane::Guard;
use omerta_kernel_tests::*;
use omerta_verdict::{Direction, Mac, Mode, Reason};

use frames::{hostile, to_consumer, v4};
use stage::{PATIENCE, SETTLE, Stage, soon, udp_payload};

#[test]
fn the_allowed_endpoint_is_reached_and_answers() {
    let stage = Stage::new(Mode::Filtered);
    let arrivals = stage.arrivals();
    stage.tap.send(&to_consumer(b"handshake")).unwrap();
    let arrived = soon(|| {
        arrivals
            .frames()
            .unwrap()
            .into_iter()
            .find(|f| udp_payload(&f.bytes) == Some(b"handshake"))
    });
    assert!(arrived.is_some(), "the allowed frame did not arrive");

    // The provider's stack asks for the guest; the guard answers, and the guest never sees it.
    let reply = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, b"response"));
    stage.send_from_world(&reply);
    let received = stage
        .tap
        .recv(PATIENCE)
        .unwrap()
        .expect("the reply reaches the guest");
    assert_eq!(udp_payload(&received), Some(&b"response"[..]));
    assert_eq!(received[..6], GUEST_MAC.0);
    let counters = stage.guarded(Guard::counters);
    assert_eq!(
        (
            counters.egress.allowed.packets,
            counters.ingress.allowed.packets
        ),
        (1, 1)
    );
    assert_eq!(
        counters.ingress.answered.packets, 1,
        "the host's ARP request was answered for the guest"
    );
}

#[test]
fn hostile_frames_are_dropped_each_for_its_reason_and_none_arrives() {
    for mode in [Mode::Filtered, Mode::Conntrack] {
        let stage = Stage::new(mode);
        let arrivals = stage.arrivals();
        let neighbours = || {
            let output = stage
                .provider
                .command("ip")
                .args(["-4", "neigh", "show", "dev", "guest"])
                .output()
                .unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let mut sent = 0;
        for (name, frame, reason) in hostile() {
            let before = stage.dropped(Direction::Egress, reason);
            stage
                .tap
                .send(&frame)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            sent += 1;
            let counted =
                soon(|| (stage.dropped(Direction::Egress, reason) == before + 1).then_some(()));
            let counters = stage.guarded(Guard::counters);
            assert!(
                counted.is_some(),
                "{name} was not dropped for {reason}: {counters:?}"
            );
            assert_eq!(counters.egress.rx().packets, sent, "{name}");
        }
        sleep(SETTLE);
        let leaked: Vec<_> = arrivals
            .frames()
            .unwrap()
            .into_iter()
            .map(|f| f.bytes)
            .collect();
        assert!(leaked.is_empty(), "{leaked:02x?}");
        assert_eq!(neighbours(), "", "the host learned from the guest");
        assert_eq!(
            stage.tap.recv(SETTLE).unwrap(),
            None,
            "nothing was answered"
        );
    }
}

#[test]
fn strangers_do_not_reach_the_guest() {
    let stage = Stage::new(Mode::Filtered);
    stage.know_the_guest();
    let from = |from, port| Ipv4::new(from, GUEST, 17).packet(&udp(port, 40000, b"attack"));
    for (packet, reason) in [
        (from(STRANGER, CONSUMER_PORT), Reason::Endpoint),
        (from(CONSUMER, 53), Reason::Endpoint),
        (
            Ipv4::new(CONSUMER, GUEST, 1).packet(&icmp_echo(8, 1)),
            Reason::IcmpType,
        ),
        (
            Ipv4 {
                fragment: 0x2000,
                ..Ipv4::new(CONSUMER, GUEST, 17)
            }
            .packet(&udp(CONSUMER_PORT, 1, b"x")),
            Reason::Fragment,
        ),
    ] {
        stage.send_from_world(&packet);
        let counted = soon(|| (stage.dropped(Direction::Ingress, reason) > 0).then_some(()));
        // The provider's stack may put a fragment together before it forwards it.
        assert!(counted.is_some() || reason == Reason::Fragment, "{reason}");
    }
    assert_eq!(stage.tap.recv(SETTLE).unwrap(), None);
}

#[test]
fn conntrack_admits_replies_only_to_what_was_sent() {
    let stage = Stage::new(Mode::Conntrack);
    stage.know_the_guest();
    let reply = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, b"reply"));
    stage.send_from_world(&reply);
    assert!(
        soon(|| (stage.dropped(Direction::Ingress, Reason::NoFlow) == 1).then_some(())).is_some()
    );
    stage.tap.send(&to_consumer(b"open")).unwrap();
    assert!(
        soon(|| (stage.guarded(Guard::counters).egress.allowed.packets == 1).then_some(()))
            .is_some()
    );
    stage.send_from_world(&reply);
    assert!(stage.tap.recv(PATIENCE).unwrap().is_some());
    // A revoked endpoint is cut with the next packet, flow or not.
    stage.guarded(|guard| guard.revoke(&["udp:192.0.2.10:51820".parse().unwrap()]));
    stage.send_from_world(&reply);
    assert!(
        soon(|| (stage.dropped(Direction::Ingress, Reason::Endpoint) == 1).then_some(())).is_some()
    );
}

#[test]
fn the_gateway_is_answered_by_the_guard() {
    let stage = Stage::new(Mode::Filtered);
    let request = arp(1, (GUEST_MAC, GUEST), (Mac([0; 6]), GATEWAY));
    stage
        .tap
        .send(&ethernet(GUEST_MAC, Mac::BROADCAST, 0x0806, &request))
        .unwrap();
    let reply = stage.tap.recv(PATIENCE).unwrap().expect("ARP is answered");
    let expected = arp(2, (GATEWAY_MAC, GATEWAY), (GUEST_MAC, GUEST));
    assert_eq!(reply, ethernet(GATEWAY_MAC, GUEST_MAC, 0x0806, &expected));

    let group = "ff02::1:ff00:1".parse().unwrap();
    let message = [
        &[135, 0, 0, 0, 0, 0, 0, 0][..],
        &GATEWAY6.octets(),
        &[1, 1],
        &GUEST_MAC.0,
    ]
    .concat();
    let solicitation = Ipv6 {
        hops: 255,
        ..Ipv6::new(GUEST6, group, 58)
    }
    .icmp(message);
    stage
        .tap
        .send(&ethernet(
            GUEST_MAC,
            Mac([0x33, 0x33, 0xff, 0, 0, 1]),
            0x86dd,
            &solicitation,
        ))
        .unwrap();
    let reply = stage
        .tap
        .recv(PATIENCE)
        .unwrap()
        .expect("the solicitation is answered");
    let message = [
        &[136, 0, 0, 0, 0xe0, 0, 0, 0][..],
        &GATEWAY6.octets(),
        &[2, 1],
        &GATEWAY_MAC.0,
    ]
    .concat();
    let advertisement = Ipv6 {
        hops: 255,
        ..Ipv6::new(GATEWAY6, GUEST6, 58)
    }
    .icmp(message);
    assert_eq!(
        reply,
        ethernet(GATEWAY_MAC, GUEST_MAC, 0x86dd, &advertisement)
    );
    let counters = stage.guarded(Guard::counters);
    assert_eq!(
        (
            counters.egress.answered.packets,
            counters.egress.rx().packets
        ),
        (2, 2)
    );
}

#[test]
fn a_drop_is_reported_with_its_frame() {
    let stage = Stage::new(Mode::Filtered);
    let mut events = stage.guarded(Guard::events);
    let frame = v4(17, &udp(40000, 53, b"query"));
    stage.tap.send(&frame).unwrap();
    let event = soon(|| events.next()).expect("an event");
    assert_eq!(
        (event.reason, event.direction, &event.head),
        (Reason::Endpoint, Direction::Egress, &frame)
    );
    assert_eq!(event.describe(), "udp 10.77.0.2:40000 → 192.0.2.10:53");
}

#[test]
fn a_flood_is_counted_exactly() {
    let stage = Stage::new(Mode::Filtered);
    let arrivals = stage.arrivals();
    let bad = v4(17, &udp(40000, 53, b"flood"));
    for _ in 0..20_000 {
        stage.tap.send(&bad).unwrap();
    }
    stage.tap.send(&to_consumer(b"good")).unwrap();
    let counters = stage.guarded(Guard::counters);
    assert_eq!(
        counters.egress.dropped_for(Reason::Endpoint).packets,
        20_000
    );
    assert_eq!(
        counters.egress.dropped_for(Reason::Endpoint).bytes,
        20_000 * bad.len() as u64
    );
    assert_eq!(counters.egress.rx().packets, 20_001);
    assert!(counters.events_lost.packets > 0 && counters.events_lost.packets < 20_000);
    let arrived = soon(|| {
        arrivals
            .frames()
            .unwrap()
            .into_iter()
            .find(|f| udp_payload(&f.bytes).is_some())
    });
    assert_eq!(udp_payload(&arrived.unwrap().bytes), Some(&b"good"[..]));
}

#[test]
fn an_allowlist_of_any_length_is_in_force_when_the_call_returns() {
    let stage = Stage::new(Mode::Filtered);
    let consumer = format!("udp:{CONSUMER}:{CONSUMER_PORT}");
    let frame = to_consumer(b"judged at once");
    let (mut allowed, mut dropped) = (0, 0);
    // Each longer than what its slot has room for, so a new table takes its place.
    for count in [50_u32, 500, 5_000, 50_000] {
        let others = (0..count).map(|n| {
            let [_, a, b, c] = n.to_be_bytes();
            format!("udp:100.{}.{b}.{c}:51820", 64 + a).parse().unwrap()
        });
        let without: Vec<omerta_verdict::Endpoint> = others.collect();
        let mut with = without.clone();
        with.push(consumer.parse().unwrap());
        for (list, listed) in [(&with, true), (&without, false), (&with, true)] {
            stage.guarded(|guard| guard.replace(list));
            stage.tap.send(&frame).unwrap();
            if listed {
                allowed += 1;
            } else {
                dropped += 1;
            }
            assert_eq!(
                stage.guarded(Guard::counters).egress.allowed.packets,
                allowed
            );
            assert_eq!(stage.dropped(Direction::Egress, Reason::Endpoint), dropped);
        }
    }
}
