//! `capture`: a frame of 64 bytes that a guest sends, until a consumer in userspace has read it, 64 at a
//! time, in nanoseconds of the thread that does both.

use anyhow::Result;
use omerta_frames::{BackEnd, cost_ns};

use crate::report::Bench;
use crate::rounds::{Case, Rounds};

pub fn measure(rounds: Rounds) -> Result<Bench> {
    let mut missing = Vec::new();
    let mut cases = Vec::new();
    for (name, back_end) in [("recvmmsg", BackEnd::Recvmmsg), ("afxdp", BackEnd::AfXdp)] {
        match cost_ns(back_end) {
            Ok(_) => cases.push(Case::new(name, "recvmmsg", move || Ok(cost_ns(back_end)?))),
            Err(error) => missing.push(format!("{name}: {:#}", anyhow::Error::from(error))),
        }
    }
    let samples = rounds.run(cases)?;
    Ok(Bench::of("capture", "ns", &rounds, &samples, missing))
}
