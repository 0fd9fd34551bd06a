//! A case before the kernel's programs, by `BPF_PROG_TEST_RUN`.

use std::net::IpAddr;

use aya::programs::{ProgramError, TestRun, TestRunOptions};
use omerta_corpus::{Case, Special};
use omerta_dataplane::{EventStream, PolicyStore, Programs};
use omerta_kernel_tests::{GUEST, STRANGER, allowlist};
use omerta_verdict::{Direction, Flow, Mode, Outcome, Protocol};

use crate::native::{before, direction};
use crate::{guest_policy, word};

const NEXT: u32 = -1_i32 as u32;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;
/// Linux gives TEST_RUN's buffer one page for frame, headroom and shared info.
const LONGEST: usize = 3000;

/// Whether Linux takes the frame (bpf_prog_test_run_skb in net/bpf/test_run.c): IP with a whole
/// header, no tag or pending checksum beside the bytes, and one page at most.
pub fn takes(case: &Case) -> bool {
    let shortest = match case.frame.get(12..14) {
        Some([0x08, 0x00]) => 34,
        Some([0x86, 0xdd]) => 54,
        _ => 15,
    };
    (shortest..LONGEST).contains(&case.frame.len()) && case.vlan.is_none() && case.vnet.is_none()
}

/// The kernel's programs in one mode.
pub struct Kernel {
    mode: Mode,
    guard: Special,
    programs: Programs,
    events: EventStream,
}

impl Kernel {
    pub fn new(mode: Mode, guard: Special) -> Self {
        let mut programs = Programs::load("corpus", mode).unwrap();
        let events = programs.take_events().unwrap();
        Self {
            mode,
            guard,
            programs,
            events,
        }
    }

    /// As if the guest had sent nothing: no flow is known, and none is open.
    fn forget(&mut self) {
        if self.mode == Mode::Conntrack {
            *self = Self::new(self.mode, self.guard);
        }
        if self.guard == Special::NoPolicy {
            return;
        }
        let mut store = PolicyStore::of(&self.programs, "corpus").unwrap();
        let policy = guest_policy(self.mode, self.guard);
        store.commit(policy, &allowlist()).unwrap();
        match self.guard {
            // Long ago.
            Special::LeaseOver => store.set_lease_until_ns(1),
            Special::FlowsFull => self.fill_flows(),
            _ => {}
        }
    }

    /// Opens as many flows as there may be, to an endpoint that is on no list.
    fn fill_flows(&mut self) {
        const FLOWS: u16 = 4096;
        let [guest, peer] = [GUEST, STRANGER].map(|address| IpAddr::from(address).into());
        for port in 1..=FLOWS {
            let flow = Flow::new(Protocol::Udp, (guest, port), (peer, 1));
            // Later than any clock of this machine.
            self.programs.set_flow(&flow, Some(u64::MAX / 2)).unwrap();
        }
    }

    fn run(&mut self, frame: &[u8], direction: Direction) -> Result<u32, ProgramError> {
        let mut out = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        let program = self.programs.program(direction).unwrap();
        program.test_run(options).map(|result| result.return_value)
    }

    /// What is wrong with the kernel's verdict on a case.
    pub fn differs(&mut self, case: &Case, all: &[Case]) -> Option<String> {
        self.forget();
        if let Some(first) = before(case, all) {
            let code = self.run(&first.frame, direction(first)).unwrap();
            assert_eq!(code, NEXT, "{}", first.name);
        }
        let code = match self.run(&case.frame, direction(case)) {
            Ok(code) => code,
            Err(error) => return Some(format!("{}: TEST_RUN refuses: {error:?}", case.name)),
        };
        let seen = match (code, self.events.next()) {
            (NEXT, None) => Outcome::Allowed,
            (REDIRECT, None) => Outcome::Answered,
            (SHOT, Some(event)) => Outcome::Dropped(event.reason),
            (code, event) => return Some(format!("{}: {code} with {event:?}", case.name)),
        };
        let expected = case.present();
        (seen != expected)
            .then(|| format!("{}: {} and not {}", case.name, word(seen), word(expected)))
    }
}
