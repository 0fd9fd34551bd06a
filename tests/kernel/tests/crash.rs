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
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use omerta_dataplane::{Guard, GuardError};
use omerta_kernel_tests::config;
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::Mode;

/// Runs the ignored test `work` of this binary in a process of its own, in the network namespace
/// of this thread, until it says that it has begun.
fn begin(work: &str) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", work, "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("begun")));
    child
}

fn kill_after(mut child: Child, time: Duration) {
    std::thread::sleep(time);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The programs on the tap's hooks.
fn programs() -> [usize; 2] {
    [TcAttachType::Ingress, TcAttachType::Egress]
        .map(|hook| SchedClassifier::query_tcx("guest", hook).unwrap().1.len())
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
    println!("begun");
    loop {
        // Whatever the process before this one left.
        match Guard::attach("guest", &config(Mode::Filtered)) {
            Ok(guard) => guard.detach().unwrap(),
            Err(GuardError::AlreadyGuarded { .. }) => {
                Guard::open("guest").unwrap().detach().unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_guard_is_whole_or_absent_whenever_its_maker_is_killed() {
    let namespace = Namespace::new("ot-crash").unwrap();
    let inode = namespace.inode().unwrap();
    let place = format!("/sys/fs/bpf/omerta/{inode}/guest");
    let mut random = fastrand::Rng::with_seed(1);
    let (mut whole, mut left) = (0, 0);
    namespace
        .enter(|| {
            for left in Guard::pinned().unwrap() {
                Guard::remove_stale(&left.interface).unwrap();
            }
            let mut tap = Tap::create("guest").unwrap();
            drop(Guard::attach("guest", &config(Mode::Filtered)).unwrap());
            let pins = names(&place);
            for round in 0..30 {
                let child = begin("attach_and_detach_without_end");
                kill_after(child, Duration::from_micros(random.u64(..300_000)));
                if round % 4 == 0 {
                    // A guard whose interface is gone is what attach finds in its place.
                    drop(tap);
                    tap = Tap::create("guest").unwrap();
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
                        assert_eq!(programs(), [0, 0]);
                    }
                    Err(error) => panic!("{error}"),
                }
                if random.bool() {
                    Guard::remove_stale("guest").unwrap();
                }
                if !Guard::list().unwrap().contains(&"guest".to_owned()) {
                    drop(Guard::attach("guest", &config(Mode::Filtered)).unwrap());
                } else {
                    Guard::remove_stale("guest").unwrap();
                }
                Guard::open("guest").unwrap().verify().unwrap();
                assert_eq!(programs(), [1, 1], "no second guard is left");
                let beside = names(&format!("/sys/fs/bpf/omerta/{inode}"));
                assert_eq!(beside, BTreeSet::from(["guest".to_owned()]));
            }
            Guard::open("guest").unwrap().detach().unwrap();
            drop(tap);
        })
        .unwrap();
    println!("killed 30 times: {whole} whole guards, {left} left-overs");
}
