//! What loading the programs costs.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Instant;

use aya::util::KernelVersion;
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

/// `bpf_rdonly_cast` is there since Linux 6.2; only a just-in-time compiler takes calls of the kernel's
/// own functions.
#[test]
fn reads_are_in_place_where_the_kernel_can_have_them_so_and_calls_elsewhere() {
    let compiles = std::fs::read_to_string("/proc/sys/net/core/bpf_jit_enable");
    let compiles = compiles.is_ok_and(|enabled| enabled.trim() != "0");
    let casts = KernelVersion::current().unwrap() >= KernelVersion::new(6, 2, 0);
    let programs = Programs::load("load", Mode::Filtered).unwrap();
    let word = if programs.reads_in_place() {
        "loads, in place"
    } else {
        "helpers' calls"
    };
    println!("the programs read the kernel's structures by {word}");
    assert_eq!(programs.reads_in_place(), casts && compiles);
}
