//! Guards that the same programs judge for: each by its own policy alone, whatever place it has.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;

use omerta_dataplane::{Guard, GuardConfig, GuardError};
use omerta_kernel_tests::{
    CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, STRANGER, config, ethernet, udp,
};
use omerta_test_support::{FrameSender, Namespace, ip};
use omerta_verdict::{Endpoint, GUARDS, Mode, Reason};

const FIRST: u32 = 101;
/// It would have the same place, if indices alone gave places.
const SECOND: u32 = FIRST + GUARDS as u32;

/// A veth of that index, and the way into it.
fn wire(name: &str, index: u32) -> FrameSender {
    let far = format!("{name}-far");
    ip(&format!(
        "link add {name} index {index} type veth peer name {far}"
    ))
    .unwrap();
    for end in [name, &far] {
        ip(&format!("link set {end} up")).unwrap();
    }
    FrameSender::open(&far).unwrap()
}

fn with_wires(test: impl FnOnce([FrameSender; 2]) + Send) {
    let namespace = Namespace::new("ot-places").unwrap();
    namespace.disable_ipv6().unwrap();
    namespace
        .enter(|| test([wire("first", FIRST), wire("second", SECOND)]))
        .unwrap();
}

/// What the guest of a guard may send, to that address.
fn datagram(to: Ipv4Addr) -> Vec<u8> {
    let packet = Ipv4::new(GUEST, to, 17).packet(&udp(4000, CONSUMER_PORT, b"omerta"));
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

fn only(to: Ipv4Addr) -> GuardConfig {
    GuardConfig {
        allow: vec![format!("udp:{to}:{CONSUMER_PORT}").parse().unwrap()],
        ..config(Mode::Filtered)
    }
}

/// How much a guard has allowed, and dropped as for no endpoint.
fn judged(guard: &Guard) -> [u64; 2] {
    let egress = guard.counters().unwrap().egress;
    assert_eq!(egress.rx(), egress.outcomes());
    let dropped = egress.dropped_for(Reason::Endpoint);
    [egress.allowed.packets, dropped.packets]
}

#[test]
fn interfaces_whose_indices_lead_to_one_place_are_judged_each_by_its_own_policy() {
    with_wires(|wires| {
        let guards = [
            Guard::attach("first", &only(CONSUMER)).unwrap(),
            Guard::attach("second", &only(STRANGER)).unwrap(),
        ];
        for wire in &wires {
            for to in [CONSUMER, CONSUMER, STRANGER] {
                wire.send(&datagram(to)).unwrap();
            }
        }
        assert_eq!(guards.each_ref().map(judged), [[2, 1], [1, 2]]);
        for guard in guards {
            guard.detach().unwrap();
        }
    });
}

/// The programs of a guard that was removed run on where somebody holds its links. Its place is another's by then.
#[test]
fn programs_whose_guard_is_gone_drop_everything_and_touch_no_guard_that_came_after() {
    with_wires(|[first, second]| {
        let gone = Guard::attach("first", &only(CONSUMER)).unwrap();
        let held = gone.hold().unwrap();
        gone.detach().unwrap();
        // Nobody has the place, and the programs that judge may be gone with the last guard.
        first.send(&datagram(CONSUMER)).unwrap();
        let after = Guard::attach("second", &only(CONSUMER)).unwrap();
        for _ in 0..3 {
            first.send(&datagram(CONSUMER)).unwrap();
        }
        assert_eq!(judged(&after), [0, 0]);
        second.send(&datagram(CONSUMER)).unwrap();
        assert_eq!(judged(&after), [1, 0]);
        assert!(held.is_on(FIRST).unwrap());
        after.detach().unwrap();
    });
}

/// Where the programs are still there, what they drop so is counted.
#[test]
fn what_comes_from_an_interface_whose_guard_is_gone_is_counted() {
    with_wires(|[first, _second]| {
        let stays = Guard::attach("second", &only(CONSUMER)).unwrap();
        let gone = Guard::attach("first", &only(CONSUMER)).unwrap();
        let held = gone.hold().unwrap();
        gone.detach().unwrap();
        let before = Guard::unguarded().unwrap().packets;
        for _ in 0..3 {
            first.send(&datagram(CONSUMER)).unwrap();
        }
        assert_eq!(Guard::unguarded().unwrap().packets - before, 3);
        assert_eq!(judged(&stays), [0, 0]);
        drop(held);
        stays.detach().unwrap();
    });
}

/// The programs are there as long as a guard is.
#[test]
fn programs_go_with_the_last_guard_and_come_with_the_next() {
    with_wires(|[first, _second]| {
        for _ in 0..2 {
            let guard = Guard::attach("first", &only(CONSUMER)).unwrap();
            first.send(&datagram(CONSUMER)).unwrap();
            assert_eq!(judged(&guard), [1, 0]);
            guard.detach().unwrap();
            assert!(Guard::pinned().unwrap().is_empty());
        }
    });
}

/// Another guard has the same place in a directory of the same name, where somebody has removed the first one's.
#[test]
fn a_guard_whose_programs_directory_was_removed_neither_reads_nor_writes_another_guards_list() {
    with_wires(|[first, second]| {
        let list = |network: u32| -> Vec<Endpoint> {
            let of = |host| format!("udp:{}:{CONSUMER_PORT}", Ipv4Addr::from(network + host));
            (1..=300).map(|host| of(host).parse().unwrap()).collect()
        };
        let (old, new) = (list(0xc633_6400), list(0xcb00_7100));
        let cut_off = Guard::attach("first", &only(CONSUMER)).unwrap();
        cut_off.replace(&old).unwrap();
        let inode = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        let namespace = format!("/sys/fs/bpf/omerta/{inode}");
        for entry in std::fs::read_dir(&namespace).unwrap() {
            let path = entry.unwrap().path();
            if path.to_string_lossy().contains(":programs") {
                std::fs::remove_dir_all(path).unwrap();
            }
        }
        let after = Guard::attach("second", &only(CONSUMER)).unwrap();
        after.replace(&new).unwrap();
        for edit in [&old[..299], &old, &old[..298]] {
            let refused = cut_off.replace(edit);
            assert!(
                matches!(refused, Err(GuardError::ProgramsLost { .. })),
                "{refused:?}"
            );
        }
        assert!(cut_off.status().is_err());
        let mut shown = after.status().unwrap().allow;
        shown.sort_unstable();
        let mut wanted: Vec<_> = new.iter().map(ToString::to_string).collect();
        wanted.sort_unstable();
        assert!(shown == wanted);
        // Both judge by their own.
        for (wire, guard, to) in [
            (&first, &cut_off, Ipv4Addr::from(0xc633_6401)),
            (&second, &after, Ipv4Addr::from(0xcb00_7101)),
        ] {
            wire.send(&datagram(to)).unwrap();
            assert_eq!(judged(guard), [1, 0]);
        }
        for guard in [cut_off, after] {
            guard.detach().unwrap();
        }
        assert!(Guard::pinned().unwrap().is_empty());
    });
}
