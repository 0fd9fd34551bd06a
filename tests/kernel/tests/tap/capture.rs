//! A capture's judgement of real frames is the kernel's.

use omerta_dataplane::{Basis, Copies, Guard, Judgement, Observer};
use omerta_kernel_tests::*;
use omerta_test_support::Tap;
use omerta_verdict::{Direction, Mode, Outcome, Reason};

use crate::frames::{hostile, to_consumer};
use crate::stage::{Stage, soon};

struct Capture {
    copies: Copies,
    observer: Observer,
}

impl Capture {
    fn on(stage: &Stage) -> Self {
        let observer = stage.guarded(Guard::observe);
        let open = || Copies::open("guest", 65_535);
        let copies = stage.provider.enter(open).unwrap().unwrap();
        Self { copies, observer }
    }

    /// The frames that come soon, one at least, with what became of them.
    fn judged(&mut self) -> Vec<(Direction, Vec<u8>, Judgement)> {
        let Self { copies, observer } = self;
        let mut judged = Vec::new();
        let came = soon(|| {
            let read = copies.read(|frame| {
                let judgement = observer.judge(&frame).unwrap();
                judged.push((frame.direction, frame.bytes.to_vec(), judgement));
            });
            (read.unwrap() > 0).then_some(())
        });
        assert!(came.is_some(), "no frame was captured");
        judged
    }
}

#[test]
fn a_capture_judges_each_frame_as_the_kernel_does() {
    for mode in [Mode::Filtered, Mode::Conntrack] {
        let stage = Stage::new(mode);
        let mut capture = Capture::on(&stage);
        for (name, frame, reason) in hostile() {
            stage.tap.send(&frame).unwrap();
            let judged = capture.judged();
            assert_eq!(judged.len(), 1, "{name}: {judged:?}");
            assert_eq!(judged[0].2.outcome, Outcome::Dropped(reason), "{name}");
            let counted = soon(|| (stage.dropped(Direction::Egress, reason) > 0).then_some(()));
            assert!(counted.is_some(), "{name} was dropped for another reason");
        }
        stage.tap.send(&to_consumer(b"handshake")).unwrap();
        let judged = capture.judged();
        assert_eq!(judged[0].2.outcome, Outcome::Allowed);
        assert!(matches!(judged[0].2.basis, Basis::Native { epoch: 1, .. }));
        assert_eq!(judged[0].1, to_consumer(b"handshake"));
    }
}

#[test]
fn a_capture_follows_the_policy_and_ends_with_its_guard() {
    let stage = Stage::new(Mode::Filtered);
    let mut capture = Capture::on(&stage);
    stage.guarded(|guard| guard.revoke(&["udp:192.0.2.10:51820".parse().unwrap()]));
    stage.tap.send(&to_consumer(b"late")).unwrap();
    let (_, _, judgement) = capture.judged().remove(0);
    assert_eq!(judgement.outcome, Outcome::Dropped(Reason::Endpoint));
    assert!(matches!(judgement.basis, Basis::Native { epoch: 2, .. }));
    assert!(capture.observer.is_current());
    stage
        .provider
        .enter(|| {
            Guard::open("guest").unwrap().detach().unwrap();
            Guard::attach("guest", &config(Mode::Filtered)).map(drop)
        })
        .unwrap()
        .unwrap();
    assert!(!capture.observer.is_current());
}

#[test]
fn answers_are_told_apart_from_what_a_guest_forges() {
    let stage = Stage::new(Mode::Filtered);
    let mut capture = Capture::on(&stage);
    // The guest's question, and the guard's answer to it.
    let question = arp(1, (GUEST_MAC, GUEST), (GATEWAY_MAC, GATEWAY));
    let question = ethernet(GUEST_MAC, GATEWAY_MAC, 0x0806, &question);
    stage.tap.send(&question).unwrap();
    let judged = capture.judged();
    assert_eq!(judged[0].2.outcome, Outcome::Answered);
    let answer = judged
        .into_iter()
        .nth(1)
        .unwrap_or_else(|| capture.judged().remove(0));
    assert_eq!(
        (answer.0, answer.2.basis),
        (Direction::Ingress, Basis::Passed)
    );
    // What the guard answers in the guest's name enters as the guest's frames do.
    stage
        .provider
        .ip("neigh flush dev guest")
        .and_then(|()| {
            stage
                .provider
                .command("ping")
                .args(["-c1", "-W1", "10.77.0.2"])
                .status()
                .map(drop)
                .map_err(|e| panic!("{e}"))
        })
        .unwrap();
    let mut seen = Vec::new();
    let own = soon(|| {
        seen.extend(capture.judged());
        let own = |(_, _, judgement): &&(Direction, Vec<u8>, Judgement)| {
            judgement.basis == Basis::OwnAnswer
        };
        seen.iter().find(own).cloned()
    });
    let (direction, forged, judgement) = own.unwrap();
    assert_eq!(
        (direction, judgement.outcome),
        (Direction::Egress, Outcome::Answered)
    );
    // The same from the guest is no answer.
    stage.tap.send(&forged).unwrap();
    let judged = capture.judged();
    let dropped = judged
        .iter()
        .rfind(|(_, bytes, _)| *bytes == forged)
        .unwrap();
    assert!(
        matches!(dropped.2.outcome, Outcome::Dropped(_)),
        "{dropped:?}"
    );
}

#[test]
fn what_travels_beside_a_frame_is_judged_too() {
    let stage = Stage::with_tap(Mode::Filtered, || Tap::create_with_offload_header("guest"));
    let mut capture = Capture::on(&stage);
    let datagram = Ipv4::new(GUEST, CONSUMER, 17).packet(&udp(40000, CONSUMER_PORT, b"payload"));
    let frame = ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &datagram);
    // VIRTIO_NET_HDR_F_NEEDS_CSUM, from the UDP header on: into its own field, and into its port.
    for (offset, outcome) in [
        (6_u16, Outcome::Allowed),
        (2, Outcome::Dropped(Reason::ChecksumOffload)),
    ] {
        let mut sent = vec![1, 0];
        for number in [42, 0, 34, offset] {
            sent.extend(u16::to_ne_bytes(number));
        }
        sent.extend(&frame);
        stage.tap.send(&sent).unwrap();
        assert_eq!(capture.judged()[0].2.outcome, outcome, "{offset}");
    }
}

#[test]
fn a_capture_that_falls_behind_tells_how_many_frames_it_lost() {
    let stage = Stage::new(Mode::Filtered);
    let mut capture = Capture::on(&stage);
    let frame = to_consumer(&[0; 1200]);
    let sent = 30_000;
    for _ in 0..sent {
        stage.tap.send(&frame).unwrap();
    }
    let mut read = 0;
    while capture
        .copies
        .read(|frame| read += u64::from(frame.direction == Direction::Egress))
        .unwrap()
        > 0
    {}
    let lost = capture.copies.lost().unwrap();
    assert!(lost > 0);
    assert_eq!(read + lost, sent);
}
