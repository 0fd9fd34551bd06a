//! `scale`: one frame of 64 bytes from one of 1, 100 or 1,000 guarded taps, in turn, and from as many
//! without a guard, in nanoseconds of the sending thread; and what a guard more takes, in time and
//! memory. `shared` is the floor of any design: one program with one policy judges all of those taps, so
//! that what grows is the host's own work for a tap more.

use anyhow::{Result, bail};
use omerta_dataplane::Guard;
use omerta_test_support::Tap;

use crate::many::{GUARDS, Host, send_in_turn};
use crate::report::Bench;
use crate::rounds::{Case, Rounds, Samples};
use crate::verdict::allowed_frame;

/// Frames in one measurement.
const FRAMES: u32 = 20_000;

/// All guards stay attached in every case: a case is how many of them send.
///
/// (row, row of which it is a multiple, taps of the kind, taps that send)
const CASES: [(&str, &str, Kind, usize); 9] = [
    ("taps-1", "taps-1", Host::guarded, 1),
    ("taps-100", "taps-1", Host::guarded, 100),
    ("taps-1000", "taps-1", Host::guarded, 1_000),
    ("open-1", "open-1", Host::open, 1),
    ("open-100", "open-1", Host::open, 100),
    ("open-1000", "open-1", Host::open, 1_000),
    ("shared-1", "shared-1", Host::shared, 1),
    ("shared-100", "shared-1", Host::shared, 100),
    ("shared-1000", "shared-1", Host::shared, 1_000),
];

type Kind = fn(&Host) -> &[Tap];

pub fn measure(rounds: Rounds, host: &Host) -> Result<Vec<Bench>> {
    let frame = allowed_frame();
    let cases = CASES.map(|(name, against, kind, count)| {
        let (taps, frame) = (&kind(host)[..count], &frame);
        Case::new(name, against, move || send_in_turn(taps, frame, FRAMES))
    });
    let samples = rounds.run(cases.into())?;
    let allowed = host.enter(|| -> Result<u64> {
        let counters = Guard::open(host.guarded()[0].name())?.counters()?;
        Ok(counters.egress.allowed.packets)
    })??;
    if allowed < u64::from(FRAMES * rounds.count()) {
        bail!("the first guard let {allowed} frames pass, which is too few");
    }
    let one = |name, figures| {
        vec![Samples {
            name,
            against: name,
            figures,
        }]
    };
    let kibibytes = host.attached().bytes / 1024.0 / GUARDS as f64;
    let load = one("attach", host.attached().milliseconds.clone());
    let memory = one("guard", vec![kibibytes]);
    let of_guards = Rounds::new("scale", GUARDS as u32, &[]);
    let once = Rounds::new("scale", 1, &[]);
    Ok(vec![
        Bench::of("scale", "ns", &rounds, &samples, Vec::new()),
        Bench::of("scale-load", "ms", &of_guards, &load, Vec::new()),
        Bench::of("scale-memory", "KiB", &once, &memory, Vec::new()),
    ])
}
