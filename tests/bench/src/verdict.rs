//! `verdict`: the programs alone, on one frame, by `BPF_PROG_TEST_RUN`.

use anyhow::{Context, Result, bail};
use omerta_dataplane::{PolicyStore, Programs};
use omerta_kernel_tests::{
    CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, STRANGER, allowlist, config,
    ethernet, udp,
};
use omerta_verdict::{Direction, Mode};

use crate::kernel::{self, Kind};
use crate::report::Bench;
use crate::rounds::{Case, Rounds};

/// Runs in one measurement. The kernel gives whole nanoseconds, so the mean of many calls is used.
const REPEAT: u32 = 20_000;
const CALLS: u32 = 10;
pub const NEXT: i32 = -1;
const SHOT: i32 = 2;

pub fn loaded(mode: Mode) -> Result<Programs> {
    let programs = Programs::load("bench", mode)?;
    PolicyStore::of(&programs, "bench")?.commit(config(mode).policy("bench")?, &allowlist())?;
    Ok(programs)
}

/// Nanoseconds a run.
pub fn run(program: impl std::os::fd::AsFd, frame: &[u8], expected: i32) -> Result<f64> {
    let mut sum = 0.0;
    for _ in 0..CALLS {
        let (returned, nanoseconds) = kernel::test_run(&program, frame, REPEAT)?;
        if returned != expected {
            bail!("the program returned {returned}, not {expected}");
        }
        sum += nanoseconds;
    }
    Ok(sum / f64::from(CALLS))
}

pub fn judge(
    programs: &mut Programs,
    direction: Direction,
    frame: &[u8],
    expected: i32,
) -> Result<f64> {
    let program = programs.program(direction)?;
    run(
        program.fd().context("the program is not loaded")?,
        frame,
        expected,
    )
}

/// A guest's 64 byte frame to its consumer.
pub fn allowed_frame() -> Vec<u8> {
    let datagram = udp(40000, CONSUMER_PORT, &[0; 22]);
    let packet = Ipv4::new(GUEST, CONSUMER, 17).packet(&datagram);
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

/// The same under another's address.
pub fn forged_frame() -> Vec<u8> {
    let datagram = udp(40000, CONSUMER_PORT, &[0; 22]);
    let packet = Ipv4::new(STRANGER, CONSUMER, 17).packet(&datagram);
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

fn reply_frame() -> Vec<u8> {
    let datagram = udp(CONSUMER_PORT, 40000, &[0; 22]);
    let packet = Ipv4::new(CONSUMER, GUEST, 17).packet(&datagram);
    ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &packet)
}

pub fn measure(rounds: Rounds) -> Result<Bench> {
    let empty = kernel::constant(Kind::Classifier, NEXT)?;
    let (allowed, forged, reply) = (allowed_frame(), forged_frame(), reply_frame());
    let mut on_allowed = loaded(Mode::Filtered)?;
    let mut on_forged = loaded(Mode::Filtered)?;
    let mut on_reply = loaded(Mode::Filtered)?;
    let mut on_flow = loaded(Mode::Conntrack)?;
    let cases = vec![
        Case::new("empty", "empty", || run(&empty, &allowed, NEXT)),
        Case::new("egress-allow", "empty", || {
            judge(&mut on_allowed, Direction::Egress, &allowed, NEXT)
        }),
        Case::new("egress-drop-source", "empty", || {
            judge(&mut on_forged, Direction::Egress, &forged, SHOT)
        }),
        Case::new("egress-conntrack-hit", "empty", || {
            judge(&mut on_flow, Direction::Egress, &allowed, NEXT)
        }),
        Case::new("ingress-allow", "empty", || {
            judge(&mut on_reply, Direction::Ingress, &reply, NEXT)
        }),
    ];
    let samples = rounds.run(cases)?;
    Ok(Bench::of("verdict", "ns", &rounds, &samples, Vec::new()))
}
