//! Attaching, changing and removing guards; what outlives what.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use omerta_dataplane::{
    ErrorKind, Guard, GuardError, Hook, MAX_ENDPOINTS, Owner, PinnedGuard, Standing,
};
use omerta_kernel_tests::{allowlist, config, goes, remove_left_overs};
use omerta_test_support::{Namespace, Tap, Veth};
use omerta_verdict::{Endpoint, Mode, Protocol};

fn endpoints(count: usize) -> Vec<Endpoint> {
    (0..count as u32)
        .map(|i| Endpoint {
            protocol: Protocol::Udp,
            address: IpAddr::from(Ipv4Addr::from(0x6440_0000 + i)).into(),
            port: 7,
        })
        .collect()
}

/// Runs `work` in a namespace of its own that has a tap `guest`.
fn with_tap(work: impl FnOnce(&Namespace, Tap) + Send) {
    let namespace = Namespace::new("ot-life").unwrap();
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let tap = Tap::create("guest").unwrap();
            work(&namespace, tap);
        })
        .unwrap();
}

fn pins(namespace: &Namespace, interface: &str) -> bool {
    let inode = namespace.inode().unwrap();
    Path::new(&format!("/sys/fs/bpf/omerta/{inode}/{interface}")).exists()
}

#[test]
fn a_guard_outlives_its_handle_and_ends_with_detach() {
    with_tap(|namespace, _tap| {
        drop(Guard::attach("guest", &config(Mode::Filtered)).unwrap());
        assert!(pins(namespace, "guest"));
        let guard = Guard::open("guest").unwrap();
        guard.verify().unwrap();
        assert_eq!(Guard::list().unwrap(), ["guest"]);
        let status = guard.status().unwrap();
        assert_eq!(
            (status.mode, status.epoch, status.egress.rx),
            ("filtered", 1, 0)
        );
        guard.detach().unwrap();
        assert!(!pins(namespace, "guest"));
        assert!(matches!(
            Guard::open("guest"),
            Err(GuardError::NotGuarded { .. })
        ));
        assert!(Guard::list().unwrap().is_empty());
    });
}

/// Such had programs of their own, a note of their mark, and no place among others.
#[test]
fn a_guard_of_an_earlier_build_is_refused_to_be_changed_and_can_be_removed() {
    with_tap(|namespace, _tap| {
        let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        let inode = namespace.inode().unwrap();
        let pins = format!("/sys/fs/bpf/omerta/{inode}/guest");
        symlink("12345", format!("{pins}/mark")).unwrap();
        for (note, text) in [("layout", "1-2"), ("programs", "0123456789abcdef")] {
            fs::remove_file(format!("{pins}/{note}")).unwrap();
            symlink(text, format!("{pins}/{note}")).unwrap();
        }
        let refused = guard.allow(&endpoints(1)).unwrap_err();
        assert!(
            matches!(refused, GuardError::OtherPolicyLayout { .. }),
            "{refused}"
        );
        assert!(guard.upgrade().is_err());
        guard.verify().unwrap();
        Guard::open("guest").unwrap().detach().unwrap();
        assert!(goes(format!("/sys/fs/bpf/omerta/{inode}")));
    });
}

#[test]
fn an_upgrade_keeps_policy_counters_and_identity() {
    with_tap(|_, tap| {
        let mut wanted = config(Mode::Conntrack);
        wanted.allow = endpoints(500);
        wanted.lease = Some(Duration::from_secs(3600));
        let guard = Guard::attach("guest", &wanted).unwrap();
        tap.up().unwrap();
        tap.send(&[0; 60]).unwrap();
        let before = guard.status().unwrap();
        assert_eq!((before.egress.rx, before.programs), (1, "current"));
        guard.upgrade().unwrap();
        guard.verify().unwrap();
        let after = guard.status().unwrap();
        assert_eq!(after.egress.rx, 1);
        assert_eq!((after.epoch, &after.allow), (before.epoch, &before.allow));
        assert_eq!(after.lease.unwrap().expired, before.lease.unwrap().expired);
        // The same guard still, with room for flows, which counts on and changes.
        tap.send(&[0; 60]).unwrap();
        assert_eq!(guard.counters().unwrap().egress.rx().packets, 2);
        guard.set_mode(Mode::Filtered).unwrap();
        guard.set_mode(Mode::Conntrack).unwrap();
        guard.replace(&endpoints(3)).unwrap();
        let identity = guard.identity();
        guard.upgrade().unwrap();
        assert_eq!(Guard::open("guest").unwrap().identity(), identity);
        guard.detach().unwrap();
        assert!(Guard::pinned().unwrap().is_empty());
    });
}

#[test]
fn a_handle_that_outlives_its_guard_leaves_no_directory() {
    with_tap(|namespace, _tap| {
        let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        Guard::open("guest").unwrap().detach().unwrap();
        assert!(guard.status().is_err());
        let inode = namespace.inode().unwrap();
        assert!(goes(format!("/sys/fs/bpf/omerta/{inode}")));
    });
}

#[test]
fn a_guarded_interface_is_refused_and_left_alone() {
    with_tap(|_, _tap| {
        let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        let refused = Guard::attach("guest", &config(Mode::Direct));
        assert!(matches!(refused, Err(GuardError::AlreadyGuarded { .. })));
        guard.verify().unwrap();
        assert_eq!(guard.status().unwrap().mode, "filtered");
        guard.detach().unwrap();
    });
}

#[test]
fn unknown_interfaces_and_bad_configurations_leave_nothing() {
    with_tap(|namespace, _tap| {
        assert!(matches!(
            Guard::attach("nosuch", &config(Mode::Filtered)),
            Err(GuardError::NoInterface { .. })
        ));
        let base = config(Mode::Filtered);
        let mut group = base.clone();
        group.mac.0[0] |= 1;
        let mut none = base.clone();
        none.addresses.clear();
        let mut many = base.clone();
        many.addresses = (1..=9)
            .map(|i| format!("10.1.0.{i}").parse().unwrap())
            .collect();
        let mut twice = base.clone();
        twice.addresses.push(base.addresses[0]);
        let mut gateways = base.clone();
        gateways.gateways.push("10.77.0.9".parse().unwrap());
        let mut own = base.clone();
        own.gateways = vec![base.addresses[0]];
        for bad in [group, none, many, twice, gateways, own] {
            assert!(
                matches!(Guard::attach("guest", &bad), Err(GuardError::Config { .. })),
                "{bad:?}"
            );
        }
        let mut full = base.clone();
        full.allow = endpoints(MAX_ENDPOINTS + 1);
        assert!(matches!(
            Guard::attach("guest", &full),
            Err(GuardError::AllowlistFull { .. })
        ));
        assert!(!pins(namespace, "guest"));
    });
}

#[test]
fn the_allowlist_changes_all_or_nothing() {
    with_tap(|_, _tap| {
        let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        let listed = |guard: &Guard| guard.status().unwrap().allow;
        let before = listed(&guard);
        assert_eq!(before.len(), allowlist().len());
        let [first, second] = [endpoints(2)[0], endpoints(2)[1]];

        assert_eq!(guard.allow(&[first]).unwrap(), 2);
        assert_eq!(
            guard.allow(&[first]).unwrap(),
            2,
            "what is listed already changes nothing"
        );
        assert!(matches!(
            guard.revoke(&[first, second]),
            Err(GuardError::NotListed { .. })
        ));
        assert_eq!(listed(&guard).len(), before.len() + 1);
        assert_eq!(guard.revoke(&[first]).unwrap(), 3);
        assert_eq!(listed(&guard), before);

        // It grows to what it is given.
        let many = endpoints(20_000);
        assert_eq!(guard.replace(&many).unwrap(), 4);
        assert_eq!(listed(&guard).len(), many.len());
        let refused = guard.replace(&endpoints(MAX_ENDPOINTS + 1));
        assert!(matches!(refused, Err(GuardError::AllowlistFull { .. })));
        assert_eq!(listed(&guard).len(), many.len());
        assert_eq!(guard.status().unwrap().epoch, 4);
        assert_eq!(guard.replace(&[]).unwrap(), 5);
        assert!(listed(&guard).is_empty());
        guard.detach().unwrap();
    });
}

#[test]
fn a_reader_of_counters_tells_that_its_guard_was_exchanged() {
    with_tap(|_, _tap| {
        let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        let reader = guard.counter_reader().unwrap();
        assert!(reader.is_current());
        assert_eq!(reader.read().unwrap(), guard.counters().unwrap());
        guard.detach().unwrap();
        assert!(!reader.is_current());
        let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        assert!(!reader.is_current());
        assert!(guard.counter_reader().unwrap().is_current());
        guard.detach().unwrap();
    });
}

#[test]
fn a_re_created_tap_does_not_inherit_a_guard() {
    with_tap(|namespace, tap| {
        let old = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        tap.remove();
        assert!(old.verify().is_err());
        let _tap = Tap::create("guest").unwrap();
        assert!(old.verify().is_err(), "the pins are of another interface");
        assert!(Guard::open("guest").is_err());
        assert!(Guard::list().unwrap().is_empty());
        assert!(pins(namespace, "guest"), "left over");
        // Attaching replaces what is left over.
        Guard::attach("guest", &config(Mode::Filtered))
            .unwrap()
            .verify()
            .unwrap();
        Guard::open("guest").unwrap().detach().unwrap();
    });
}

#[test]
fn what_is_left_of_a_vanished_interface_is_removed() {
    with_tap(|namespace, tap| {
        Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        assert!(!Guard::remove_stale("guest", None).unwrap(), "in force");
        tap.remove();
        assert!(Guard::remove_stale("guest", None).unwrap());
        assert!(!pins(namespace, "guest"));
    });
}

#[test]
fn interfaces_with_dots_and_veths_can_be_guarded() {
    let namespace = Namespace::new("ot-dots").unwrap();
    namespace
        .enter(|| {
            let _veth = Veth::pair("v.100", "peer").unwrap();
            Guard::attach("v.100", &config(Mode::Sampled)).unwrap();
            assert_eq!(Guard::list().unwrap(), ["v.100"]);
            Guard::open("v.100").unwrap().detach().unwrap();
        })
        .unwrap();
}

#[test]
fn a_renamed_interface_keeps_its_guard_whatever_is_done_under_the_old_name() {
    let renamed = |error: GuardError| {
        assert!(matches!(&error, GuardError::Renamed { now, .. } if now == "other"));
        assert_eq!(error.kind(), ErrorKind::Refused);
    };
    with_tap(|namespace, tap| {
        Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        namespace.ip("link set guest name other").unwrap();
        renamed(Guard::remove_stale("guest", None).unwrap_err());
        let second = Tap::create("guest").unwrap();
        renamed(Guard::remove_stale("guest", None).unwrap_err());
        renamed(Guard::open("guest").unwrap_err());
        let new = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        assert_eq!(Guard::list().unwrap(), ["guest", "other"]);
        assert_eq!(new.replace(&[]).unwrap(), 2);
        assert_eq!(Guard::open("other").unwrap().status().unwrap().epoch, 1);
        Guard::open("guest").unwrap().detach().unwrap();
        assert_eq!(Guard::list().unwrap(), ["other"]);
        Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        drop(second);
        std::thread::sleep(Duration::from_millis(100));
        assert!(Guard::remove_stale("guest", None).unwrap());
        renamed(Guard::remove_stale("guest", None).unwrap_err());
        std::thread::sleep(Duration::from_millis(100));
        namespace.ip("link set other name guest").unwrap();
        Guard::open("guest").unwrap().verify().unwrap();
        Guard::open("guest").unwrap().detach().unwrap();
        tap.remove();
    });
}

#[test]
fn a_renamed_interface_is_guarded_under_its_new_name() {
    with_tap(|namespace, _tap| {
        let mut owned = config(Mode::Filtered);
        owned.owner = Some("omertad".parse().unwrap());
        let old = Guard::attach("guest", &owned).unwrap();
        namespace.ip("link set guest name other").unwrap();
        assert!(matches!(
            Guard::attach("other", &owned),
            Err(GuardError::AlreadyGuarded { .. })
        ));
        assert_eq!(Guard::list().unwrap(), ["other"]);
        assert_eq!(
            Guard::pinned().unwrap(),
            [PinnedGuard {
                interface: "other".into(),
                owner: owned.owner.clone(),
                standing: Standing::InForce
            }]
        );
        assert!(old.detach().is_err(), "it names an interface that is gone");
        let guard = Guard::open_as("other", &owned.owner.unwrap()).unwrap();
        guard.verify().unwrap();
        assert_eq!(guard.status().unwrap().interface, "other");
        assert_eq!(guard.replace(&[]).unwrap(), 2);
        guard.detach().unwrap();
        assert!(Guard::list().unwrap().is_empty());
        assert!(!pins(namespace, "guest"));
        assert!(!pins(namespace, "other"));
    });
}

#[test]
fn a_handle_never_reaches_the_guard_that_came_after_its_own() {
    with_tap(|_, _tap| {
        let old = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        Guard::open("guest").unwrap().detach().unwrap();
        let new = Guard::attach("guest", &config(Mode::Direct)).unwrap();
        for error in [
            old.replace(&[]).unwrap_err(),
            old.verify().unwrap_err(),
            old.detach().unwrap_err(),
        ] {
            assert!(matches!(error, GuardError::Replaced { .. }), "{error}");
            assert_eq!(error.kind(), ErrorKind::Refused);
        }
        new.verify().unwrap();
        assert_eq!(new.status().unwrap().epoch, 1);
        new.detach().unwrap();
    });
}

#[test]
fn what_no_guard_pinned_is_named_and_nothing_removed() {
    with_tap(|namespace, tap| {
        Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        let place = format!("/sys/fs/bpf/omerta/{}/guest", namespace.inode().unwrap());
        let foreign = format!("{place}/foreign");
        std::fs::create_dir(&foreign).unwrap();
        let refused = |result: Result<(), GuardError>| {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            let text = error.to_string();
            assert!(text.contains(&format!("{foreign} ")), "{text}");
            assert!(text.contains("rm -r"), "{text}");
        };
        refused(Guard::open("guest").unwrap().detach());
        Guard::open("guest").unwrap().verify().unwrap();
        tap.remove();
        refused(Guard::remove_stale("guest", None).map(drop));
        let _tap = Tap::create("guest").unwrap();
        refused(Guard::attach("guest", &config(Mode::Filtered)).map(drop));
        std::fs::remove_dir(&foreign).unwrap();
        Guard::attach("guest", &config(Mode::Filtered))
            .unwrap()
            .detach()
            .unwrap();
        assert!(!pins(namespace, "guest"));
    });
}

#[test]
fn an_interface_that_moved_away_is_not_opened_by_its_pins() {
    let elsewhere = Namespace::new("ot-away").unwrap();
    with_tap(|namespace, _tap| {
        let _veth = Veth::pair("moves", "peer").unwrap();
        let stale = Guard::attach("moves", &config(Mode::Filtered)).unwrap();
        namespace
            .ip(&format!("link set moves netns {}", elsewhere.name()))
            .unwrap();
        if Hook::of_this_kernel().unwrap() == Hook::Clsact {
            // The kernel removes filters from what moves.
            stale.detach().unwrap();
            assert!(!pins(namespace, "moves"));
            return;
        }
        assert!(matches!(
            Guard::remove_stale("moves", None),
            Err(GuardError::Elsewhere { .. })
        ));
        assert!(matches!(stale.detach(), Err(GuardError::Elsewhere { .. })));
        elsewhere
            .ip(&format!("link set moves netns {}", namespace.name()))
            .unwrap();
        Guard::open("moves").unwrap().detach().unwrap();
    });
}

#[test]
fn an_owned_guard_is_changed_and_removed_by_its_owner_alone() {
    with_tap(|namespace, _tap| {
        let owner: Owner = "omertad".parse().unwrap();
        let other: Owner = "other".parse().unwrap();
        let mut owned = config(Mode::Filtered);
        owned.owner = Some(owner.clone());
        let ours = Guard::attach("guest", &owned).unwrap();
        let refused = |result: Result<u64, GuardError>| {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains("omertad"), "{error}");
            assert!(error.to_string().contains("omerta vm stop"), "{error}");
        };
        let [first, second] = [endpoints(2)[0], endpoints(2)[1]];
        let anybody = Guard::open("guest").unwrap();
        let before = anybody.status().unwrap();
        assert_eq!(before.owner.as_deref(), Some("omertad"));
        refused(anybody.allow(&[first]));
        refused(anybody.revoke(&allowlist()));
        refused(anybody.replace(&[]));
        refused(anybody.detach().map(|()| 0));
        refused(Guard::open_as("guest", &other).map(|_| 0));
        assert_eq!(ours.status().unwrap().allow, before.allow);
        assert_eq!(
            Guard::pinned().unwrap(),
            [PinnedGuard {
                interface: "guest".into(),
                owner: Some(owner.clone()),
                standing: Standing::InForce
            }]
        );

        ours.allow(&[first]).unwrap();
        let again = Guard::open_as("guest", &owner).unwrap();
        again.allow(&[second]).unwrap();
        again.detach().unwrap();
        assert!(!pins(namespace, "guest"));

        // Nobody's guard is not the owner's to take.
        Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        let error = Guard::open_as("guest", &owner).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        Guard::open("guest").unwrap().detach().unwrap();
    });
}

#[test]
fn what_an_owner_left_behind_is_found_without_its_help() {
    with_tap(|namespace, tap| {
        let mut owned = config(Mode::Filtered);
        owned.owner = Some("omertad".parse().unwrap());
        Guard::attach("guest", &owned).unwrap();
        tap.remove();
        let found = Guard::pinned().unwrap();
        assert_eq!(
            found,
            [PinnedGuard {
                interface: "guest".into(),
                owner: owned.owner,
                standing: Standing::Gone
            }]
        );
        assert!(Guard::remove_stale("guest", None).unwrap());
        assert!(!pins(namespace, "guest"));
    });
}
