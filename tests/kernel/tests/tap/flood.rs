//! Floods from every CPU at once: counters stay exact, and limits hold.

use std::num::NonZero;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use omerta_dataplane::{Guard, GuardConfig, Limits};
use omerta_kernel_tests::*;
use omerta_test_support::{FrameSender, Tap};
use omerta_verdict::{Mode, Reason};

use crate::frames::{to_consumer, v4};
use crate::stage::{PATIENCE, Stage, soon};

const THREADS: usize = 4;
/// The longest tick of Linux (HZ = 100): the programs' clock is that much behind at most.
const TICK: Duration = Duration::from_millis(10);

/// Runs `work` in several threads, which take turns on the CPUs that this process has.
fn on_every_cpu(work: impl Fn() + Sync) {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus: Vec<_> = (0..CpuSet::count())
        .filter(|cpu| allowed.is_set(*cpu).unwrap())
        .collect();
    thread::scope(|scope| {
        for index in 0..THREADS.max(cpus.len()) {
            let (cpu, work) = (cpus[index % cpus.len()], &work);
            scope.spawn(move || {
                let mut one = CpuSet::new();
                one.set(cpu).unwrap();
                sched_setaffinity(Pid::from_raw(0), &one).unwrap();
                work();
            });
        }
    });
}

/// How many units at `rate` a second, with a burst, may have passed since `begun`.
fn most(rate: u64, burst: u64, begun: Instant) -> u64 {
    let time = begun.elapsed() + TICK;
    burst + (u128::from(rate) * time.as_nanos()).div_ceil(1_000_000_000) as u64
}

fn limited(change: impl Fn(&mut GuardConfig)) -> Stage {
    let mut guard = config(Mode::Filtered);
    change(&mut guard);
    Stage::with_guard(&guard, || Tap::create("guest"))
}

#[test]
fn every_frame_of_a_flood_is_counted_once_and_judged_once() {
    const EACH: u64 = 20_000;
    let stage = Stage::new(Mode::Filtered);
    let frames = [
        v4(17, &udp(40000, 53, b"flood")),
        to_consumer(b"good"),
        ethernet(STRANGER_MAC, GATEWAY_MAC, 0x0800, &[0; 46]),
    ];
    let while_it_lasts = thread::scope(|scope| {
        let senders: Vec<_> = frames
            .iter()
            .map(|frame| scope.spawn(|| (0..EACH).for_each(|_| stage.tap.send(frame).unwrap())))
            .collect();
        let mut looked = 0_u64;
        while !senders.iter().all(thread::ScopedJoinHandle::is_finished) {
            let egress = stage.guarded(Guard::counters).egress;
            assert_eq!(egress.rx(), egress.outcomes(), "{egress:?}");
            looked += 1;
        }
        looked
    });
    assert!(while_it_lasts > 0);
    let done = soon(|| {
        let egress = stage.guarded(Guard::counters).egress;
        (egress.rx().packets == 3 * EACH).then_some(egress)
    });
    let egress = done.expect("all were counted");
    assert_eq!(egress.rx(), egress.outcomes());
    assert_eq!(egress.allowed.packets, EACH);
    assert_eq!(egress.dropped_for(Reason::Endpoint).packets, EACH);
    assert_eq!(egress.dropped_for(Reason::SourceMac).packets, EACH);
    let counters = stage.guarded(Guard::counters);
    assert!(counters.events_limited.packets > 0);
    assert_eq!(stage.tap.recv(PATIENCE / 100).unwrap(), None);
}

#[test]
fn a_flood_from_every_cpu_gets_no_more_than_the_rate_of_frames() {
    const RATE: u64 = 4000;
    // An eighth of a second's.
    const BURST: u64 = 500;
    const EACH: u64 = 20_000;
    let stage = limited(|guard| guard.egress.packets_per_second = NonZero::new(RATE));
    let frame = to_consumer(b"flood");
    let begun = Instant::now();
    on_every_cpu(|| (0..EACH).for_each(|_| stage.tap.send(&frame).unwrap()));
    let most = most(RATE, BURST, begun);
    let egress = stage.guarded(Guard::counters).egress;
    let (allowed, policed) = (egress.allowed, egress.dropped_for(Reason::Policed));
    println!(
        "{} of {} frames allowed, at most {most}",
        allowed.packets,
        egress.rx().packets
    );
    assert!(allowed.packets >= BURST && allowed.packets <= most);
    assert!(policed.packets > 0);
    assert_eq!(egress.rx(), egress.outcomes());
    assert!(egress.rx().packets >= THREADS as u64 * EACH);
    assert_eq!(egress.rx().packets, allowed.packets + policed.packets);
    assert_eq!(egress.rx().bytes, egress.rx().packets * frame.len() as u64);
}

#[test]
fn a_flood_from_every_cpu_gets_no_more_than_the_rate_of_bits() {
    const RATE: u64 = 1_200_000;
    const BURST: u64 = RATE / 8;
    const EACH: u64 = 5000;
    let stage = limited(|guard| {
        guard.ingress = Limits {
            bits_per_second: NonZero::new(8 * RATE),
            ..Limits::default()
        };
    });
    let packet = Ipv4::new(CONSUMER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, &[0xaa; 1000]));
    let frame = ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &packet);
    let open = || FrameSender::open("guest").unwrap();
    let begun = Instant::now();
    on_every_cpu(|| {
        let sender = stage.provider.enter(open).unwrap();
        for _ in 0..EACH {
            // It says so where the guard or the tap's full queue drops the frame.
            let _ = sender.send(&frame);
        }
    });
    let most = most(RATE, BURST, begun);
    let ingress = stage.guarded(Guard::counters).ingress;
    let (allowed, policed) = (ingress.allowed, ingress.dropped_for(Reason::Policed));
    println!(
        "{} of {} bytes allowed, at most {most}",
        allowed.bytes,
        ingress.rx().bytes
    );
    assert!(allowed.bytes + frame.len() as u64 > BURST && allowed.bytes <= most);
    assert!(policed.packets > 0);
    assert_eq!(ingress.rx(), ingress.outcomes());
    assert!(ingress.rx().packets >= THREADS as u64 * EACH);
    assert_eq!(ingress.rx().packets, allowed.packets + policed.packets);
}

#[test]
fn a_frame_that_the_bits_refuse_leaves_the_frames_to_others() {
    // Of 131,098 bytes, which are the least that the bucket of bytes holds; more than 924 are left then.
    const LONG: u64 = 97;
    const SHORT: u64 = 10;
    let stage = limited(|guard| {
        // A burst of an eighth: 200 frames.
        guard.egress.packets_per_second = NonZero::new(1600);
        guard.egress.bits_per_second = NonZero::new(8);
    });
    let (long, short) = (to_consumer(&[0xaa; 1300]), to_consumer(b""));
    let send = |frame: &[u8], count: u64| (0..count).for_each(|_| stage.tap.send(frame).unwrap());
    send(&long, LONG);
    send(&long, 1000);
    send(&short, SHORT);
    let egress = stage.guarded(Guard::counters).egress;
    assert_eq!(egress.dropped_for(Reason::Policed).packets, 1000);
    assert_eq!(egress.allowed.packets, LONG + SHORT);
}
