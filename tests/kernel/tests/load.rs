//! What loading the programs costs.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Instant;

use omerta_dataplane::Programs;
use omerta_verdict::{Direction, Mode};

/// Linux 6.18 walks 25,000 (most of the time that an attach takes), and gives up at 1,000,000
/// (`BPF_COMPLEXITY_LIMIT_INSNS`); other kernels prune less.
const MOST_INSTRUCTIONS: u32 = 100_000;

#[test]
fn the_verifier_is_left_far_from_its_limit() {
    let start = Instant::now();
    let mut programs = Programs::load("load", Mode::Filtered).unwrap();
    let took = start.elapsed();
    for direction in Direction::ALL {
        let info = programs.program(direction).unwrap().info().unwrap();
        let verified = info.verified_instruction_count().unwrap();
        println!(
            "{}: {verified} instructions verified, {} translated, {} bytes of machine code",
            direction.word(),
            info.size_translated().unwrap() / 8,
            info.size_jitted(),
        );
        assert!(verified < MOST_INSTRUCTIONS);
    }
    println!("both loaded in {took:?}");
}
