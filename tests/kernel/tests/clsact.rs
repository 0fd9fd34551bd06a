//! Guards on kernels without TCX: filters of a clsact qdisc, which other kernels have too.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::poll::{PollFd, PollFlags, poll};
use omerta_dataplane::{ErrorKind, Guard, GuardError, GuardWatch, Hook, Programs, Standing};
use omerta_kernel_tests::{
    GATEWAY_MAC, GUEST_MAC, STRANGER_MAC, config, ethernet, goes, judging, remove_left_overs, tc,
};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::{Direction, Mode, Reason};

/// Runs `work` in a namespace of its own that has a tap `guest`; it is given the directory of the
/// namespace's pins.
fn with_tap(work: impl FnOnce(&Namespace, PathBuf, Tap) + Send) {
    let namespace = Namespace::new("ot-cls").unwrap();
    let pins = PathBuf::from(format!("/sys/fs/bpf/omerta/{}", namespace.inode().unwrap()));
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let tap = Tap::create("guest").unwrap();
            work(&namespace, pins, tap);
            remove_left_overs().unwrap();
        })
        .unwrap();
}

fn attach() -> Guard {
    Guard::attach_by(Hook::Clsact, "guest", &config(Mode::Filtered)).unwrap()
}

fn attach_error() -> GuardError {
    Guard::attach_by(Hook::Clsact, "guest", &config(Mode::Filtered)).unwrap_err()
}

fn filters() -> [usize; 2] {
    judging(Hook::Clsact, "guest").unwrap()
}

fn has_qdisc() -> bool {
    tc("qdisc show dev guest").unwrap().contains("clsact")
}

fn standing() -> Standing {
    let pinned = Guard::pinned().unwrap();
    assert_eq!(pinned.len(), 1, "{pinned:?}");
    pinned[0].standing
}

#[track_caller]
fn not_in_force<T: std::fmt::Debug>(result: Result<T, GuardError>, words: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, GuardError::NotInForce { .. }), "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

/// A filter of somebody else's, by `tc`'s words for its place.
fn foreign_filter(place: &str) {
    let mut arguments: Vec<_> = "filter add dev guest".split(' ').collect();
    arguments.extend(place.split(' '));
    // A classic program of one instruction, which matches nothing.
    arguments.extend(["bpf", "bytecode", "1,6 0 0 0,"]);
    let output = Command::new("tc").args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Puts the program that is pinned at `name` on the ingress hook once more.
fn filter_again(pins: &Path, options: NlOptions) {
    let mut program = SchedClassifier::from_pin(pins.join("guest/program_egress")).unwrap();
    let options = TcAttachOptions::Netlink(options);
    let id = program
        .attach_with_options("guest", TcAttachType::Ingress, options)
        .unwrap();
    // Dropped, the link would be cut.
    std::mem::forget(program.take_link(id).unwrap());
}

#[test]
fn a_guard_judges_outlives_its_handle_and_ends_with_detach() {
    with_tap(|_, pins, tap| {
        drop(attach());
        assert_eq!(filters(), [1, 1]);
        let guard = Guard::open("guest").unwrap();
        guard.verify().unwrap();
        assert_eq!(Guard::list().unwrap(), ["guest"]);
        assert_eq!(guard.status().unwrap().state, "in_force");
        tap.up().unwrap();
        tap.send(&ethernet(STRANGER_MAC, GATEWAY_MAC, 0x0800, &[0; 46]))
            .unwrap();
        tap.send(&ethernet(GUEST_MAC, GATEWAY_MAC, 0x86dd, &[0; 46]))
            .unwrap();
        let egress = guard.counters().unwrap().egress;
        assert_eq!(egress.dropped_for(Reason::SourceMac).packets, 1);
        assert_eq!(egress.rx().packets, 2);
        assert_eq!(guard.replace(&[]).unwrap(), 2);
        let again = Guard::attach_by(Hook::Clsact, "guest", &config(Mode::Direct));
        assert!(matches!(again, Err(GuardError::AlreadyGuarded { .. })));
        guard.detach().unwrap();
        assert_eq!(filters(), [0, 0]);
        assert!(!has_qdisc(), "the guard made it");
        assert!(goes(&pins));
    });
}

#[test]
fn what_is_not_the_guards_stays() {
    with_tap(|_, _, _tap| {
        tc("qdisc add dev guest clsact").unwrap();
        let guard = attach();
        guard.detach().unwrap();
        assert!(has_qdisc(), "somebody else's");
        foreign_filter("ingress pref 2");
        let guard = attach();
        guard.verify().unwrap();
        assert_eq!(filters(), [2, 1]);
        guard.detach().unwrap();
        assert_eq!(filters(), [1, 0]);
        tc("qdisc del dev guest clsact").unwrap();

        // The guard's qdisc stays where another has come to use it.
        let guard = attach();
        foreign_filter("egress pref 7");
        guard.verify().unwrap();
        guard.detach().unwrap();
        assert_eq!(filters(), [0, 1]);
        assert!(has_qdisc());
    });
}

#[test]
fn a_hook_that_is_taken_is_refused_and_nothing_left() {
    with_tap(|_, pins, _tap| {
        for hook in ["ingress", "egress"] {
            tc("qdisc add dev guest clsact").unwrap();
            foreign_filter(&format!("{hook} pref 1"));
            let before = filters();
            let error = attach_error();
            assert_eq!(error.kind(), ErrorKind::Refused);
            let freeing = format!("filter del dev guest {hook} pref 1");
            assert!(error.to_string().contains(&freeing), "{error}");
            assert_eq!(filters(), before);
            assert!(goes(&pins));
            tc(&freeing).unwrap();
            attach().detach().unwrap();
            tc("qdisc del dev guest clsact").unwrap();
        }
        tc("qdisc add dev guest ingress").unwrap();
        let error = attach_error();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("qdisc del"), "{error}");
        assert!(goes(&pins));
        tc("qdisc del dev guest ingress").unwrap();
        attach().detach().unwrap();
    });
}

#[test]
fn a_filter_before_the_guards_shows_in_its_state() {
    with_tap(|_, pins, _tap| {
        let guard = attach();
        let watch = GuardWatch::begin(&guard).unwrap();
        // One of the same preference that is older.
        tc("filter del dev guest ingress pref 1").unwrap();
        foreign_filter("ingress pref 1");
        filter_again(
            &pins,
            NlOptions {
                priority: 9,
                ..Default::default()
            },
        );
        assert_eq!(standing(), Standing::Preceded);
        not_in_force(guard.verify(), "before it");
        not_in_force(watch.check(), "before it");
        assert_eq!(guard.status().unwrap().state, "preceded");
        tc("filter del dev guest ingress pref 1").unwrap();
        // Where it is first, its preference does not matter.
        guard.verify().unwrap();
        watch.check().unwrap();
        guard.detach().unwrap();
        assert_eq!(filters(), [0, 0]);
    });
}

#[test]
fn a_filter_that_judges_not_every_frame_is_no_guard() {
    with_tap(|_, pins, _tap| {
        let pinned = pins.join("guest/program_egress");
        let pinned = pinned.display();
        for changed in [
            format!("pref 1 handle 1 bpf object-pinned {pinned}"),
            format!("protocol ip pref 1 handle 1 bpf da object-pinned {pinned}"),
            format!("chain 3 pref 1 handle 1 bpf da object-pinned {pinned}"),
        ] {
            let guard = attach();
            tc("filter del dev guest ingress pref 1").unwrap();
            tc(&format!("filter add dev guest ingress {changed}")).unwrap();
            assert!(!standing().is_whole(), "{changed}");
            assert!(guard.verify().is_err(), "{changed}");
            tc("qdisc del dev guest clsact").unwrap();
            assert_eq!(standing(), Standing::Gone);
            Guard::remove_stale("guest", None).unwrap();
        }
    });
}

#[test]
fn what_was_cut_off_or_exchanged_is_named_and_made_whole_by_attach() {
    with_tap(|_, _, _tap| {
        let guard = attach();
        tc("filter del dev guest egress pref 1").unwrap();
        assert_eq!(standing(), Standing::Partial);
        not_in_force(guard.verify(), "only one");
        not_in_force(guard.replace(&[]), "only one");
        attach().verify().unwrap();
        assert_eq!(filters(), [1, 1]);
        assert_eq!(standing(), Standing::InForce);

        let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
        let program = foreign.program(Direction::Egress).unwrap();
        let place = SchedClassifierLink::attached(
            "guest",
            TcAttachType::Ingress,
            1,
            TcHandle::new(0, 1),
            None,
        );
        let id = program.attach_to_link(place.unwrap()).unwrap();
        std::mem::forget(program.take_link(id).unwrap());
        assert_eq!(standing(), Standing::Exchanged);
        not_in_force(Guard::open("guest"), "another program");
        // Its name is the program's, so it is taken for a stranger's.
        assert_eq!(attach_error().kind(), ErrorKind::Refused);
        tc("filter del dev guest ingress pref 1").unwrap();
        attach().verify().unwrap();

        tc("qdisc del dev guest clsact").unwrap();
        assert_eq!(standing(), Standing::Gone);
        not_in_force(Guard::open("guest"), "cut off");
        let guard = attach();
        guard.verify().unwrap();
        guard.detach().unwrap();
        assert!(!has_qdisc());
        assert!(Guard::pinned().unwrap().is_empty());
    });
}

#[test]
fn what_is_left_of_a_guard_judges_until_the_next_one_does() {
    with_tap(|_, pins, tap| {
        tap.up().unwrap();
        // As a killed attach leaves it: half, and aside.
        attach();
        tc("filter del dev guest egress pref 1").unwrap();
        fs::rename(pins.join("guest"), pins.join("guest%aside0")).unwrap();
        not_in_force(Guard::open("guest"), "interrupted");
        attach().verify().unwrap();
        assert_eq!(filters(), [1, 1]);
        assert!(!pins.join("guest%aside0").exists());

        // As a killed detach leaves it: whole, and aside.
        fs::rename(pins.join("guest"), pins.join("guest%aside0")).unwrap();
        Guard::open("guest").unwrap().verify().unwrap();

        // Without pins, as when bpffs is unmounted: the filters judge on, out of reach.
        fs::remove_dir_all(&pins).unwrap();
        assert_eq!(filters(), [1, 1]);
        assert!(matches!(
            Guard::open("guest"),
            Err(GuardError::NotGuarded { .. })
        ));
        let guard = attach();
        assert_eq!(filters(), [1, 1]);
        guard.detach().unwrap();
        assert_eq!(filters(), [0, 0]);
    });
}

#[test]
fn a_guard_does_not_follow_its_interface_to_another_namespace() {
    let elsewhere = Namespace::new("ot-clsa").unwrap();
    with_tap(|namespace, _, _tap| {
        let _veth = omerta_test_support::Veth::pair("moves", "peer").unwrap();
        let config = config(Mode::Filtered);
        Guard::attach_by(Hook::Clsact, "moves", &config).unwrap();
        namespace
            .ip(&format!("link set moves netns {}", elsewhere.name()))
            .unwrap();
        let there = elsewhere.enter(|| judging(Hook::Clsact, "moves").unwrap());
        assert_eq!(there.unwrap(), [0, 0], "the kernel removes them");
        assert_eq!(standing(), Standing::Gone);
        elsewhere
            .ip(&format!("link set moves netns {}", namespace.name()))
            .unwrap();
        assert_eq!(standing(), Standing::Gone);
        assert!(Guard::open("moves").is_err());
        let guard = Guard::attach_by(Hook::Clsact, "moves", &config).unwrap();
        guard.detach().unwrap();
    });
}

#[test]
fn a_re_created_interface_inherits_no_filter() {
    with_tap(|namespace, _, tap| {
        let old = attach();
        let ifindex = old.ifindex();
        tap.remove();
        assert_eq!(standing(), Standing::Gone);
        // The same index, and a guard of its own.
        namespace
            .ip(&format!(
                "link add other index {ifindex} type veth peer name peer"
            ))
            .unwrap();
        assert_eq!(standing(), Standing::Gone);
        Guard::attach_by(Hook::Clsact, "other", &config(Mode::Filtered)).unwrap();
        let _tap = Tap::create("guest").unwrap();
        assert!(Guard::remove_stale("guest", None).unwrap());
        let other = Guard::open("other").unwrap();
        other.verify().unwrap();
        other.detach().unwrap();
    });
}

#[test]
fn a_renamed_interface_keeps_its_guard() {
    with_tap(|namespace, _, _tap| {
        attach();
        namespace.ip("link set guest name other").unwrap();
        assert_eq!(Guard::list().unwrap(), ["other"]);
        let renamed = Guard::remove_stale("guest", None).unwrap_err();
        assert!(matches!(renamed, GuardError::Renamed { .. }), "{renamed}");
        let guard = Guard::open("other").unwrap();
        assert_eq!(guard.replace(&[]).unwrap(), 2);
        guard.detach().unwrap();
        assert!(Guard::pinned().unwrap().is_empty());
    });
}

/// Each change of a filter, of a pin and of the qdisc is an occasion to look, and is found.
#[test]
fn changes_are_told_to_who_watches() {
    let changes: [(fn(), &str); 4] = [
        (
            || drop(tc("filter del dev guest ingress pref 1").unwrap()),
            "filter was removed",
        ),
        (
            || drop(tc("qdisc del dev guest clsact").unwrap()),
            "filter was removed",
        ),
        (|| Guard::open("guest").unwrap().detach().unwrap(), "pins"),
        (
            || {
                let guard = Guard::open("guest").unwrap();
                guard.replace(&[]).map(drop).unwrap();
            },
            "its policy",
        ),
    ];
    for (change, words) in changes {
        with_tap(|_, _, _tap| {
            let guard = attach();
            let watch = GuardWatch::begin(&guard).unwrap();
            let occasions = watch.occasions().unwrap();
            watch.check().unwrap();
            occasions.take().unwrap();
            assert!(!occasions.take().unwrap(), "taken");
            change();
            let mut ready = [PollFd::new(occasions.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut ready, 10_000u16), Ok(1), "{words}");
            assert!(occasions.take().unwrap());
            not_in_force(watch.check(), words);
        });
    }
}

/// Where the kernel has TCX as well, its programs are asked first.
#[test]
fn a_tcx_program_is_before_every_filter() {
    with_tap(|_, _, _tap| {
        let guard = attach();
        guard.verify().unwrap();
        if Hook::of_this_kernel().unwrap() != Hook::Tcx {
            println!("skipped: this kernel has no TCX");
            return;
        }
        let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
        foreign
            .program(Direction::Egress)
            .unwrap()
            .attach("guest", TcAttachType::Ingress)
            .unwrap();
        assert_eq!(standing(), Standing::Preceded);
        drop(foreign);
        guard.verify().unwrap();
        guard.detach().unwrap();
    });
}
