//! What the programs say of their own failures. Those of the kernel's helpers (no memory for a frame's
//! headers or for an answer) cannot be brought about here; a full ring can.

use std::time::Instant;

use omerta_dataplane::Guard;
use omerta_kernel_tests::*;
use omerta_verdict::Mode;

use crate::frames::{to_consumer, v4};
use crate::stage::{Stage, soon};

/// Of one failure, no more than one line is told in so many seconds.
const PERIOD_SECONDS: u64 = 10;

#[test]
fn a_full_ring_of_events_is_told_once_however_many_are_lost() {
    let stage = Stage::new(Mode::Filtered);
    let begun = Instant::now();
    let frame = v4(17, &udp(40000, 53, b"flood"));
    let full = soon(|| {
        (0..1000).for_each(|_| stage.tap.send(&frame).unwrap());
        let counters = stage.guarded(Guard::counters);
        (counters.events_lost.packets > counters.events_limited.packets + 50).then_some(())
    });
    full.expect("the ring is full");
    let lines = stage.guarded(Guard::diagnostics).read();
    let most = 1 + begun.elapsed().as_secs() / PERIOD_SECONDS;
    assert!((1..=most).contains(&(lines.len() as u64)), "{lines:?}");
    for told in &lines {
        assert_eq!(told.interface.as_deref(), Some("guest"));
        assert_eq!(
            told.line,
            "no room for the event of a frame: events are lost"
        );
    }
    // What has been read is told to nobody else.
    assert!(stage.guarded(Guard::diagnostics).read().is_empty());
}

#[test]
fn what_passes_or_is_dropped_as_it_should_be_says_nothing() {
    let stage = Stage::new(Mode::Filtered);
    stage.tap.send(&to_consumer(b"good")).unwrap();
    stage.tap.send(&v4(17, &udp(40000, 53, b"bad"))).unwrap();
    let judged = || stage.guarded(Guard::counters).egress.outcomes().packets;
    assert_eq!(soon(|| (judged() == 2).then_some(())), Some(()));
    assert!(stage.guarded(Guard::diagnostics).read().is_empty());
}
