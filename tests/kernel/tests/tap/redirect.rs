//! What passes the host's stack by is what the guard has allowed, and it arrives as if the stack had
//! forwarded it.

use std::time::Duration;

use aya::programs::links::PinnedLink;
use omerta_dataplane::{Guard, Hook, RedirectStatus};
use omerta_kernel_tests::*;
use omerta_test_support::Capture;
use omerta_verdict::{Direction, Mode, Reason};

use crate::stage::{SETTLE, Stage, WORLD_MAC, soon, udp_payload};

/// More than one tick of any kernel's.
const TICKS: Duration = Duration::from_millis(50);

/// Redirecting needs TCX.
fn redirecting(peers: &[&str]) -> Option<Stage> {
    if !hooks().unwrap().contains(&Hook::Tcx) {
        return None;
    }
    let stage = Stage::new(Mode::Filtered);
    stage.guarded(|guard| guard.redirect(peers));
    Some(stage)
}

fn status(stage: &Stage) -> RedirectStatus {
    stage.guarded(Guard::status).redirect.unwrap()
}

fn packet(ttl: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = Ipv4::new(GUEST, CONSUMER, 17);
    header.ttl = ttl;
    header.packet(&udp(40000, CONSUMER_PORT, payload))
}

fn send(stage: &Stage, packet: &[u8]) {
    let frame = ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, packet);
    stage.tap.send(&frame).unwrap();
}

/// The one frame with `payload` that arrives.
#[track_caller]
fn arrival(arrivals: &Capture, payload: &[u8]) -> Vec<u8> {
    soon(|| {
        let frames = arrivals.frames().unwrap().into_iter();
        let mut frames = frames.map(|frame| frame.bytes);
        frames.find(|bytes| udp_payload(bytes).is_some_and(|p| p.starts_with(payload)))
    })
    .expect("it does not arrive")
}

/// As the stack forwards it: another time to live, the checksum fitting, and the neighbour's MAC.
#[track_caller]
fn is_forwarded(frame: &[u8], sent: &[u8]) {
    assert_eq!(frame[..6], WORLD_MAC.0);
    assert_eq!(frame[14 + 8], sent[8] - 1);
    assert_eq!(checksum(&frame[14..34]), 0);
    assert_eq!(frame[34..14 + sent.len()], sent[20..]);
}

#[test]
fn an_allowed_frame_is_redirected_and_arrives_as_a_forwarded_one() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    let arrivals = stage.arrivals();
    for (count, ttl) in [(1, 64), (2, 2), (3, 255)] {
        let packet = packet(ttl, &[ttl]);
        send(&stage, &packet);
        is_forwarded(&arrival(&arrivals, &[ttl]), &packet);
        let status = status(&stage);
        assert!(status.in_force);
        assert_eq!(
            (status.to_neighbours, status.to_stack, status.unproven),
            (count, 0, 0)
        );
    }
    let counters = stage.guarded(Guard::counters);
    assert_eq!(counters.egress.allowed.packets, 3);
    assert_eq!(counters.egress.rx().packets, 3);
}

#[test]
fn a_veths_peer_in_another_namespace_is_handed_frames() {
    let Some(stage) = redirecting(&["uplink"]) else {
        return;
    };
    let arrivals = stage.arrivals();
    for payload in 0..3 {
        let packet = packet(64, &[payload]);
        send(&stage, &packet);
        is_forwarded(&arrival(&arrivals, &[payload]), &packet);
    }
    let status = status(&stage);
    // The first asks the neighbour table, and whichever is the first of another moment.
    assert_eq!(status.to_neighbours + status.to_peers, 3);
    assert_eq!((status.to_stack, status.unproven), (0, 0));
}

#[test]
fn a_dropped_frame_never_reaches_the_redirection() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    let arrivals = stage.arrivals();
    let frame = Ipv4::new(GUEST, STRANGER, 17).packet(&udp(40000, CONSUMER_PORT, b"rogue"));
    send(&stage, &frame);
    soon(|| (stage.dropped(Direction::Egress, Reason::Endpoint) == 1).then_some(())).unwrap();
    std::thread::sleep(SETTLE);
    assert!(arrivals.frames().unwrap().is_empty());
    let status = status(&stage);
    let all = status.to_neighbours + status.to_peers + status.to_stack + status.unproven;
    assert_eq!(all, 0);
}

#[test]
fn what_the_stack_answers_is_left_to_the_stack() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    let left = |count| {
        let status = status(&stage);
        assert_eq!((status.to_stack, status.unproven), (count, 0));
        assert_eq!(status.to_neighbours, 0);
    };
    // At the end of its life.
    send(&stage, &packet(1, b"last hop"));
    left(1);
    // Longer than the way allows, and not to be cut.
    stage.provider.ip("link set uplink mtu 1000").unwrap();
    send(&stage, &packet(64, &[0; 1200]));
    left(2);
    stage.provider.ip("link set uplink mtu 1500").unwrap();
    // No route, and then no neighbour.
    stage.provider.ip("route del default").unwrap();
    send(&stage, &packet(64, b"no route"));
    left(3);
    stage
        .provider
        .ip("route add default via 203.0.113.8")
        .unwrap();
    send(&stage, &packet(64, b"no neighbour"));
    left(4);
    // A host that does not forward.
    stage
        .provider
        .ip("route replace default via 203.0.113.9")
        .unwrap();
    stage
        .provider
        .set("/proc/sys/net/ipv4/conf/guest/forwarding", "0")
        .unwrap();
    send(&stage, &packet(64, b"not forwarded"));
    left(5);
}

/// A way is looked up once a tick of the kernel's for frames that are alike.
#[test]
fn a_way_that_was_found_is_kept_for_no_other_frame_and_not_for_long() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    stage.provider.ip("link set uplink mtu 1000").unwrap();
    // As fast as they can be sent, so mostly within a tick: too long for the way that was found, and
    // at the end of its life.
    const ROUNDS: u64 = 200;
    for _ in 0..ROUNDS {
        send(&stage, &packet(64, b"short"));
        send(&stage, &packet(64, &[0; 1200]));
        send(&stage, &packet(64, &[0; 900]));
        send(&stage, &packet(1, b"last hop"));
    }
    let counted = status(&stage);
    assert_eq!((counted.to_neighbours, counted.unproven), (2 * ROUNDS, 0));
    assert_eq!(counted.to_stack, 2 * ROUNDS);

    // A route that goes, and one to elsewhere that comes, are followed.
    stage.provider.ip("route del default").unwrap();
    std::thread::sleep(TICKS);
    send(&stage, &packet(64, b"no route"));
    assert_eq!(status(&stage).to_stack, counted.to_stack + 1);
    stage
        .provider
        .ip("route add default via 203.0.113.9")
        .unwrap();
    send(&stage, &packet(64, b"again"));
    assert_eq!(status(&stage).to_neighbours, counted.to_neighbours + 1);
    let blackhole = format!("route add blackhole {CONSUMER}/32");
    stage.provider.ip(&blackhole).unwrap();
    std::thread::sleep(TICKS);
    send(&stage, &packet(64, b"to nowhere"));
    assert_eq!(status(&stage).to_neighbours, counted.to_neighbours + 1);
}

#[test]
fn a_wrong_header_checksum_is_left_to_the_stack_which_drops_it() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    let arrivals = stage.arrivals();
    let mut wrong = packet(64, b"wrong");
    wrong[10] ^= 1;
    send(&stage, &wrong);
    std::thread::sleep(SETTLE);
    assert!(arrivals.frames().unwrap().is_empty());
    assert_eq!(status(&stage).to_stack, 1);
}

#[test]
fn nothing_is_redirected_once_the_guard_is_cut_off() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    let arrivals = stage.arrivals();
    send(&stage, &packet(64, b"judged"));
    arrival(&arrivals, b"judged");
    let inode = stage.provider.inode().unwrap();
    let pins = format!("/sys/fs/bpf/omerta/{inode}/guest");
    let map = aya::maps::MapData::from_pin(format!("{pins}/REDIRECTED")).unwrap();
    let unproven = || -> u64 {
        const WORDS: usize = 12;
        let rows: aya::maps::PerCpuArray<_, [u64; WORDS]> = aya::maps::Map::PerCpuArray(
            aya::maps::MapData::from_id(map.info().unwrap().id()).unwrap(),
        )
        .try_into()
        .unwrap();
        let rows = rows.get(&0, 0).unwrap();
        rows.iter().map(|row| row[WORDS - 2]).sum()
    };
    assert_eq!(unproven(), 0);
    // The egress link goes; the redirection stays, as no command would leave it.
    let link = PinnedLink::from_pin(format!("{pins}/link_egress")).unwrap();
    drop(link.unpin().unwrap());
    for count in 1..=3 {
        soon(|| {
            send(&stage, &packet(64, b"unjudged"));
            (unproven() >= count).then_some(())
        })
        .expect("it was redirected without a judgement");
    }
    stage
        .provider
        .enter(|| Guard::remove_stale("guest", None))
        .unwrap()
        .unwrap();
    assert!(goes(&pins));
}

#[test]
fn redirecting_ends_when_it_is_told_to_and_with_the_guard() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    // Again, by who changes the peers.
    stage.guarded(|guard| guard.redirect(&["uplink"]));
    assert!(status(&stage).in_force);
    stage.guarded(Guard::stop_redirecting);
    assert_eq!(stage.guarded(Guard::status).redirect, None);
    let arrivals = stage.arrivals();
    send(&stage, &packet(64, b"by the stack"));
    arrival(&arrivals, b"by the stack");
    stage.guarded(|guard| guard.redirect(&[]));
    stage
        .provider
        .enter(|| Guard::open("guest").and_then(Guard::detach))
        .unwrap()
        .unwrap();
    let inode = stage.provider.inode().unwrap();
    let pins = format!("/sys/fs/bpf/omerta/{inode}/guest");
    assert!(goes(&pins));
}

#[test]
fn where_the_host_does_not_route_for_the_guest_redirecting_is_refused() {
    let Some(stage) = redirecting(&[]) else {
        return;
    };
    stage.guarded(Guard::stop_redirecting);
    stage
        .provider
        .ip("link set guest address 52:54:00:00:00:77")
        .unwrap();
    let refused = stage
        .provider
        .enter(|| Guard::open("guest").and_then(|guard| guard.redirect(&[])))
        .unwrap();
    assert!(refused.unwrap_err().to_string().contains("route"));
}
