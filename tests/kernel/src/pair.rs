//! One guard twice: in the kernel, by `BPF_PROG_TEST_RUN`, and natively.

use aya::programs::{TestRun, TestRunOptions};
use omerta_dataplane::{EventStream, GuardError, PolicyStore, Programs};
use omerta_verdict::{
    ANSWER_CAPACITY, Bucket, Direction, EVENT_FRAME_BYTES, FixedInputs, MemoryGuard, Mode, Policy,
    Table, Verdict, egress, ingress,
};

use crate::{allowlist, config};

/// `TCX_NEXT`.
pub const NEXT: u32 = -1_i32 as u32;
/// `TC_ACT_SHOT`.
pub const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

/// The guest's guard, in the kernel and in memory, with one policy.
pub struct Pair {
    /// The kernel's programs, attached to nothing.
    pub programs: Programs,
    /// Their events.
    pub events: EventStream,
    policy: Policy,
    buckets: Vec<Bucket>,
    out: Vec<u8>,
}

/// Clock and chance of both.
const FIXED: FixedInputs = FixedInputs {
    now_ns: 1,
    random: 0,
    padding: 0,
};

impl Pair {
    /// Both guards in `mode`, with the guest's allowlist.
    ///
    /// # Errors
    /// Where the kernel does not take the programs, or without root.
    pub fn new(mode: Mode) -> Result<Self, GuardError> {
        let mut programs = Programs::load_with("parity", mode, FIXED)?;
        let policy = {
            let mut store = PolicyStore::of(&mut programs, "parity")?;
            store.commit(
                Policy {
                    rates: Default::default(),
                    ..config(mode).policy("guest")?
                },
                &allowlist(),
            )?;
            store.policy()?
        };
        let mut buckets = vec![Bucket::EMPTY; policy.table_mask as usize + 1];
        let placed = Table::new(&mut buckets, policy.table_seed)
            .is_some_and(|mut table| allowlist().iter().all(|endpoint| table.insert(endpoint)));
        if !placed {
            return Err(GuardError::Config {
                problem: "the kernel's table took what the native one does not".to_owned(),
            });
        }
        let events = programs.take_events()?;
        Ok(Self {
            programs,
            events,
            policy,
            buckets,
            out: vec![0; 1 << 16],
        })
    }

    /// The native verdict.
    pub fn native(&self, direction: Direction, frame: &[u8]) -> Verdict {
        let guard = MemoryGuard::new(&self.policy, &self.buckets);
        match direction {
            Direction::Egress => egress(frame, &guard),
            Direction::Ingress => ingress(frame, &guard),
        }
    }

    /// How the kernel's verdict differs from the native one: outcome, reason, event, answer.
    pub fn differs(&mut self, direction: Direction, frame: &[u8]) -> Option<String> {
        let native = self.native(direction, frame);
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut self.out),
            ..TestRunOptions::new()
        };
        let program = self.programs.program(direction);
        let result = match program.map(|program| program.test_run(options)) {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => return Some(format!("TEST_RUN fails: {error:?}")),
            Err(error) => return Some(format!("no program: {error:?}")),
        };
        let out = self
            .out
            .get(..result.data_size_out as usize)
            .unwrap_or_default();
        match (native, result.return_value, self.events.next()) {
            (Verdict::Allow, NEXT, None) => {
                (out != frame).then(|| "an allowed frame was changed".into())
            }
            (Verdict::Drop(reason), SHOT, Some(event)) => {
                let same = event.reason == reason
                    && event.direction == direction
                    && event.length as usize == frame.len()
                    && frame.get(..frame.len().min(EVENT_FRAME_BYTES)) == Some(&event.head);
                (!same).then(|| format!("native drop {reason}, kernel {event:?}"))
            }
            (Verdict::Answer(answer), REDIRECT, None) => {
                let mut expected = [0; ANSWER_CAPACITY];
                answer.compose(&mut expected);
                (Some(out) != expected.get(..answer.length()))
                    .then(|| format!("answers differ: {out:02x?}"))
            }
            (native, code, event) => Some(format!(
                "native {native:?}, kernel returned {code} with {event:?}"
            )),
        }
    }
}

/// Whether Linux takes a frame for TEST_RUN: neither an IP frame without a whole IP header, nor an
/// Ethernet header alone (bpf_prog_test_run_skb in net/bpf/test_run.c).
pub fn test_run_takes(frame: &[u8]) -> bool {
    let shortest = match frame.get(12..14) {
        Some([0x08, 0x00]) => 34,
        Some([0x86, 0xdd]) => 54,
        _ => 15,
    };
    frame.len() >= shortest
}
