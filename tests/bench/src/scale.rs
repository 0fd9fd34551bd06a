//! `scale`: one frame of 64 bytes from one of 1, 100 or 1,000 guarded taps, in turn, and from as many
//! without a guard, in nanoseconds of the sending thread; and what a guard more takes, in time and
//! memory.

use anyhow::{Result, bail};
use omerta_dataplane::Guard;

use crate::many::{GUARDS, Host, send_in_turn};
use crate::report::Bench;
use crate::rounds::{Case, Rounds, Samples};
use crate::verdict::allowed_frame;

/// Frames in one measurement.
const FRAMES: u32 = 20_000;

/// All guards stay attached in every case: a case is how many of them send.
///
/// (row, row of which it is a multiple, taps that send, guarded)
const CASES: [(&str, &str, usize, bool); 6] = [
    ("taps-1", "taps-1", 1, true),
    ("taps-100", "taps-1", 100, true),
    ("taps-1000", "taps-1", 1_000, true),
    ("open-1", "open-1", 1, false),
    ("open-100", "open-1", 100, false),
    ("open-1000", "open-1", 1_000, false),
];

pub fn measure(rounds: Rounds, host: &Host) -> Result<Vec<Bench>> {
    let frame = allowed_frame();
    let cases = CASES.map(|(name, against, count, guarded)| {
        let taps = if guarded { host.guarded() } else { host.open() };
        let (taps, frame) = (&taps[..count], &frame);
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
