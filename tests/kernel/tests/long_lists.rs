//! Allowlists that are too long to stand beside the policy are changed as short ones are.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr};

use omerta_dataplane::{ErrorKind, Guard};
use omerta_kernel_tests::{config, remove_left_overs};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::{Endpoint, Mode, Protocol};

fn endpoints(range: std::ops::Range<u32>) -> Vec<Endpoint> {
    range
        .map(|index| Endpoint {
            protocol: Protocol::Tcp,
            address: IpAddr::from(Ipv4Addr::from(0x6440_0000 + index)).into(),
            port: 7,
        })
        .collect()
}

fn with_guard(work: impl FnOnce(&Guard) + Send) {
    let namespace = Namespace::new("ot-long").unwrap();
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let _tap = Tap::create("guest").unwrap();
            let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
            work(&guard);
            guard.detach().unwrap();
        })
        .unwrap();
}

/// The allowlist in force is `listed`, at `epoch`.
fn holds(guard: &Guard, epoch: u64, listed: &[Endpoint]) {
    let status = guard.status().unwrap();
    let mut shown: Vec<Endpoint> = status.allow.iter().map(|e| e.parse().unwrap()).collect();
    shown.sort_unstable();
    assert!(shown == listed, "{} of {}", shown.len(), listed.len());
    assert_eq!(status.epoch, epoch);
}

#[test]
fn a_long_list_is_edited_and_what_changes_nothing_keeps_its_epoch() {
    with_guard(|guard| {
        let all = endpoints(0..5000);
        assert_eq!(guard.replace(&all).unwrap(), 2);
        holds(guard, 2, &all);
        let turned: Vec<_> = all.iter().rev().chain(&all[..9]).copied().collect();
        assert_eq!(guard.replace(&turned).unwrap(), 2);
        assert_eq!(guard.allow(&all[7..9]).unwrap(), 2);
        assert_eq!(guard.revoke(&[]).unwrap(), 2);
        holds(guard, 2, &all);

        assert_eq!(guard.revoke(&[all[4999], all[4999]]).unwrap(), 3);
        holds(guard, 3, &all[..4999]);
        let again = guard.revoke(&[all[0], all[4999]]).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::NotFound);
        assert_eq!(guard.allow(&[all[4999], all[4999], all[0]]).unwrap(), 4);
        holds(guard, 4, &all);
        assert_eq!(guard.set_mode(Mode::Direct).unwrap(), 5);
        holds(guard, 5, &all);

        // Into an array that was longer, and beside the policy.
        assert_eq!(guard.replace(&all[1000..3000]).unwrap(), 6);
        holds(guard, 6, &all[1000..3000]);
        assert_eq!(guard.replace(&all[..96]).unwrap(), 7);
        holds(guard, 7, &all[..96]);
        assert_eq!(guard.allow(&all[96..97]).unwrap(), 8);
        holds(guard, 8, &all[..97]);
    });
}

#[test]
fn a_list_that_names_each_endpoint_many_times_holds_it_once() {
    with_guard(|guard| {
        let all = endpoints(0..50);
        guard.replace(&all.repeat(100)).unwrap();
        holds(guard, 2, &all);
        // Also where it is longer than any list may be.
        let all = endpoints(0..600);
        guard.replace(&all.repeat(2000)).unwrap();
        holds(guard, 3, &all);
    });
}
