//! Programs change places while frames come and go: what may pass passes, what may not does not, and
//! every frame is counted once.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use omerta_dataplane::{Counting, Guard, GuardConfig, GuardError, Hook, Owner, Programs};
use omerta_kernel_tests::*;
use omerta_test_support::{Capture, FrameSender, Namespace, Tap, Travel, mac_of};
use omerta_verdict::{Direction, Mac, Mode, Reason};

use crate::stage::{Stage, WORLD_MAC, udp_payload};

/// Frames of each kind between two looks at what has arrived.
const BATCH: u32 = 16;
const PATIENCE: Duration = Duration::from_secs(10);
/// What hostile frames carry.
const LEAK: &[u8] = b"leak";
/// A port on which the guest has never sent.
const SILENT: u16 = 9;

/// Frames in both directions, good ones and hostile ones, all of which are accounted for.
struct Traffic<'a> {
    stage: &'a Stage,
    mode: Mode,
    arrivals: Capture,
    from_world: FrameSender,
    uplink: Mac,
    number: u32,
}

impl<'a> Traffic<'a> {
    fn of(stage: &'a Stage, mode: Mode) -> Self {
        let inside = || FrameSender::open("inet");
        stage.know_the_guest();
        Self {
            stage,
            mode,
            arrivals: stage.arrivals(),
            from_world: stage.world.enter(inside).unwrap().unwrap(),
            uplink: Mac(stage.provider.enter(|| mac_of("uplink")).unwrap().unwrap()),
            number: 0,
        }
    }

    /// Each batch opens flows of its own, fewer in all than a guest may have.
    fn port(number: u32) -> u16 {
        40_000 + (number % 2000) as u16
    }

    fn send_from_world(&self, packet: &[u8]) {
        let frame = ethernet(WORLD_MAC, self.uplink, 0x0800, packet);
        self.from_world.send(&frame).unwrap();
    }

    /// Sends a batch and waits for all of it that may pass.
    fn batch(&mut self) {
        let numbers: Vec<u32> = (0..BATCH).map(|index| self.number + index).collect();
        self.number += BATCH;
        for number in &numbers {
            let good = udp(Self::port(*number), CONSUMER_PORT, &number.to_be_bytes());
            let good = Ipv4::new(GUEST, CONSUMER, 17).packet(&good);
            let send = |from, packet: &[u8]| {
                let frame = ethernet(from, GATEWAY_MAC, 0x0800, packet);
                self.stage.tap.send(&frame).unwrap();
            };
            send(GUEST_MAC, &good);
            let elsewhere = udp(40_000, CONSUMER_PORT, LEAK);
            send(
                GUEST_MAC,
                &Ipv4::new(GUEST, STRANGER, 17).packet(&elsewhere),
            );
            send(STRANGER_MAC, &good);
        }
        self.arrive("the world", &numbers, |traffic| {
            let frames = traffic.arrivals.frames().unwrap().into_iter();
            let arrived = frames.filter(|frame| frame.travel == Travel::Incoming);
            arrived.map(|frame| frame.bytes).collect()
        });
        // What answers comes after what it answers.
        for number in &numbers {
            let reply = udp(CONSUMER_PORT, Self::port(*number), &number.to_be_bytes());
            self.send_from_world(&Ipv4::new(CONSUMER, GUEST, 17).packet(&reply));
            let uninvited = udp(CONSUMER_PORT, 40_000, LEAK);
            self.send_from_world(&Ipv4::new(STRANGER, GUEST, 17).packet(&uninvited));
            if self.mode == Mode::Conntrack {
                let unasked = udp(CONSUMER_PORT, SILENT, LEAK);
                self.send_from_world(&Ipv4::new(CONSUMER, GUEST, 17).packet(&unasked));
            }
        }
        self.arrive("the guest", &numbers, |traffic| {
            let wait = Duration::from_millis(1);
            std::iter::from_fn(|| traffic.stage.tap.recv(wait).unwrap()).collect()
        });
    }

    fn arrive(&self, at: &str, numbers: &[u32], frames: impl Fn(&Self) -> Vec<Vec<u8>>) {
        let mut due: BTreeSet<u32> = numbers.iter().copied().collect();
        let end = Instant::now() + PATIENCE;
        while !due.is_empty() {
            assert!(Instant::now() < end, "LOST on the way to {at}: {due:?}");
            for frame in frames(self) {
                let payload =
                    udp_payload(&frame).unwrap_or_else(|| panic!("LEAKED to {at}: {frame:02x?}"));
                let number: [u8; 4] = payload[..4].try_into().unwrap();
                let number = u32::from_be_bytes(number);
                assert!(due.remove(&number), "LEAKED to {at}: {payload:02x?}");
            }
        }
    }

    /// Everything that was sent was counted once, for what became of it.
    fn is_accounted_for(&self) {
        let all = u64::from(self.number);
        let counters = self.stage.guarded(Guard::counters);
        let (egress, ingress) = (&counters.egress, &counters.ingress);
        for direction in [egress, ingress] {
            assert_eq!(direction.rx(), direction.outcomes());
        }
        assert_eq!(egress.rx().packets, 3 * all);
        assert_eq!(egress.allowed.packets, all);
        assert_eq!(egress.dropped_for(Reason::Endpoint).packets, all);
        assert_eq!(egress.dropped_for(Reason::SourceMac).packets, all);
        assert_eq!(ingress.allowed.packets, all);
        assert_eq!(ingress.dropped_for(Reason::Endpoint).packets, all);
        let unasked = ingress.rx().packets - 2 * all;
        assert_eq!(unasked, if self.mode == Mode::Conntrack { all } else { 0 });
        assert_eq!(self.arrivals.lost().unwrap(), 0);
    }
}

/// Does `work` in the provider's namespace while frames come and go; how many of each kind.
fn under_traffic(stage: &Stage, mode: Mode, work: impl FnOnce() + Send) -> u32 {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut traffic = Traffic::of(stage, mode);
            while !done.load(Ordering::Relaxed) {
                traffic.batch();
            }
            traffic.is_accounted_for();
            traffic.number
        });
        stage
            .provider
            .enter(|| {
                let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
                done.store(true, Ordering::Relaxed);
                if let Err(panic) = worked {
                    std::panic::resume_unwind(panic);
                }
            })
            .unwrap();
        traffic.join().unwrap()
    })
}

fn stage(hook: Hook, mode: Mode) -> Stage {
    Stage::by(hook, &config(mode), || Tap::create("guest"))
}

fn namespace_inode() -> u64 {
    let namespace = fs::metadata("/proc/thread-self/ns/net");
    std::os::unix::fs::MetadataExt::ino(&namespace.unwrap())
}

/// The names of the guard's pins.
fn pins() -> BTreeSet<String> {
    let place = format!("/sys/fs/bpf/omerta/{}/guest", namespace_inode());
    fs::read_dir(place)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Unless `OMERTA_UPGRADES` says otherwise: where programs are emulated, each takes seconds.
const UPGRADES: usize = 25;

fn upgrades() -> usize {
    std::env::var("OMERTA_UPGRADES").map_or(UPGRADES, |count| count.parse().unwrap())
}

#[test]
fn programs_are_exchanged_under_traffic_without_a_wrong_verdict() {
    for hook in hooks().unwrap() {
        for mode in [Mode::Filtered, Mode::Conntrack] {
            let stage = stage(*hook, mode);
            let frames = under_traffic(&stage, mode, || {
                let guard = Guard::open("guest").unwrap();
                let before = (guard.identity(), pins(), guard.status().unwrap().epoch);
                for _ in 0..upgrades() {
                    assert_eq!(guard.upgrade().unwrap(), Counting::Continued);
                    guard.verify().unwrap();
                }
                let mut now = pins();
                now.remove("identity");
                let epoch = guard.status().unwrap().epoch;
                assert_eq!(before, (guard.identity(), now, epoch));
                assert_eq!(judging(*hook, "guest").unwrap(), [1, 1]);
            });
            println!(
                "{} in {mode} mode: {} upgrades, {frames} good frames each way, 0 lost; {} hostile ones, 0 passed",
                hook.word(),
                upgrades(),
                3 * frames + if mode == Mode::Conntrack { frames } else { 0 },
            );
        }
    }
}

#[test]
#[ignore = "killed by another test"]
fn upgrade_without_end() {
    let guard = Guard::open("guest").unwrap();
    victim::has_begun();
    loop {
        guard.upgrade().unwrap();
    }
}

#[test]
fn a_guard_is_whole_and_judges_whenever_its_upgrade_is_killed() {
    for hook in hooks().unwrap() {
        let stage = stage(*hook, Mode::Conntrack);
        let mut random = fastrand::Rng::with_seed(3);
        let mut interrupted = 0;
        let frames = under_traffic(&stage, Mode::Conntrack, || {
            let whole = pins();
            for round in 0..UPGRADES {
                let mut child = victim::begin("upgrade::upgrade_without_end", "").unwrap();
                if round % 2 == 0 {
                    thread::sleep(Duration::from_micros(random.u64(..400_000)));
                } else {
                    // What is done when the programs are loaded takes a hundredth of the time.
                    let end = Instant::now() + PATIENCE;
                    while !pins().contains("next_program_egress") {
                        assert!(Instant::now() < end, "no upgrade begins");
                    }
                    thread::sleep(Duration::from_micros(random.u64(..3_000)));
                }
                child.kill().unwrap();
                child.wait().unwrap();
                let mut left = pins();
                left.remove("identity");
                interrupted += usize::from(left != whole);
                // Whole as it is found, before any command has looked.
                let found = Guard::pinned().unwrap();
                let standings: Vec<_> = found.iter().map(|guard| guard.standing).collect();
                assert_eq!(standings, [omerta_dataplane::Standing::InForce]);
                let guard = Guard::open("guest").unwrap();
                guard.verify().unwrap();
                let mut now = pins();
                now.remove("identity");
                assert_eq!(now, whole, "the next command has finished it");
                assert_eq!(judging(*hook, "guest").unwrap(), [1, 1]);
            }
        });
        assert!(interrupted > 0, "none was killed half-way");
        println!(
            "{}: killed {} times, {interrupted} times half-way; {frames} good frames each way, 0 lost, {} hostile ones, 0 passed",
            hook.word(),
            UPGRADES,
            4 * frames
        );
    }
}

#[test]
fn a_policy_of_an_unknown_layout_is_refused_and_its_guard_stays_in_force() {
    for hook in hooks().unwrap() {
        let stage = stage(*hook, Mode::Filtered);
        let mut traffic = Traffic::of(&stage, Mode::Filtered);
        let note = |text: &str| {
            let inode = stage.provider.inode().unwrap();
            let note = format!("/sys/fs/bpf/omerta/{inode}/guest/layout");
            let before = fs::read_link(&note).unwrap().into_os_string();
            fs::remove_file(&note).unwrap();
            std::os::unix::fs::symlink(text, &note).unwrap();
            before.into_string().unwrap()
        };
        let known = note("0000000000000001-0000000000000001");
        stage
            .provider
            .enter(|| {
                let guard = Guard::open("guest").unwrap();
                let unknown = |error| {
                    assert!(
                        matches!(error, GuardError::OtherPolicyLayout { .. }),
                        "{error}"
                    )
                };
                unknown(guard.upgrade().unwrap_err());
                unknown(guard.replace(&[]).unwrap_err());
                unknown(guard.status().unwrap_err());
                guard.verify().unwrap();
            })
            .unwrap();
        traffic.batch();
        // Of its counters alone: they begin anew, and all else goes on.
        let (policy, _) = known.split_once('-').unwrap();
        note(&format!("{policy}-0000000000000001"));
        traffic.batch();
        stage
            .provider
            .enter(|| {
                let guard = Guard::open("guest").unwrap();
                let error = guard.counters().unwrap_err();
                assert!(
                    matches!(error, GuardError::OtherAccountsLayout { .. }),
                    "{error}"
                );
                assert_eq!(guard.upgrade().unwrap(), Counting::Afresh);
                assert_eq!(guard.counters().unwrap().egress.rx().packets, 0);
            })
            .unwrap();
        traffic.number = 0;
        traffic.batch();
        traffic.is_accounted_for();
    }
}

#[test]
fn an_owned_guards_upgrade_is_finished_by_its_owner_alone() {
    let namespace = Namespace::new("upgrade").unwrap();
    namespace
        .enter(|| {
            let _tap = Tap::create("guest").unwrap();
            let owner: Owner = "someone".parse().unwrap();
            let owned = GuardConfig {
                owner: Some(owner.clone()),
                ..config(Mode::Filtered)
            };
            Guard::attach("guest", &owned).unwrap();
            // As an upgrade leaves it that was killed at its first pin.
            let inode = namespace_inode();
            let next = format!("/sys/fs/bpf/omerta/{inode}/guest/next_program_egress");
            let mut programs = Programs::load("guest", Mode::Filtered).unwrap();
            let program = programs.program(Direction::Egress).unwrap();
            program.pin(&next).unwrap();
            let is_there = || pins().contains("next_program_egress");
            let guard = Guard::open("guest").unwrap();
            assert!(matches!(guard.upgrade(), Err(GuardError::Owned { .. })));
            let other = "other".parse().unwrap();
            Guard::open_as("guest", &other).unwrap_err();
            assert!(is_there(), "it was finished by who may not change it");
            let guard = Guard::open_as("guest", &owner).unwrap();
            assert!(!is_there());
            guard.detach().unwrap();
        })
        .unwrap();
}

#[test]
fn what_is_redirected_is_redirected_by_the_new_programs() {
    if !hooks().unwrap().contains(&Hook::Tcx) {
        return;
    }
    let stage = stage(Hook::Tcx, Mode::Filtered);
    stage.guarded(|guard| guard.redirect(&[]));
    let frames = under_traffic(&stage, Mode::Filtered, || {
        let guard = Guard::open("guest").unwrap();
        for _ in 0..4 {
            guard.upgrade().unwrap();
        }
        let chain = judging(Hook::Tcx, "guest").unwrap();
        assert_eq!(chain, [2, 1]);
    });
    let before = stage.guarded(Guard::status).redirect.unwrap();
    assert!(before.in_force);
    let ways = before.to_neighbours + before.to_peers + before.to_stack + before.unproven;
    assert_eq!(ways, u64::from(frames), "{before:?}");
    Traffic::of(&stage, Mode::Filtered).batch();
    let after = stage.guarded(Guard::status).redirect.unwrap();
    assert_eq!(
        after.to_neighbours,
        before.to_neighbours + u64::from(BATCH),
        "{after:?}"
    );
    assert_eq!(stage.dropped(Direction::Egress, Reason::PolicyChanging), 0);
}

/// An error that quotes what the guest has sent is let in also by programs that have not seen it sent.
#[test]
fn errors_for_what_was_sent_before_an_upgrade_reach_the_guest() {
    let stage = stage(Hook::of_this_kernel().unwrap(), Mode::Filtered);
    stage.know_the_guest();
    let sent = Ipv4::new(GUEST, CONSUMER, 17).packet(&udp(40_000, CONSUMER_PORT, b"x"));
    let frame = ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &sent);
    stage.tap.send(&frame).unwrap();
    stage.guarded(Guard::upgrade);
    stage.send_from_world(&Ipv4::new(STRANGER, GUEST, 1).packet(&icmp_unreachable(&sent)));
    let heard = stage.tap.recv(PATIENCE).unwrap();
    assert!(heard.is_some_and(|frame| frame[23] == 1));
}
