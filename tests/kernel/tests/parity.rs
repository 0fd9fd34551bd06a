//! The kernel's verdict and the native one on the same bytes: outcome, reason, answer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use aya::programs::{TestRun, TestRunOptions};
use omerta_dataplane::{EventStream, PolicyStore, Programs};
use omerta_kernel_tests::{Generator, allowlist, config};
use omerta_verdict::{
    ANSWER_CAPACITY, Bucket, Direction, EVENT_FRAME_BYTES, MemoryGuard, Mode, Policy, Table,
    Verdict, egress, ingress,
};

/// Unless `OMERTA_PARITY_FRAMES` says otherwise.
const FRAMES: u64 = 100_000;
const NEXT: u32 = -1_i32 as u32;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

struct Pair {
    programs: Programs,
    events: EventStream,
    policy: Policy,
    buckets: Vec<Bucket>,
}

impl Pair {
    fn new(mode: Mode) -> Self {
        let mut programs = Programs::load("parity", mode).unwrap();
        let policy = {
            let mut store = PolicyStore::of(&mut programs, "parity").unwrap();
            store
                .commit(config(mode).policy("guest").unwrap(), &allowlist())
                .unwrap();
            store.policy().unwrap()
        };
        let mut buckets = vec![Bucket::EMPTY; policy.table_mask as usize + 1];
        let mut table = Table::new(&mut buckets, policy.table_seed).unwrap();
        for endpoint in allowlist() {
            assert!(table.insert(&endpoint));
        }
        let events = programs.take_events().unwrap();
        Self {
            programs,
            events,
            policy,
            buckets,
        }
    }

    fn native(&self, direction: Direction, frame: &[u8]) -> Verdict {
        let guard = MemoryGuard {
            policy: &self.policy,
            buckets: &self.buckets,
            random: 0,
            flows_have_room: true,
            live_flows: &[],
        };
        match direction {
            Direction::Egress => egress(frame, &guard),
            Direction::Ingress => ingress(frame, &guard),
        }
    }

    /// The kernel's verdict, or what differs from the native one.
    fn differs(&mut self, direction: Direction, frame: &[u8]) -> Option<String> {
        let native = self.native(direction, frame);
        let mut out = vec![0; frame.len().max(ANSWER_CAPACITY) + 64];
        let result = self
            .programs
            .program(direction)
            .unwrap()
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ..TestRunOptions::new()
            })
            .unwrap_or_else(|error| panic!("{error:?} {} {frame:02x?}", frame.len()));
        let event = self.events.next();
        match (native, result.return_value, event) {
            (Verdict::Allow, NEXT, None) => (out[..result.data_size_out as usize] != *frame)
                .then(|| "an allowed frame was changed".into()),
            (Verdict::Drop(reason), SHOT, Some(event)) => {
                let same = event.reason == reason
                    && event.direction == direction
                    && event.length as usize == frame.len()
                    && event.head == frame[..frame.len().min(EVENT_FRAME_BYTES)];
                (!same).then(|| format!("native drop {reason}, kernel {event:?}"))
            }
            (Verdict::Answer(answer), REDIRECT, None) => {
                let mut expected = [0; ANSWER_CAPACITY];
                answer.compose(&mut expected);
                let kernel = &out[..result.data_size_out as usize];
                (*kernel != expected[..answer.length()])
                    .then(|| format!("answers differ: {kernel:02x?}"))
            }
            (native, code, event) => Some(format!(
                "native {native:?}, kernel returned {code} with {event:?}"
            )),
        }
    }
}

/// Linux refuses to TEST_RUN an IP frame without a whole IP header, or an Ethernet header alone
/// (bpf_prog_test_run_skb in net/bpf/test_run.c). Real taps carry those frames in `tap/`.
fn test_run_takes(frame: &[u8]) -> bool {
    frame.len()
        >= match frame[12..14] {
            [0x08, 0x00] => 34,
            [0x86, 0xdd] => 54,
            _ => 15,
        }
}

fn frames() -> u64 {
    std::env::var("OMERTA_PARITY_FRAMES").map_or(FRAMES, |count| count.parse().unwrap())
}

fn frames_agree(mode: Mode, count: u64, seed: u64) {
    let mut pair = Pair::new(mode);
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
    frames_agree(Mode::Filtered, frames(), 1);
}

#[test]
fn kernel_and_native_agree_in_direct_mode() {
    frames_agree(Mode::Direct, frames() / 10, 2);
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

/// A guest's offload header may ask the host to cut UDP into IP fragments after the verdict.
#[test]
fn udp_that_the_host_is_asked_to_cut_is_dropped() {
    use omerta_kernel_tests::{
        CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, ethernet, tcp, udp,
    };
    let mut pair = Pair::new(Mode::Filtered);
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
    assert_eq!(run(6, &tcp(40000, 443), 1000), (NEXT, None));
}
