//! Names and numbers that change hands: no guard is shown, changed or removed for another's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::fs;
use std::os::unix::fs::symlink;

use omerta_dataplane::{ErrorKind, Guard, GuardError, PinnedGuard, Standing};
use omerta_kernel_tests::{config, hooks, remove_left_overs};
use omerta_test_support::{Namespace, Tap, Veth, index_of};
use omerta_verdict::{Endpoint, Mode};

fn endpoint() -> Endpoint {
    "udp:192.0.2.77:7".parse().unwrap()
}

/// The mode, epoch and index of the guard that is open under `interface`.
#[track_caller]
fn seen(interface: &str) -> (&'static str, u64, u32) {
    let guard = Guard::open(interface).unwrap();
    guard.verify().unwrap();
    let status = guard.status().unwrap();
    assert_eq!(status.interface, interface);
    (status.mode, status.epoch, status.ifindex)
}

#[test]
fn two_guarded_interfaces_that_swap_their_names_keep_their_own_guards() {
    let namespace = Namespace::new("ot-names").unwrap();
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let _taps = ["left", "right"].map(|name| Tap::create(name).unwrap());
            let [index_a, index_b] = ["left", "right"].map(|name| index_of(name).unwrap());
            let old_a = Guard::attach("left", &config(Mode::Filtered)).unwrap();
            let old_b = Guard::attach("right", &config(Mode::Direct)).unwrap();
            for (from, to) in [("left", "swap"), ("right", "left"), ("swap", "right")] {
                namespace.ip(&format!("link set {from} name {to}")).unwrap();
            }
            assert_eq!(seen("left"), ("direct", 1, index_b));
            assert_eq!(seen("right"), ("filtered", 1, index_a));
            assert_eq!(Guard::list().unwrap(), ["left", "right"]);

            // Handles of before name interfaces that are others now.
            for old in [&old_a, &old_b] {
                assert!(old.verify().is_err());
                assert!(old.allow(&[endpoint()]).is_err());
                assert!(old.status().is_err());
            }
            assert!(old_a.detach().is_err());
            for name in ["left", "right"] {
                let again = Guard::attach(name, &config(Mode::Sampled));
                assert!(matches!(again, Err(GuardError::AlreadyGuarded { .. })));
                assert!(!Guard::remove_stale(name, None).unwrap());
            }
            Guard::open("left").unwrap().allow(&[endpoint()]).unwrap();
            assert_eq!(seen("left"), ("direct", 2, index_b));
            assert_eq!(seen("right"), ("filtered", 1, index_a));

            Guard::open("left").unwrap().detach().unwrap();
            assert!(matches!(
                Guard::open("left"),
                Err(GuardError::Renamed { .. } | GuardError::NotGuarded { .. })
            ));
            assert_eq!(seen("right"), ("filtered", 1, index_a));
            // `left` can be guarded anew, though the other's guard was attached under its name.
            Guard::attach("left", &config(Mode::Sampled)).unwrap();
            assert_eq!(seen("left"), ("sampled", 1, index_b));
            assert_eq!(seen("right"), ("filtered", 1, index_a));
            for name in ["right", "left"] {
                Guard::open(name).unwrap().detach().unwrap();
            }
            assert!(Guard::pinned().unwrap().is_empty());
        })
        .unwrap();
}

/// A namespace that has the number which one had that is gone, or `None` where the kernel does not
/// give it again.
fn with_number(number: u64) -> Option<Namespace> {
    let mut others = Vec::new();
    for _ in 0..200 {
        let namespace = Namespace::with_left_overs("ot-number").unwrap();
        if namespace.inode().unwrap() == number {
            return Some(namespace);
        }
        // Kept, so that the kernel goes on to other numbers.
        others.push(namespace);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    println!("skipped: the kernel gives the number of a network namespace to no other");
    None
}

#[test]
fn guards_of_a_namespace_that_is_gone_are_nobodys_in_the_one_that_has_its_number() {
    let old = Namespace::new("ot-number").unwrap();
    let number = old.inode().unwrap();
    let index = old
        .enter(|| {
            remove_left_overs().unwrap();
            let tap = Tap::create("guest").unwrap();
            drop(Guard::attach("guest", &config(Mode::Direct)).unwrap());
            let index = index_of("guest").unwrap();
            tap.remove();
            index
        })
        .unwrap();
    drop(old);
    let Some(new) = with_number(number) else {
        return;
    };
    new.enter(|| {
        let _tap = Tap::create("guest").unwrap();
        println!("index {index}, then {}", index_of("guest").unwrap());
        assert!(Guard::list().unwrap().is_empty());
        // Whoever else attaches a guard at this moment removes what is gone.
        let pinned = Guard::pinned().unwrap();
        assert!(
            pinned.iter().all(|p| p.standing == Standing::Gone),
            "{pinned:?}"
        );
        assert!(Guard::open("guest").is_err());
        Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        assert_eq!(seen("guest").0, "filtered");
        Guard::open("guest").unwrap().detach().unwrap();
        assert!(Guard::pinned().unwrap().is_empty());
    })
    .unwrap();
}

#[test]
fn a_guard_that_moved_out_of_a_namespace_is_not_its_successors() {
    let old = Namespace::new("ot-number").unwrap();
    let refuge = Namespace::new("ot-refuge").unwrap();
    let number = old.inode().unwrap();
    let guarded = old
        .enter(|| {
            remove_left_overs().unwrap();
            Veth::pair("guest", "peer").unwrap();
            drop(Guard::attach("guest", &config(Mode::Direct)).unwrap());
            for name in ["guest", "peer"] {
                old.ip(&format!("link set {name} netns {}", refuge.name()))
                    .unwrap();
            }
        })
        .is_ok();
    assert!(guarded);
    drop(old);
    let Some(new) = with_number(number) else {
        return;
    };
    new.enter(|| {
        // Perhaps of the same index as the one that is guarded elsewhere.
        let _veth = Veth::pair("guest", "peer").unwrap();
        assert_eq!(Guard::pinned().unwrap()[0].standing, Standing::Elsewhere);
        let error = Guard::open("guest").unwrap_err();
        assert!(matches!(error, GuardError::Elsewhere { .. }), "{error}");
        let error = Guard::remove_stale("guest", None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert_eq!(Guard::pinned().unwrap()[0].standing, Standing::Elsewhere);
    })
    .unwrap();
    refuge.ip("link delete guest").unwrap();
    new.enter(|| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        // Or removed by whoever else attaches a guard at this moment.
        let is_left = |p: &PinnedGuard| p.standing != Standing::Gone;
        while Guard::pinned().unwrap().iter().any(is_left) {
            assert!(
                std::time::Instant::now() < deadline,
                "the interface is gone"
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Guard::remove_stale("guest", None).unwrap();
        assert!(Guard::pinned().unwrap().is_empty());
    })
    .unwrap();
}

/// Nobody can enter a namespace that is gone, so nobody could remove what is pinned for it.
#[test]
fn guards_of_namespaces_that_are_gone_are_removed_and_those_of_others_are_not() {
    for hook in omerta_kernel_tests::hooks().unwrap() {
        swept(*hook);
    }
}

fn swept(hook: omerta_dataplane::Hook) {
    let [gone, living, own] =
        ["ot-gone", "ot-living", "ot-own"].map(|name| Namespace::new(name).unwrap());
    let guarded = |namespace: &Namespace| {
        namespace
            .enter(|| {
                remove_left_overs().unwrap();
                let tap = Tap::create("tap0").unwrap();
                Guard::attach_by(hook, "tap0", &config(Mode::Filtered)).unwrap();
                tap
            })
            .unwrap()
    };
    let inode = gone.inode().unwrap();
    let pins = std::path::PathBuf::from(format!("/sys/fs/bpf/omerta/{inode}/tap0"));
    drop(guarded(&gone));
    let _tap = guarded(&living);
    assert!(pins.is_dir());
    drop(gone);
    // The kernel takes its time to take a namespace apart.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while pins.exists() {
        assert!(std::time::Instant::now() < end, "still pinned");
        own.enter(|| Guard::sweep_gone_namespaces().unwrap())
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    living
        .enter(|| Guard::open("tap0").unwrap().verify().unwrap())
        .unwrap();
}

/// A namespace that is gone leaves pins; the kernel gives its inode to a later one.
#[test]
fn what_a_namespace_left_that_had_the_number_before_is_nobodys_guard() {
    for hook in hooks().unwrap() {
        let namespace = Namespace::new("ot-reused").unwrap();
        let pins = format!("/sys/fs/bpf/omerta/{}", namespace.inode().unwrap());
        namespace
            .enter(|| {
                remove_left_overs().unwrap();
                let tap = Tap::create("guest").unwrap();
                Guard::attach_by(*hook, "guest", &config(Mode::Filtered)).unwrap();
                tap.remove();
                let _tap = Tap::create("guest").unwrap();
                assert_eq!(Guard::pinned().unwrap().len(), 1, "it is left over");
                let error = Guard::open("guest").unwrap_err();
                assert_ne!(error.kind(), ErrorKind::NotFound, "{error}");

                let made_in = format!("{pins}/guest/namespace");
                fs::remove_file(&made_in).unwrap();
                symlink("1", &made_in).unwrap();
                assert_eq!(Guard::pinned().unwrap(), []);
                for error in [
                    Guard::open("guest").map(drop).unwrap_err(),
                    Guard::inspect("guest").map(drop).unwrap_err(),
                ] {
                    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
                }
                let guard = Guard::attach_by(*hook, "guest", &config(Mode::Filtered)).unwrap();
                guard.verify().unwrap();
                Guard::sweep_gone_namespaces().unwrap();
                guard.verify().unwrap();
                guard.detach().unwrap();
                assert!(!fs::exists(format!("{pins}/guest")).unwrap());
            })
            .unwrap();
    }
}
