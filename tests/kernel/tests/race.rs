//! Commits at full speed against programs that judge: what the generation is for. Two versions of a
//! policy differ in the guest's address and in the allowlist, so a judgement that mixed them would show.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use omerta_dataplane::{EventStream, PolicyStore, Programs};
use omerta_kernel_tests::*;
use omerta_verdict::{Address, Direction, Endpoint, MAX_ADDRESSES, Mode, Policy, Protocol, Reason};

const RUNS: u32 = 20_000;
/// After so many runs there is taken to be no race.
const MOST_RUNS: u32 = 5_000_000;
const PORTS: [u16; 2] = [1001, 1002];
const ADDRESSES: [Ipv4Addr; 2] = [GUEST, GUEST_TOO];

fn version(index: usize, length: u32) -> (Policy, Vec<Endpoint>) {
    let mut policy = config(Mode::Filtered).policy("guest").unwrap();
    policy.rates = Default::default();
    policy.addresses = [Address::UNSPECIFIED; MAX_ADDRESSES];
    policy.addresses[0] = IpAddr::from(ADDRESSES[index]).into();
    let rest = (0..length).map(|number| Endpoint {
        protocol: Protocol::Tcp,
        address: Address::from(IpAddr::from(Ipv4Addr::from(0xcb00_7100 + number))),
        port: PORTS[index],
    });
    let own = Endpoint {
        protocol: Protocol::Udp,
        address: IpAddr::from(CONSUMER).into(),
        port: PORTS[index],
    };
    (policy, rest.chain([own]).collect())
}

/// A frame between the guest of version `of` and the endpoint of version `to`.
fn frame(direction: Direction, of: usize, to: usize) -> Vec<u8> {
    let (guest, port) = (ADDRESSES[of], PORTS[to]);
    match direction {
        Direction::Egress => {
            let packet = Ipv4::new(guest, CONSUMER, 17).packet(&udp(4000, port, b"x"));
            ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
        }
        Direction::Ingress => {
            let packet = Ipv4::new(CONSUMER, guest, 17).packet(&udp(port, 4000, b"x"));
            ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &packet)
        }
    }
}

/// The program of one direction, held apart from the maps that are written meanwhile.
fn held(programs: &mut Programs, direction: Direction) -> SchedClassifier {
    let name = format!("omerta-race-{}-{}", std::process::id(), direction.word());
    let pin = PathBuf::from("/sys/fs/bpf").join(name);
    programs.program(direction).unwrap().pin(&pin).unwrap();
    let held = SchedClassifier::from_pin(&pin).unwrap();
    std::fs::remove_file(pin).unwrap();
    held
}

/// What became of a frame: allowed, or dropped for a reason.
fn run(program: &SchedClassifier, events: &mut EventStream, frame: &[u8]) -> Option<Reason> {
    let options = TestRunOptions {
        data_in: Some(frame),
        ..TestRunOptions::new()
    };
    let code = program.test_run(options).unwrap().return_value;
    match (code, events.next()) {
        (NEXT, None) => None,
        (SHOT, Some(event)) => Some(event.reason),
        (code, event) => panic!("{code} with {event:?}"),
    }
}

/// Ends the writer, also where a judgement was wrong.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Judges while `change` is called again and again, with how often it was, until every outcome of
/// `wanted` has been seen.
fn race(
    programs: &mut Programs,
    wanted: &[Option<Reason>],
    mut change: impl FnMut(&mut PolicyStore, usize) + Send,
) {
    let mut events = programs.take_events().unwrap();
    let judges = Direction::ALL.map(|direction| held(programs, direction));
    let mut store = PolicyStore::of(programs, "race").unwrap();
    let done = AtomicBool::new(false);
    let mut outcomes: BTreeMap<Option<Reason>, u64> = BTreeMap::new();
    let mut runs = 0;
    let changes = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut changes = 0;
            while !done.load(Ordering::Relaxed) {
                change(&mut store, changes);
                changes += 1;
            }
            changes
        });
        let ends = Ends(&done);
        while runs < RUNS || !wanted.iter().all(|outcome| outcomes.contains_key(outcome)) {
            assert!(
                runs < MOST_RUNS && !writer.is_finished(),
                "{outcomes:?} after {runs} runs"
            );
            for (judge, direction) in judges.iter().zip(Direction::ALL) {
                for (of, to) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    runs += 1;
                    let outcome = run(judge, &mut events, &frame(direction, of, to));
                    let may_be = match outcome {
                        None => of == to,
                        // The address is asked for first.
                        Some(Reason::Endpoint) => of != to,
                        Some(Reason::SourceAddress) => direction == Direction::Egress,
                        Some(Reason::DestinationAddress) => direction == Direction::Ingress,
                        Some(reason) => reason == Reason::PolicyChanging,
                    };
                    let way = direction.word();
                    assert!(may_be, "{outcome:?} for {way} of {of} to {to}");
                    *outcomes.entry(outcome).or_default() += 1;
                }
            }
        }
        drop(ends);
        writer.join().unwrap()
    });
    assert_eq!(outcomes.values().sum::<u64>(), u64::from(runs));
    println!("{runs} runs under {changes} changes: {outcomes:?}");
}

fn can_race() -> bool {
    let can = thread::available_parallelism().is_ok_and(|count| count.get() > 1);
    if !can {
        println!("skipped: on one processor nothing is judged while a policy is written");
    }
    can
}

/// Each slot is written over with the other version, as fast as it can be.
#[test]
fn no_frame_is_judged_by_two_policies_at_once_and_one_that_change_too_fast_is_dropped() {
    if !can_race() {
        return;
    }
    let mut programs = Programs::load("race", Mode::Filtered).unwrap();
    let slots = [0, 1].map(|index| {
        let (policy, list) = version(index, 8);
        let mut store = PolicyStore::of(&programs, "race").unwrap();
        store.commit(policy, &list).unwrap();
        store.in_force()
    });
    let wanted = [None, Some(Reason::PolicyChanging)];
    race(&mut programs, &wanted, |store, number| {
        store.put_in_force(&slots[number / 2 % 2]);
    });
}

/// Commits as a guard makes them.
#[test]
fn no_frame_is_judged_by_two_allowlists_at_once() {
    if !can_race() {
        return;
    }
    for length in [8, 200] {
        let mut programs = Programs::load("race", Mode::Filtered).unwrap();
        let versions = [version(0, length), version(1, length)];
        let mut store = PolicyStore::of(&programs, "race").unwrap();
        store.commit(versions[1].0, &versions[1].1).unwrap();
        race(&mut programs, &[None], |store, number| {
            let (policy, list) = &versions[number % 2];
            assert_eq!(store.commit(*policy, list).unwrap(), number as u64 + 2);
        });
    }
}
