//! The kernel's verdict and the native one on the same bytes: outcome, reason, answer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use aya::programs::{TestRun, TestRunOptions};
use omerta_dataplane::Programs;
use omerta_kernel_tests::{Generator, NEXT, Pair, SHOT, test_run_takes};
use omerta_verdict::{Direction, Mode, Verdict};

/// Unless `OMERTA_PARITY_FRAMES` says otherwise.
const FRAMES: u64 = 1_000_000;

fn frames() -> u64 {
    std::env::var("OMERTA_PARITY_FRAMES").map_or(FRAMES, |count| count.parse().unwrap())
}

fn frames_agree(mode: Mode, count: u64, seed: u64) {
    let mut pair = Pair::new(mode).unwrap();
    let mut generator = Generator::new(seed);
    let (mut allowed, mut answered, mut reasons) = (0, 0, std::collections::BTreeSet::new());
    let mut index = 0;
    while index < count {
        let frame = generator.frame();
        if !test_run_takes(&frame) {
            for direction in Direction::ALL {
                assert!(
                    matches!(pair.native(direction, &frame), Verdict::Drop(_)),
                    "{frame:02x?}"
                );
            }
            continue;
        }
        index += 1;
        for direction in Direction::ALL {
            if let Some(difference) = pair.differs(direction, &frame) {
                panic!(
                    "frame {index} of seed {seed}, {}: {difference}\n{frame:02x?}",
                    direction.word()
                );
            }
            match pair.native(direction, &frame) {
                Verdict::Allow => allowed += 1,
                Verdict::Answer(_) => answered += 1,
                Verdict::Drop(reason) => {
                    reasons.insert(reason);
                }
            }
        }
    }
    println!(
        "{} mode: {count} frames in both directions, 0 differences; {allowed} allowed, {answered} answered, {} reasons",
        mode.word(),
        reasons.len()
    );
    // A generator that never gets deep proves nothing.
    assert!(
        allowed > count / 100 && answered > count / 1000 && reasons.len() >= 18,
        "{reasons:?}"
    );
}

#[test]
fn kernel_and_native_agree_on_generated_frames() {
    frames_agree(Mode::Filtered, frames() * 7 / 10, 1);
}

#[test]
fn kernel_and_native_agree_in_direct_mode() {
    frames_agree(Mode::Direct, frames() * 2 / 10, 2);
}

#[test]
fn kernel_and_native_agree_in_sampled_mode() {
    frames_agree(Mode::Sampled, frames() / 10, 4);
}

#[test]
fn a_guard_without_policy_drops_everything() {
    let mut programs = Programs::load("parity", Mode::Filtered).unwrap();
    let mut generator = Generator::new(3);
    for _ in 0..1000 {
        let frame = generator.frame();
        if !test_run_takes(&frame) {
            continue;
        }
        for direction in Direction::ALL {
            let options = TestRunOptions {
                data_in: Some(&frame),
                ..TestRunOptions::new()
            };
            let result = programs
                .program(direction)
                .unwrap()
                .test_run(options)
                .unwrap();
            assert_eq!(result.return_value, SHOT);
        }
    }
}

/// `struct __sk_buff` (include/uapi/linux/bpf.h) with nothing set but `gso_size`.
fn context_with_segments_of(bytes: u32) -> [u8; 192] {
    const GSO_SIZE: usize = 176;
    let mut context = [0; 192];
    context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&bytes.to_ne_bytes());
    context
}

/// TEST_RUN sets no `gso_type`.
#[test]
fn what_the_host_is_to_cut_into_it_is_not_known_is_dropped() {
    use omerta_kernel_tests::{
        CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, ethernet, tcp, udp,
    };
    let mut pair = Pair::new(Mode::Filtered).unwrap();
    let mut run = |protocol, payload: &[u8], segment| {
        let packet = Ipv4::new(GUEST, CONSUMER, protocol).packet(payload);
        let frame = ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet);
        let context = context_with_segments_of(segment);
        let options = TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let program = pair.programs.program(Direction::Egress).unwrap();
        let code = program.test_run(options).unwrap().return_value;
        (code, pair.events.next().map(|event| event.reason))
    };
    let datagram = udp(40000, CONSUMER_PORT, &[0xaa; 1200]);
    assert_eq!(run(17, &datagram, 0), (NEXT, None));
    let dropped = (SHOT, Some(omerta_verdict::Reason::Fragment));
    assert_eq!(run(17, &datagram, 1000), dropped);
    assert_eq!(run(6, &tcp(40000, 443), 0), (NEXT, None));
    assert_eq!(run(6, &tcp(40000, 443), 1000), dropped);
}
