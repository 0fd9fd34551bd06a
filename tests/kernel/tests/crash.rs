//! Processes that are killed while they attach, remove or change a guard: what is in force and
//! reachable after is what was before, or what was to be.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use omerta_dataplane::{Guard, GuardError, Hook};
use omerta_kernel_tests::{
    CONSUMER, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, config, ethernet, hooks, judging,
    remove_left_overs, udp, victim,
};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::{Endpoint, Mode, Reason};

fn kill_after(mut child: Child, time: Duration) {
    std::thread::sleep(time);
    child.kill().unwrap();
    child.wait().unwrap();
}

fn names(directory: &str) -> BTreeSet<String> {
    if !Path::new(directory).exists() {
        return BTreeSet::new();
    }
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
#[ignore = "killed by another test"]
fn attach_and_detach_without_end() {
    let words = hooks().unwrap().iter();
    let hook = words.copied().find(|hook| hook.word() == victim::list());
    victim::has_begun();
    loop {
        // Whatever the process before this one left.
        match attach(hook.unwrap()) {
            Ok(guard) => guard.detach().unwrap(),
            Err(GuardError::AlreadyGuarded { .. }) => {
                Guard::open("guest").unwrap().detach().unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn attach(hook: Hook) -> Result<Guard, GuardError> {
    Guard::attach_by(hook, "guest", &config(Mode::Filtered))
}

#[test]
fn a_guard_is_whole_or_absent_whenever_its_maker_is_killed() {
    for hook in hooks().unwrap() {
        whole_or_absent(*hook);
    }
}

/// The tap of the same name. What the killed process had begun, with its descriptors, may hold the old
/// one for a moment.
fn created_again() -> Tap {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match Tap::create("guest") {
            Ok(tap) => return tap,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until so many programs judge on the two hooks, which is no second guard: the kernel takes a link
/// off its hook a moment after its last pin or descriptor is gone.
fn become_of(programs: &impl Fn() -> [usize; 2], expected: [usize; 2]) {
    let end = Instant::now() + Duration::from_secs(5);
    while programs() != expected {
        assert!(Instant::now() < end, "{:?}, not {expected:?}", programs());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn whole_or_absent(hook: Hook) {
    let programs = || judging(hook, "guest").unwrap();
    let namespace = Namespace::new("ot-crash").unwrap();
    let inode = namespace.inode().unwrap();
    let place = format!("/sys/fs/bpf/omerta/{inode}/guest");
    let mut random = fastrand::Rng::with_seed(1);
    let (mut whole, mut left) = (0, 0);
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let mut tap = Tap::create("guest").unwrap();
            drop(attach(hook).unwrap());
            let pins = names(&place);
            for round in 0..30 {
                let child = victim::begin("attach_and_detach_without_end", hook.word()).unwrap();
                kill_after(child, Duration::from_micros(random.u64(..300_000)));
                if round % 4 == 0 {
                    // A guard whose interface is gone is what attach finds in its place.
                    drop(tap);
                    tap = created_again();
                }
                let found = names(&place);
                assert!(found.is_empty() || found == pins, "{found:?}");
                match Guard::open("guest") {
                    Ok(guard) => {
                        guard.verify().unwrap();
                        assert_eq!(guard.status().unwrap().epoch, 1);
                        whole += 1;
                    }
                    Err(GuardError::NotInForce { .. }) => {
                        assert!(!Guard::pinned().unwrap().is_empty());
                        left += 1;
                    }
                    Err(GuardError::NotGuarded { .. }) => {
                        assert!(Guard::pinned().unwrap().is_empty());
                        become_of(&programs, [0, 0]);
                    }
                    Err(error) => panic!("{error}"),
                }
                if random.bool() {
                    Guard::remove_stale("guest", None).unwrap();
                }
                if !Guard::list().unwrap().contains(&"guest".to_owned()) {
                    drop(attach(hook).unwrap());
                } else {
                    Guard::remove_stale("guest", None).unwrap();
                }
                Guard::open("guest").unwrap().verify().unwrap();
                become_of(&programs, [1, 1]);
                // Its pins, and those of the programs that judge for it.
                let beside = names(&format!("/sys/fs/bpf/omerta/{inode}"));
                let (shared, own): (Vec<_>, Vec<_>) = beside
                    .iter()
                    .partition(|name| name.starts_with(":programs-"));
                assert!(shared.len() == 1 && own == ["guest"], "{beside:?}");
                let shared = names(&format!("/sys/fs/bpf/omerta/{inode}/{}", shared[0]));
                let places = shared.iter().filter(|name| name.starts_with("place_"));
                assert_eq!(places.count(), 1, "{shared:?}");
            }
            Guard::open("guest").unwrap().detach().unwrap();
            assert_eq!(
                names(&format!("/sys/fs/bpf/omerta/{inode}")),
                BTreeSet::new()
            );
            drop(tap);
        })
        .unwrap();
    println!(
        "{}: killed 30 times: {whole} whole guards, {left} left-overs",
        hook.word()
    );
}

/// The two allowlists that take turns; their first endpoint is on both.
fn lists() -> [Vec<Endpoint>; 2] {
    let list = |port: u16, count: usize| {
        let rest = (0..count).map(move |i| Endpoint {
            port: port + i as u16,
            ..common()
        });
        std::iter::once(common()).chain(rest).collect()
    };
    // Of different sizes, so that the banks are too.
    [list(1000, 40), list(2000, 900)]
}

fn common() -> Endpoint {
    "udp:192.0.2.10:51820".parse().unwrap()
}

/// A datagram of the guest to `port` of the consumer.
fn datagram(port: u16) -> Vec<u8> {
    let packet = Ipv4::new(GUEST, CONSUMER, 17).packet(&udp(4000, port, b"omerta"));
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

#[test]
#[ignore = "killed by another test"]
fn replace_without_end() {
    let guard = Guard::open("guest").unwrap();
    victim::has_begun();
    for list in lists().iter().cycle() {
        guard.replace(list).unwrap();
    }
}

#[test]
fn an_allowlist_is_one_or_the_other_whenever_its_writer_is_killed() {
    let namespace = Namespace::new("ot-kill").unwrap();
    let mut random = fastrand::Rng::with_seed(2);
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let tap = Tap::create("guest").unwrap();
            let versions = lists();
            let mut start = config(Mode::Filtered);
            start.allow = versions[0].clone();
            let guard = Guard::attach("guest", &start).unwrap();
            tap.up().unwrap();
            let shown = versions.clone().map(|list| {
                let mut sorted = list;
                sorted.sort();
                sorted.iter().map(ToString::to_string).collect::<Vec<_>>()
            });
            let (mut found, mut epoch, mut sent) = ([0, 0], 1, 0);
            for _ in 0..200 {
                let mut child = victim::begin("replace_without_end", "").unwrap();
                let until = Instant::now() + Duration::from_micros(random.u64(..30_000));
                while Instant::now() < until {
                    tap.send(&datagram(51820)).unwrap();
                    tap.send(&datagram(9)).unwrap();
                    sent += 1;
                }
                child.kill().unwrap();
                child.wait().unwrap();
                let status = guard.status().unwrap();
                assert!(status.epoch >= epoch, "{} after {epoch}", status.epoch);
                epoch = status.epoch;
                let version = shown.iter().position(|list| *list == status.allow);
                found[version.expect("one of the two, whole")] += 1;
                // Whatever was half written, the next change is whole.
                if random.bool() {
                    let list = &versions[random.usize(..2)];
                    epoch = guard.replace(list).unwrap();
                    assert_eq!(guard.status().unwrap().allow.len(), list.len());
                }
            }
            let counters = guard.counters().unwrap().egress;
            let dropped = counters.dropped_for(Reason::Endpoint).packets;
            // The kernel itself sends nothing into a tap from the guest's side.
            assert_eq!((counters.allowed.packets, dropped), (sent, sent));
            println!("killed 200 times at epoch {epoch}: {found:?} of each, {sent} frames of each");
            guard.detach().unwrap();
        })
        .unwrap();
}
