//! Readers on taps of namespaces of their own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use omerta_frames::{BATCH, BackEnd, Choice, Reader, cost_ns};
use omerta_kernel_tests::{
    CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, STRANGER, allowlist, config,
    ethernet, udp,
};
use omerta_test_support::{Capture, Namespace, Tap, Travel};
use omerta_verdict::{Bucket, MemoryGuard, Mode, Reason, Table, Verdict, egress};

fn frame(to: std::net::Ipv4Addr, number: u16) -> Vec<u8> {
    let packet = Ipv4::new(GUEST, to, 17).packet(&udp(number, CONSUMER_PORT, &[0; 22]));
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

/// Whether there is root here.
fn may_run() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    println!("skipped: needs root");
    false
}

/// A host that forwards what its guest sends to an uplink.
struct Host {
    namespace: Namespace,
    guest: Tap,
    uplink: Capture,
}

impl Host {
    fn new() -> Self {
        let namespace = Namespace::new("of").unwrap();
        namespace.disable_ipv6().unwrap();
        namespace.enable_forwarding().unwrap();
        let guest = namespace.enter(|| Tap::create("guest")).unwrap().unwrap();
        for step in [
            &format!("link set guest address {GATEWAY_MAC} up"),
            "link add uplink type veth peer name sink",
            "link set sink up",
            "link set uplink up",
            "addr add 203.0.113.1/24 dev uplink",
            "route add default via 203.0.113.9",
            "neigh replace 203.0.113.9 lladdr 52:54:00:00:00:cc dev uplink nud permanent",
        ] {
            namespace.ip(step).unwrap();
        }
        let uplink = namespace
            .enter(|| Capture::open("uplink"))
            .unwrap()
            .unwrap();
        Self {
            namespace,
            guest,
            uplink,
        }
    }

    fn take(&self, back_end: BackEnd) -> Reader {
        let open = || Reader::take_by("guest", back_end);
        self.namespace.enter(open).unwrap().unwrap()
    }

    /// Frames that have left by the uplink since the last call.
    fn left(&self) -> usize {
        let frames = self.uplink.frames().unwrap();
        frames
            .iter()
            .filter(|frame| frame.travel == Travel::Outgoing)
            .count()
    }
}

fn read_all(reader: &mut Reader) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while reader.read(|frame| frames.push(frame.to_vec())).unwrap() > 0 {}
    frames
}

#[test]
fn what_is_taken_reaches_the_reader_in_order_and_the_stack_never() {
    if !may_run() {
        return;
    }
    for back_end in [BackEnd::Recvmmsg, BackEnd::AfXdp] {
        let host = Host::new();
        let mut reader = host.take(back_end);
        let sent: Vec<_> = (0..3 * BATCH as u16)
            .map(|number| frame(CONSUMER, number))
            .collect();
        for frame in &sent {
            host.guest.send(frame).unwrap();
        }
        assert!(read_all(&mut reader) == sent, "{back_end:?}");
        assert_eq!(host.left(), 0, "{back_end:?}");
        // The stack has the interface back when the reader goes.
        drop(reader);
        host.guest.send(&sent[0]).unwrap();
        assert_eq!(host.left(), 1, "{back_end:?}");
    }
}

#[test]
fn a_reader_that_falls_behind_loses_frames_and_lets_none_pass() {
    if !may_run() {
        return;
    }
    let host = Host::new();
    let mut reader = host.take(BackEnd::AfXdp);
    let sent = 3 * 4096;
    for number in 0..sent {
        host.guest.send(&frame(CONSUMER, number)).unwrap();
    }
    let read = read_all(&mut reader).len();
    assert!(read < usize::from(sent), "{read}");
    assert_eq!(host.left(), 0);
    // It goes on with what comes next.
    host.guest.send(&frame(CONSUMER, 7)).unwrap();
    assert_eq!(read_all(&mut reader), [frame(CONSUMER, 7)]);
}

#[test]
fn each_frame_that_is_taken_can_be_judged() {
    if !may_run() {
        return;
    }
    let mut policy = config(Mode::Filtered).policy("guest").unwrap();
    let mut buckets = [Bucket::EMPTY; 64];
    policy.table_mask = 63;
    let mut table = Table::new(&mut buckets, policy.table_seed).unwrap();
    assert!(allowlist().iter().all(|endpoint| table.insert(endpoint)));
    let guard = MemoryGuard::new(&policy, &buckets);
    for back_end in [BackEnd::Recvmmsg, BackEnd::AfXdp] {
        let host = Host::new();
        let mut reader = host.take(back_end);
        host.guest.send(&frame(CONSUMER, 1)).unwrap();
        host.guest.send(&frame(STRANGER, 2)).unwrap();
        let mut verdicts = Vec::new();
        reader
            .read(|frame| verdicts.push(egress(frame, &guard)))
            .unwrap();
        assert_eq!(
            verdicts,
            [Verdict::Allow, Verdict::Drop(Reason::Endpoint)],
            "{back_end:?}"
        );
    }
}

#[test]
fn the_cheaper_back_end_is_chosen_and_told() {
    if !may_run() {
        return;
    }
    let host = Host::new();
    let open = || Reader::take_from("guest");
    let reader = host.namespace.enter(open).unwrap().unwrap();
    let faster = match reader.choice() {
        Choice::Measured {
            recvmmsg_ns,
            afxdp_ns,
        } if afxdp_ns < recvmmsg_ns => BackEnd::AfXdp,
        _ => BackEnd::Recvmmsg,
    };
    assert_eq!(reader.back_end(), faster, "{}", reader.choice());
}

#[test]
fn a_measurement_loses_no_frame() {
    if !may_run() {
        return;
    }
    for back_end in [BackEnd::Recvmmsg, BackEnd::AfXdp] {
        let cost = cost_ns(back_end).unwrap();
        assert!(cost.is_finite() && cost > 0.0, "{back_end:?} {cost}");
    }
}
