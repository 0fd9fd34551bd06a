//! Early drops at the uplink: what the guard would drop for its endpoint, and nothing else.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::net::Ipv4Addr;
use std::sync::Arc;

use omerta_dataplane::{AtUplink, Guard, Hook, Uplink, UplinkHook};
use omerta_kernel_tests::{
    CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Generator, Ipv4, STRANGER, allowlist,
    config, ethernet, remove_left_overs, tcp, udp,
};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::{
    Bucket, Endpoint, INLINE_BUCKETS, Mac, MemoryGuard, Mode, Protocol, Reason, Table, Verdict,
    ingress,
};

const ROUTER: Mac = Mac([0x52, 0x54, 0, 0, 0, 0xcc]);
const UPLINK: Mac = Mac([0x52, 0x54, 0, 0, 0, 0xdd]);

/// A host that routes for a guarded guest, and what its uplink hears.
struct Host {
    uplink: Tap,
    program: Arc<Uplink>,
    guard: Guard,
    _guest: Tap,
}

/// Where a frame to the guest ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Uplink,
    Guard(Reason),
    Allowed,
    Stack,
}

/// By each hook.
fn with_host(mode: Mode, work: impl Fn(&Host, &Namespace) + Sync) {
    if Hook::of_this_kernel().unwrap() != Hook::Tcx {
        println!("skipped: this kernel has no TCX");
        return;
    }
    for hook in [UplinkHook::Tcx, UplinkHook::Xdp] {
        let namespace = Namespace::new("ot-uplink").unwrap();
        namespace.disable_ipv6().unwrap();
        namespace.enable_forwarding().unwrap();
        let run = || {
            let host = Host::new(&namespace, mode, hook);
            work(&host, &namespace);
            host.guard.detach().unwrap();
        };
        namespace.enter(run).unwrap();
    }
}

impl Host {
    fn new(namespace: &Namespace, mode: Mode, hook: UplinkHook) -> Self {
        remove_left_overs().unwrap();
        let [uplink, guest] = ["uplink", "guest"].map(|name| Tap::create(name).unwrap());
        for step in [
            &format!("link set uplink address {UPLINK}"),
            &format!("link set guest address {GATEWAY_MAC}"),
            "link set uplink up",
            "link set guest up",
            "addr add 203.0.113.1/24 dev uplink",
            "addr add 10.77.0.1/32 dev guest",
            &format!("route add {GUEST}/32 dev guest"),
            "route add default dev uplink",
            &format!("neigh replace {GUEST} lladdr {GUEST_MAC} dev guest nud permanent"),
        ] {
            namespace.ip(step).unwrap();
        }
        let program = Uplink::attach(&["uplink".to_owned()], hook).unwrap();
        let (_, by, _) = program.interfaces().next().unwrap();
        assert_eq!(by, hook);
        Self {
            uplink,
            program,
            guard: Guard::attach("guest", &config(mode)).unwrap(),
            _guest: guest,
        }
    }

    fn enter(&self) -> AtUplink {
        self.program.enter(&self.guard).unwrap()
    }

    fn end_of(&self, at: Option<&AtUplink>, frame: &[u8]) -> End {
        let early = || at.map_or(0, |at| at.dropped().unwrap().packets);
        let (before, early_before) = (self.guard.counters().unwrap().ingress, early());
        self.uplink.send(frame).unwrap();
        let after = self.guard.counters().unwrap().ingress;
        match early() - early_before {
            0 => {}
            1 => {
                assert_eq!(after, before);
                return End::Uplink;
            }
            more => panic!("{more} drops of a frame"),
        }
        if after.allowed.packets > before.allowed.packets {
            return End::Allowed;
        }
        let dropped = Reason::ALL
            .iter()
            .find(|reason| after.dropped_for(**reason) != before.dropped_for(**reason));
        dropped.map_or(End::Stack, |reason| End::Guard(*reason))
    }
}

fn packet(packet: &[u8]) -> Vec<u8> {
    ethernet(ROUTER, UPLINK, 0x0800, packet)
}

fn datagram(from: Ipv4Addr, port: u16) -> Vec<u8> {
    packet(&Ipv4::new(from, GUEST, 17).packet(&udp(port, 40000, &[0; 22])))
}

#[test]
fn what_is_of_no_endpoint_ends_at_the_uplink_and_all_else_at_the_tap() {
    with_host(Mode::Filtered, |host, _| {
        let (good, bad) = (datagram(CONSUMER, CONSUMER_PORT), datagram(STRANGER, 1));
        assert_eq!(host.end_of(None, &bad), End::Guard(Reason::Endpoint));

        let at = host.enter();
        assert_eq!(host.end_of(Some(&at), &good), End::Allowed);
        assert_eq!(host.end_of(Some(&at), &bad), End::Uplink);
        assert_eq!(host.end_of(Some(&at), &datagram(CONSUMER, 1)), End::Uplink);
        let segment = packet(&Ipv4::new(STRANGER, GUEST, 6).packet(&tcp(443, 40000)));
        assert_eq!(host.end_of(Some(&at), &segment), End::Uplink);
        assert_eq!(at.dropped().unwrap().packets, 3);

        // What the guard drops for something else is its own to tell.
        let mut fragment = Ipv4::new(STRANGER, GUEST, 17);
        fragment.fragment = 0x2000;
        let fragment = packet(&fragment.packet(&udp(1, 40000, &[0; 22])));
        assert_eq!(
            host.end_of(Some(&at), &fragment),
            End::Guard(Reason::Fragment)
        );
        let own = datagram(GUEST, 1);
        assert_ne!(host.end_of(Some(&at), &own), End::Uplink);
        // Neither for this host nor for the guest.
        let passing = ethernet(ROUTER, ROUTER, 0x0800, &bad[14..]);
        assert_eq!(host.end_of(Some(&at), &passing), End::Stack);
        let other = packet(&Ipv4::new(STRANGER, CONSUMER, 17).packet(&udp(1, 2, &[0; 22])));
        assert_eq!(host.end_of(Some(&at), &other), End::Stack);

        drop(at);
        assert_eq!(host.end_of(None, &bad), End::Guard(Reason::Endpoint));
    });
}

#[test]
fn whatever_arrives_ends_at_the_uplink_only_where_the_verdict_drops_it_for_its_endpoint() {
    const FRAMES: usize = 5_000;
    with_host(Mode::Filtered, |host, _| {
        let at = host.enter();
        let mut policy = config(Mode::Filtered).policy("guest").unwrap();
        policy.table_mask = INLINE_BUCKETS as u32 - 1;
        let mut buckets = [Bucket::EMPTY; INLINE_BUCKETS];
        let mut table = Table::new(&mut buckets, policy.table_seed).unwrap();
        assert!(allowlist().iter().all(|endpoint| table.insert(endpoint)));
        let guard = MemoryGuard::new(&policy, &buckets);
        let (mut frames, mut ended) = (Generator::new(7), 0);
        for _ in 0..FRAMES {
            let mut frame = frames.frame();
            frame[..6].copy_from_slice(&UPLINK.0);
            let before = at.dropped().unwrap().packets;
            host.uplink.send(&frame).unwrap();
            if at.dropped().unwrap().packets == before {
                continue;
            }
            ended += 1;
            frame[..6].copy_from_slice(&GUEST_MAC.0);
            frame[6..12].copy_from_slice(&GATEWAY_MAC.0);
            let verdict = ingress(&frame[..], &guard);
            assert_eq!(verdict, Verdict::Drop(Reason::Endpoint), "{frame:02x?}");
        }
        assert!(ended > FRAMES / 100, "{ended} of {FRAMES}");
    });
}

#[test]
fn the_uplink_judges_by_the_policy_in_force() {
    with_host(Mode::Filtered, |host, _| {
        let at = host.enter();
        let frame = datagram(STRANGER, 7);
        let stranger = Endpoint {
            protocol: Protocol::Udp,
            address: std::net::IpAddr::from(STRANGER).into(),
            port: 7,
        };
        for _ in 0..10 {
            assert_eq!(host.end_of(Some(&at), &frame), End::Uplink);
            host.guard.allow(&[stranger]).unwrap();
            assert_eq!(host.end_of(Some(&at), &frame), End::Allowed);
            host.guard.revoke(&[stranger]).unwrap();
        }
        // A list that is not beside its policy is looked up at the tap alone.
        let long: Vec<_> = (1..=200)
            .map(|port| Endpoint { port, ..stranger })
            .collect();
        host.guard.replace(&long).unwrap();
        assert_eq!(host.end_of(Some(&at), &frame), End::Allowed);
        let unlisted = datagram(STRANGER, 300);
        let by_guard = End::Guard(Reason::Endpoint);
        assert_eq!(host.end_of(Some(&at), &unlisted), by_guard);
        host.guard.replace(&long[..10]).unwrap();
        assert_eq!(host.end_of(Some(&at), &unlisted), End::Uplink);
        host.guard.set_mode(Mode::Direct).unwrap();
        assert_eq!(host.end_of(Some(&at), &unlisted), End::Allowed);
    });
}

#[test]
fn flows_are_the_guards_to_judge() {
    with_host(Mode::Conntrack, |host, _| {
        let at = host.enter();
        let listed = datagram(CONSUMER, CONSUMER_PORT);
        assert_eq!(host.end_of(Some(&at), &listed), End::Guard(Reason::NoFlow));
        assert_eq!(host.end_of(Some(&at), &datagram(STRANGER, 1)), End::Uplink);
    });
}

#[test]
fn an_address_is_of_one_guest_and_may_become_anothers() {
    with_host(Mode::Filtered, |host, namespace| {
        let other = Tap::create("other").unwrap();
        let guard = Guard::attach("other", &config(Mode::Filtered)).unwrap();
        let first = host.enter();
        assert!(host.program.enter(&guard).is_err());
        assert_eq!(
            host.end_of(Some(&first), &datagram(STRANGER, 1)),
            End::Uplink
        );
        drop(first);
        let second = host.program.enter(&guard).unwrap();
        assert_eq!(second.dropped().unwrap().packets, 0);
        assert!(host.program.enter(&host.guard).is_err());
        drop(second);
        guard.detach().unwrap();
        drop(other);

        // Where its interface goes, it drops nothing more, and says so.
        let runs = || {
            host.program
                .interfaces()
                .map(|(_, _, runs)| runs)
                .collect::<Vec<_>>()
        };
        assert_eq!(runs(), [true]);
        namespace.ip("link del uplink").unwrap();
        assert_eq!(runs(), [false]);
    });
}

#[test]
fn where_xdp_is_taken_the_program_is_put_on_the_tcx_hook() {
    if Hook::of_this_kernel().unwrap() != Hook::Tcx {
        println!("skipped: this kernel has no TCX");
        return;
    }
    let namespace = Namespace::new("ot-uplink").unwrap();
    let attach_twice = || {
        let _tap = Tap::create("uplink").unwrap();
        let attach = || Uplink::attach(&["uplink".to_owned()], UplinkHook::Xdp).unwrap();
        let both = [attach(), attach()];
        both.map(|program| {
            let (_, hook, runs) = program.interfaces().next().unwrap();
            (hook, runs)
        })
    };
    let hooks = namespace.enter(attach_twice).unwrap();
    assert_eq!(hooks, [(UplinkHook::Xdp, true), (UplinkHook::Tcx, true)]);
}
