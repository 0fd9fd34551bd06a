//! What a watched guard's owner is told of, and what a look costs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::any::Any;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use nix::poll::{PollFd, PollFlags, poll};
use omerta_dataplane::{Guard, GuardError, GuardWatch, Programs, Standing};
use omerta_kernel_tests::config;
use omerta_test_support::{Namespace, Tap, ip};
use omerta_verdict::{Direction, Mode};

/// A guarded tap, watched; what `change` does must be told in these words.
fn told(change: impl FnOnce(Tap, Guard) -> Box<dyn Any> + Send, words: &str, at_a_glance: bool) {
    let namespace = Namespace::new("watch").unwrap();
    namespace
        .enter(|| {
            let tap = Tap::create("guest").unwrap();
            let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
            let watch = GuardWatch::begin(&guard).unwrap();
            watch.check().unwrap();
            watch.glance().unwrap();
            let kept = change(tap, guard);
            let error = watch.check().unwrap_err();
            assert!(error.to_string().contains(words), "{words}: {error}");
            // What the occasions tell is not asked for.
            let seen = watch.glance().err().map(|error| error.to_string());
            assert_eq!(seen, at_a_glance.then(|| error.to_string()));
            drop((watch, kept));
            // Whatever name it has now.
            for left in Guard::pinned().unwrap() {
                if left.standing != Standing::Gone {
                    Guard::open(&left.interface).unwrap().detach().unwrap();
                } else {
                    Guard::remove_stale(&left.interface, None).unwrap();
                }
            }
        })
        .unwrap();
}

#[test]
fn removed_guard_is_told_and_judges_on_while_it_is_watched() {
    told(
        |tap, guard| {
            guard.detach().unwrap();
            for hook in [TcAttachType::Ingress, TcAttachType::Egress] {
                let (_, programs) = SchedClassifier::query_tcx("guest", hook).unwrap();
                assert_eq!(programs.len(), 1, "held by the watch");
            }
            Box::new(tap)
        },
        "its pins were removed",
        false,
    );
}

#[test]
fn guard_in_its_place_is_told() {
    told(
        |tap, guard| {
            guard.detach().unwrap();
            Guard::attach("guest", &config(Mode::Direct)).unwrap();
            Box::new(tap)
        },
        "another one by now",
        true,
    );
}

#[test]
fn changed_allowlist_is_told() {
    told(
        |tap, guard| {
            guard
                .allow(&["udp:198.51.100.9:53".parse().unwrap()])
                .unwrap();
            Box::new(tap)
        },
        "its policy was changed",
        true,
    );
}

#[test]
fn renamed_interface_is_told() {
    told(
        |tap, _| {
            ip("link set guest name other").unwrap();
            Box::new(tap)
        },
        "no interface guest",
        false,
    );
}

#[test]
fn removed_interface_is_told() {
    told(
        |tap, _| {
            drop(tap);
            Box::new(())
        },
        "no interface guest",
        true,
    );
}

#[test]
fn interface_in_its_place_is_told() {
    told(
        |tap, _| {
            drop(tap);
            Box::new(Tap::create("guest").unwrap())
        },
        "re-created",
        true,
    );
}

#[test]
fn program_before_it_is_told() {
    told(
        |tap, _| {
            let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            foreign
                .program(Direction::Ingress)
                .unwrap()
                .attach_with_options("guest", TcAttachType::Egress, first)
                .unwrap();
            Box::new((tap, foreign))
        },
        "another program stands before it",
        true,
    );
}

/// Whoever has an open link may put another program into it: neither its pin nor its place changes.
#[test]
fn another_program_in_its_link_is_seen_at_a_glance() {
    told(
        |tap, guard| {
            let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
            let namespace = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
            let pin = format!("/sys/fs/bpf/omerta/{namespace}/guest/link_ingress");
            let link = FdLink::from(PinnedLink::from_pin(pin).unwrap());
            // Exchanges the program for as long as the link lives.
            let program = foreign.program(Direction::Ingress).unwrap();
            program.attach_to_link(link.try_into().unwrap()).unwrap();
            Box::new((tap, guard, foreign))
        },
        "its program was replaced",
        true,
    );
}

/// The watch of declared taps asks this when the pins are lost.
#[test]
fn a_held_guard_whose_program_was_exchanged_does_not_judge() {
    let namespace = Namespace::new("watch").unwrap();
    namespace
        .enter(|| {
            let _tap = Tap::create("guest").unwrap();
            let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
            let held = guard.hold().unwrap();
            assert!(held.is_on(guard.ifindex()).unwrap());
            assert!(!held.is_on(guard.ifindex() + 1).unwrap());
            let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
            let namespace = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
            let pin = format!("/sys/fs/bpf/omerta/{namespace}/guest/link_ingress");
            let link = FdLink::from(PinnedLink::from_pin(pin).unwrap());
            let program = foreign.program(Direction::Ingress).unwrap();
            program.attach_to_link(link.try_into().unwrap()).unwrap();
            assert!(!held.is_on(guard.ifindex()).unwrap());
            guard.hold().unwrap_err();
            drop((held, foreign));
            guard.detach().unwrap();
        })
        .unwrap();
}

#[test]
fn after_a_change_that_leaves_the_guard_in_order_a_glance_finds_it_in_order() {
    let namespace = Namespace::new("watch").unwrap();
    namespace
        .enter(|| {
            let _tap = Tap::create("guest").unwrap();
            let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
            let watch = GuardWatch::begin(&guard).unwrap();
            let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
            let last = TcAttachOptions::TcxOrder(LinkOrder::last());
            foreign
                .program(Direction::Ingress)
                .unwrap()
                .attach_with_options("guest", TcAttachType::Egress, last)
                .unwrap();
            watch.glance().unwrap();
            drop(foreign);
            watch.glance().unwrap();
            drop(watch);
            guard.detach().unwrap();
        })
        .unwrap();
}

/// Each change that this crate makes, and each removal of a pin by anybody, is an occasion to look.
#[test]
fn changes_give_occasion_to_look() {
    type Change = fn();
    let changes: [Change; 3] = [
        || {
            let endpoint = "udp:198.51.100.9:53".parse().unwrap();
            Guard::open("guest").unwrap().allow(&[endpoint]).unwrap();
        },
        || Guard::open("guest").unwrap().detach().unwrap(),
        || {
            let namespace = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
            let pin = format!("/sys/fs/bpf/omerta/{namespace}/guest/link_egress");
            std::fs::remove_file(pin).unwrap();
        },
    ];
    for change in changes {
        let namespace = Namespace::new("watch").unwrap();
        namespace
            .enter(|| {
                let _tap = Tap::create("guest").unwrap();
                let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
                let watch = GuardWatch::begin(&guard).unwrap();
                let occasions = watch.occasions().unwrap();
                change();
                let mut ready = [PollFd::new(occasions.as_fd(), PollFlags::POLLIN)];
                assert_eq!(poll(&mut ready, 10_000u16), Ok(1));
                watch.check().unwrap_err();
                drop(watch);
                if let Ok(guard) = Guard::open("guest") {
                    guard.detach().unwrap();
                }
                let _ = Guard::remove_stale("guest", None);
            })
            .unwrap();
    }
}

#[test]
fn looking_is_cheap() {
    let namespace = Namespace::new("watch").unwrap();
    namespace
        .enter(|| {
            let _tap = Tap::create("guest").unwrap();
            let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
            let watch = GuardWatch::begin(&guard).unwrap();
            let rounds = 1000;
            let time = |what: &str, look: &dyn Fn() -> Result<(), GuardError>| {
                let started = Instant::now();
                for _ in 0..rounds {
                    look().unwrap();
                }
                let each = started.elapsed() / rounds;
                println!("measured: {what} {each:?}");
            };
            time("a look at a watched guard", &|| watch.check());
            time("a glance at a watched guard", &|| watch.glance());
            time("a proof of a guard", &|| guard.verify());
            drop(watch);
            guard.detach().unwrap();
        })
        .unwrap();
}
