//! The kernel's verdict and the native one on the same bytes: outcome, reason, answer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::BTreeMap;

use aya::programs::{TestRun, TestRunOptions};
use omerta_dataplane::Programs;
use omerta_kernel_tests::{Generator, NEXT, Pair, SHOT, test_run_takes};
use omerta_verdict::{Direction, Mode, Reason, Verdict};

/// Unless `OMERTA_PARITY_FRAMES` says otherwise.
const FRAMES: u64 = 1_000_000;

fn frames() -> u64 {
    std::env::var("OMERTA_PARITY_FRAMES").map_or(FRAMES, |count| count.parse().unwrap())
}

/// Frames between two looks at what both guards remember.
const LOOK: u64 = 1000;

/// What came of some frames.
#[derive(Default)]
struct Outcomes {
    allowed: u64,
    answered: u64,
    dropped: BTreeMap<Reason, u64>,
}

impl Outcomes {
    fn of(&self, reason: Reason) -> u64 {
        self.dropped.get(&reason).copied().unwrap_or(0)
    }
}

/// Judges `count` frames of the stream `seed` twice, in both directions, while time passes.
fn frames_agree(name: &str, mut pair: Pair, count: u64, seed: u64) -> Outcomes {
    let mut generator = Generator::new(seed);
    let mut time = fastrand::Rng::with_seed(seed);
    let mut outcomes = Outcomes::default();
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
        if index.is_multiple_of(16) {
            pair.pass_time(&mut time).unwrap();
        }
        for direction in Direction::ALL {
            match pair.judge(direction, &frame) {
                Ok(Verdict::Allow) => outcomes.allowed += 1,
                Ok(Verdict::Answer(_)) => outcomes.answered += 1,
                Ok(Verdict::Drop(reason)) => *outcomes.dropped.entry(reason).or_default() += 1,
                Err(difference) => panic!(
                    "frame {index} of seed {seed}, {}: {difference}\n{frame:02x?}",
                    direction.word()
                ),
            }
        }
        if index.is_multiple_of(LOOK) || index == count {
            pair.compare_state()
                .unwrap_or_else(|difference| panic!("frame {index} of seed {seed}: {difference}"));
        }
    }
    let Outcomes {
        allowed,
        answered,
        dropped,
    } = &outcomes;
    println!(
        "{name}: {count} frames in both directions, 0 differences; {allowed} allowed, {answered} answered, {} reasons",
        dropped.len()
    );
    // A generator that never gets deep proves nothing.
    assert!(
        *allowed > count / 100 && *answered > count / 1000 && dropped.len() >= 18,
        "{dropped:?}"
    );
    outcomes
}

#[test]
fn kernel_and_native_agree_on_generated_frames() {
    let pair = Pair::new(Mode::Filtered).unwrap();
    frames_agree("filtered mode", pair, frames() * 4 / 10, 1);
}

#[test]
fn kernel_and_native_agree_in_direct_mode() {
    let pair = Pair::new(Mode::Direct).unwrap();
    let outcomes = frames_agree("direct mode", pair, frames() / 10, 2);
    assert_eq!(outcomes.of(Reason::Endpoint), 0);
}

#[test]
fn kernel_and_native_agree_in_sampled_mode() {
    for (random, judged) in [(0, true), (1, false), (32, true), (u32::MAX, false)] {
        let pair = Pair::sampled(random).unwrap();
        let name = format!("sampled mode, chance {random}");
        let outcomes = frames_agree(&name, pair, frames() / 40, 4 + u64::from(random));
        assert_eq!(outcomes.of(Reason::Endpoint) > 0, judged, "{random}");
    }
}

#[test]
fn kernel_and_native_agree_on_flows_that_earlier_frames_opened() {
    let pair = Pair::new(Mode::Conntrack).unwrap();
    let outcomes = frames_agree("conntrack mode", pair, frames() * 2 / 10, 5);
    let no_flow = outcomes.of(Reason::NoFlow);
    assert!(no_flow > 0 && no_flow < outcomes.allowed, "{no_flow}");
}

#[test]
fn kernel_and_native_agree_on_what_limits_let_through() {
    for (mode, seed) in [(Mode::Filtered, 6), (Mode::Conntrack, 7)] {
        let pair = Pair::limited(mode).unwrap();
        let name = format!("{} mode with limits", mode.word());
        let outcomes = frames_agree(&name, pair, frames() / 10, seed);
        let policed = outcomes.of(Reason::Policed);
        assert!(
            policed > outcomes.allowed / 100 && policed < 10 * outcomes.allowed,
            "{policed}"
        );
    }
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
    let dropped = (SHOT, Some(Reason::Fragment));
    assert_eq!(run(17, &datagram, 1000), dropped);
    assert_eq!(run(6, &tcp(40000, 443), 0), (NEXT, None));
    assert_eq!(run(6, &tcp(40000, 443), 1000), dropped);
}
