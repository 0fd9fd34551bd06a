//! One guard twice: in the kernel, by `BPF_PROG_TEST_RUN`, and natively.

use aya::programs::{TestRun, TestRunOptions};
use fastrand::Rng;
use omerta_dataplane::{EventStream, GuardError, PolicyStore, Programs};
use omerta_verdict::{
    ANSWER_CAPACITY, Bucket, Direction, EVENT_FRAME_BYTES, FixedInputs, Flow, Meter, Mode, Policy,
    Rate, SENT_FLOWS, SentFlow, Table, Verdict, egress, ingress,
};

use crate::native::NativeGuard;
use crate::{allowlist, config};

/// `TCX_NEXT`.
pub const NEXT: u32 = -1_i32 as u32;
/// `TC_ACT_SHOT`.
pub const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

/// The time of both: later than any flow's timeout.
const NOW: u64 = 10_000_000_000_000;
/// Limits of [`Pair::limited`]: a second's frames and bytes. Half of it may come at once.
const LIMITS: [(Meter, u64); 5] = [
    (Meter::EgressPackets, 1000),
    (Meter::EgressBytes, 100_000),
    (Meter::IngressPackets, 1000),
    (Meter::IngressBytes, 100_000),
    (Meter::Probes, 10),
];

/// The guest's guard, in the kernel and in memory, with one policy.
pub struct Pair {
    /// The kernel's programs, attached to nothing.
    pub programs: Programs,
    /// Their events.
    pub events: EventStream,
    native: NativeGuard,
    limited: bool,
    out: Vec<u8>,
}

impl Pair {
    /// Both guards in `mode`, with the guest's allowlist.
    ///
    /// # Errors
    /// Where the kernel does not take the programs, or without root.
    pub fn new(mode: Mode) -> Result<Self, GuardError> {
        Self::with(mode, 0, false)
    }

    /// Both guards in sampled mode, for which chance says `random`.
    ///
    /// # Errors
    /// As [`Pair::new`].
    pub fn sampled(random: u32) -> Result<Self, GuardError> {
        Self::with(Mode::Sampled, random, false)
    }

    /// Both guards in `mode`, with limits on all that can be limited but events.
    ///
    /// # Errors
    /// As [`Pair::new`].
    pub fn limited(mode: Mode) -> Result<Self, GuardError> {
        Self::with(mode, 0, true)
    }

    fn with(mode: Mode, random: u32, limited: bool) -> Result<Self, GuardError> {
        let inputs = FixedInputs {
            now_ns: NOW,
            random,
            ..FixedInputs::NONE
        };
        let mut rates = [Rate::UNLIMITED; Meter::COUNT];
        if limited {
            for (meter, units) in LIMITS {
                rates[meter as usize] = Rate::per_second(units, units / 2);
            }
        }
        let mut programs = Programs::load_with("parity", mode, inputs)?;
        let policy = {
            let mut store = PolicyStore::of(&programs, "parity")?;
            store.commit(
                Policy {
                    rates,
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
            native: NativeGuard::new(policy, buckets, inputs),
            limited,
            out: vec![0; 4096],
        })
    }

    /// The native verdict, which may open a flow and use up limits.
    pub fn native(&self, direction: Direction, frame: &[u8]) -> Verdict {
        match direction {
            Direction::Egress => egress(frame, &self.native),
            Direction::Ingress => ingress(frame, &self.native),
        }
    }

    /// Does to both guards what time does: buckets fill or empty, flows age, the lease ends and is
    /// renewed.
    ///
    /// # Errors
    /// Where a map cannot be written.
    pub fn pass_time(&mut self, random: &mut Rng) -> Result<(), GuardError> {
        let lease = match random.u8(..32) {
            0 => NOW - random.u64(..2),
            1..=15 => NOW + 1,
            _ => 0,
        };
        PolicyStore::of(&self.programs, "parity")?.set_lease_until_ns(lease);
        self.native.lease = lease;
        if self.limited {
            let (meter, _) = LIMITS[random.usize(..LIMITS.len())];
            // From empty to somewhat more than full, as other CPUs' clocks may have it.
            let word = NOW - 100_000_000 + random.u64(..700_000_000);
            self.programs
                .edit_live(|live| live.meters[meter as usize] = word)?;
            self.native.meters[meter as usize].set(word);
        }
        let flows = self.native.flows.get_mut();
        let aged: Vec<_> = flows
            .iter_mut()
            .filter(|_| random.u8(..8) == 0)
            .take(4)
            .collect();
        for (flow, seen) in aged {
            *seen = match random.u8(..3) {
                // Just still alive, just not, or seen by a CPU whose clock is ahead.
                0 => NOW - flow.timeout_ns() + 1,
                1 => NOW - flow.timeout_ns(),
                _ => NOW + 1,
            };
            self.programs.set_flow(flow, Some(*seen))?;
        }
        if random.bool() {
            return Ok(());
        }
        let sent = self.native.sent.get_mut();
        for entry in sent.iter_mut().filter(|entry| entry.check != 0) {
            if random.u8(..4) == 0 {
                let timeout = Flow::from_words(entry.flow).timeout_ns();
                entry.tick = [NOW - timeout + 1, NOW - timeout, NOW + 1][random.usize(..3)];
                // Of the policy before, of this one, or of the next.
                entry.generation = random.u64(..8).min(1) + u64::from(random.u8(..8) == 0);
                // Of the flow at another time.
                entry.check = 1;
            }
        }
        let mut table = [SentFlow::NONE; SENT_FLOWS];
        table.copy_from_slice(sent);
        self.programs.edit_live(|live| live.sent = table)
    }

    /// The verdict of both, or how the kernel's differs from the native one: outcome, reason,
    /// event, answer.
    ///
    /// # Errors
    /// The difference, in words.
    pub fn judge(&mut self, direction: Direction, frame: &[u8]) -> Result<Verdict, String> {
        let native = self.native(direction, frame);
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut self.out),
            ..TestRunOptions::new()
        };
        let program = self.programs.program(direction);
        let result = match program.map(|program| program.test_run(options)) {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => return Err(format!("TEST_RUN fails: {error:?}")),
            Err(error) => return Err(format!("no program: {error:?}")),
        };
        let out = self
            .out
            .get(..result.data_size_out as usize)
            .unwrap_or_default();
        let same = match (native, result.return_value, self.events.next()) {
            (Verdict::Allow, NEXT, None) => {
                if out == frame {
                    Ok(())
                } else {
                    Err("an allowed frame was changed".into())
                }
            }
            (Verdict::Drop(reason), SHOT, Some(event)) => {
                let same = event.reason == reason
                    && event.direction == direction
                    && event.length as usize == frame.len()
                    && frame.get(..frame.len().min(EVENT_FRAME_BYTES)) == Some(&event.head);
                if same {
                    Ok(())
                } else {
                    Err(format!("native drop {reason}, kernel {event:?}"))
                }
            }
            (Verdict::Answer(answer), REDIRECT, None) => {
                let mut expected = [0; ANSWER_CAPACITY];
                answer.compose(&mut expected);
                if Some(out) == expected.get(..answer.length()) {
                    Ok(())
                } else {
                    Err(format!("answers differ: {out:02x?}"))
                }
            }
            (native, code, event) => Err(format!(
                "native {native:?}, kernel returned {code} with {event:?}"
            )),
        };
        same.map(|()| native)
    }

    /// How what the kernel's guard remembers differs from what the native one does: how full its
    /// buckets are, when each flow was seen.
    ///
    /// # Errors
    /// The difference, in words.
    pub fn compare_state(&mut self) -> Result<(), String> {
        let failed = |error: GuardError| format!("a map cannot be read: {error:?}");
        let live = self.programs.live().map_err(failed)?;
        for (index, (native, kernel)) in self.native.meters.iter().zip(live.meters).enumerate() {
            if kernel != native.get() {
                return Err(format!(
                    "meter {index}: native {}, kernel {kernel}",
                    native.get()
                ));
            }
        }
        let kernel = self.programs.flows().map_err(failed)?;
        let native = self.native.flows.get_mut();
        let same = kernel.len() == native.len()
            && kernel
                .iter()
                .all(|(flow, seen)| native.get(flow) == Some(seen));
        if !same {
            return Err(format!("flows: native {native:?}, kernel {kernel:?}"));
        }
        let native = self.native.sent.get_mut();
        if let Some((native, kernel)) = native.iter().zip(&live.sent).find(|(n, k)| n != k) {
            return Err(format!("sent on: native {native:?}, kernel {kernel:?}"));
        }
        Ok(())
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
