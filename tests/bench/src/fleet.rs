//! `fleet`: what the counters and events of 1,000 guards cost who reads them, as a share of one core
//! where they are read every 15 seconds.
//!
//! Counters are read as omertad does for a scrape, by readers that it keeps; the text of the answer is
//! not in the figure. `counters-anew` opens each guard first, and looks how it stands, as who reads once does.
//! Every guard has dropped ten frames since the last scrape, and tells of each.

use std::time::Duration;

use anyhow::{Result, bail};
use nix::time::{ClockId, clock_gettime};
use omerta_dataplane::Guard;

use crate::many::{GUARDS, Host, send_in_turn};
use crate::report::Bench;
use crate::rounds::{Case, Rounds};
use crate::verdict::forged_frame;

const SCRAPE: Duration = Duration::from_secs(15);
/// Frames that each guard drops between two scrapes.
const DROPPED: usize = 10;

/// The share of one core, in percent, that `work` takes of this thread where it is done once a scrape.
fn share(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    work()?;
    let spent = Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)? - before);
    Ok(spent.as_secs_f64() / SCRAPE.as_secs_f64() * 100.0)
}

pub fn measure(rounds: Rounds, host: &Host) -> Result<Bench> {
    let frame = forged_frame();
    let names: Vec<_> = host.guarded().iter().map(|tap| tap.name()).collect();
    let samples = host.enter(|| -> Result<_> {
        let mut streams = Vec::with_capacity(GUARDS);
        let mut readers = Vec::with_capacity(GUARDS);
        for name in &names {
            let guard = Guard::open(name)?;
            streams.push(guard.events()?);
            readers.push(guard.counter_reader()?);
        }
        rounds.run(vec![
            Case::new("counters", "counters", || {
                share(|| {
                    for reader in &readers {
                        if !reader.is_current() {
                            bail!("a guard was exchanged");
                        }
                        reader.read()?;
                    }
                    Ok(())
                })
            }),
            Case::new("counters-anew", "counters", || {
                share(|| {
                    for name in &names {
                        Guard::open(name)?.counters()?;
                    }
                    Ok(())
                })
            }),
            Case::new("events", "counters", || {
                send_in_turn(host.guarded(), &frame, (GUARDS * DROPPED) as u32)?;
                let mut told = 0;
                let share = share(|| {
                    for stream in &mut streams {
                        while stream.next().is_some() {
                            told += 1;
                        }
                    }
                    Ok(())
                })?;
                if told != GUARDS * DROPPED {
                    bail!("{told} events of {} frames", GUARDS * DROPPED);
                }
                Ok(share)
            }),
        ])
    })??;
    Ok(Bench::of(
        "fleet",
        "% of a core",
        &rounds,
        &samples,
        Vec::new(),
    ))
}
