//! `capture`: a frame of 64 bytes that a guest sends, until a consumer in userspace has read it, 64 at a
//! time, in nanoseconds of the thread that does both; and the way of such a frame through a guarded tap
//! to the uplink, without and with a capture of it, in nanoseconds of the sending thread. `capture-kept`:
//! how much of what is sent as fast as it goes such a capture gets, in per cent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use omerta_dataplane::{Copies, Guard, Observer};
use omerta_frames::{BackEnd, cost_ns};
use omerta_kernel_tests::CONSUMER;
use omerta_verdict::{Direction, Outcome};

use crate::network::{Filter, Lane, PLAIN, Way};
use crate::report::Bench;
use crate::rounds::{Case, Rounds};
use crate::tap::small;

/// Frames in one measurement.
const FRAMES: u32 = 20_000;

pub fn measure(rounds: Rounds) -> Result<Vec<Bench>> {
    let lane = Lane::new(Filter::Guard, Way::Uplink)?;
    let frame = small(CONSUMER);
    let send = || lane.send(&PLAIN, &frame, FRAMES, true);
    let mut missing = Vec::new();
    let mut cases = Vec::new();
    for (name, back_end) in [("recvmmsg", BackEnd::Recvmmsg), ("afxdp", BackEnd::AfXdp)] {
        match cost_ns(back_end) {
            Ok(_) => cases.push(Case::new(name, "recvmmsg", move || Ok(cost_ns(back_end)?))),
            Err(error) => missing.push(format!("{name}: {:#}", anyhow::Error::from(error))),
        }
    }
    cases.push(Case::new("guarded", "guarded", send));
    cases.push(Case::new("guarded-captured", "guarded", || {
        Ok(captured(&lane, send)?.0)
    }));
    let samples = rounds.run(cases)?;
    let kept = rounds.at_most("capture-kept", rounds.count());
    let kept_samples = kept.run(vec![Case::new("flood", "flood", || {
        let (_, kept) = captured(&lane, send)?;
        Ok(100.0 * kept as f64 / f64::from(FRAMES))
    })])?;
    Ok(vec![
        Bench::of("capture", "ns", &rounds, &samples, missing),
        Bench::of("capture-kept", "%", &kept, &kept_samples, Vec::new()),
    ])
}

/// What `send` measures while a thread captures and judges what is sent, and how many frames that got.
fn captured(lane: &Lane, send: impl Fn() -> Result<f64>) -> Result<(f64, u64)> {
    let (mut observer, mut copies) = lane.capture()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = read(scope, &mut observer, &mut copies, &over);
        let figure = send();
        over.store(true, Ordering::Release);
        let kept = reader.join().ok().context("the capture broke off")??;
        Ok((figure?, kept))
    })
}

fn read<'scope>(
    scope: &'scope Scope<'scope, '_>,
    observer: &'scope mut Observer,
    copies: &'scope mut Copies,
    over: &'scope AtomicBool,
) -> ScopedJoinHandle<'scope, Result<u64>> {
    scope.spawn(move || {
        let mut kept = 0;
        loop {
            let ends = over.load(Ordering::Acquire);
            let frames = copies.read(|frame| {
                let judged = observer.judge(&frame);
                let allowed = judged.is_ok_and(|judged| judged.outcome == Outcome::Allowed);
                kept += u64::from(allowed && frame.direction == Direction::Egress);
            })?;
            match (frames, ends) {
                (0, true) => return Ok(kept),
                (0, false) => thread::sleep(Duration::from_micros(50)),
                _ => {}
            }
        }
    })
}

impl Lane {
    /// A capture of the guest's tap, which is guarded.
    fn capture(&self) -> Result<(Observer, Copies)> {
        self.enter(|| {
            let observer = Guard::open("guest")?.observe()?;
            Ok((observer, Copies::open("guest", 65_535)?))
        })
    }
}
