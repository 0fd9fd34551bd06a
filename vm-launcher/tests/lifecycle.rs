//! Real QEMU under TCG, in a namespace of the test's own: Paused → Guarded → Running → nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use omerta_dataplane::Guard;
use omerta_verdict::Reason;
use omerta_vm_launcher::{Ended, ExitStatus, GuestEvent, Paused, Spec};
use stage::{CHATTER, IDLE, PANIC, POWER_OFF, RESET, Stage, event, qemus_of};

#[test]
fn a_guest_is_launched_guarded_resumed_and_killed_without_a_trace() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let started = Instant::now();
        let paused = Paused::launch(spec).await.unwrap();
        let launched = started.elapsed();
        assert!(!is_up("omweb-1"));
        let guarded = paused.guard().await.unwrap();
        let guarded_at = started.elapsed();
        assert_eq!(Guard::list().unwrap(), ["omweb-1"]);
        let running = guarded.resume().await.unwrap();
        println!(
            "measured: launch {} ms, guard {} ms, resume {} ms",
            launched.as_millis(),
            (guarded_at - launched).as_millis(),
            (started.elapsed() - guarded_at).as_millis()
        );
        assert!(running.console_socket().exists() && running.console_log().exists());
        let killing = Instant::now();
        let ended = running.kill().await;
        println!(
            "measured: kill to nothing left {} ms",
            killing.elapsed().as_millis()
        );
        assert_eq!(ended.status, Some(ExitStatus::Signal(9)));
        assert_eq!(ended.leftovers, [""; 0]);
        assert!(ended.ended_at_ns.unwrap() <= ended.tap_removed_at_ns.unwrap());
        let counters = ended.counters.unwrap();
        assert_eq!(
            counters.egress.dropped_for(Reason::SourceMac).packets,
            1,
            "the canary"
        );
    });
    stage.assert_nothing_is_left();
}

#[test]
fn the_tap_is_down_until_it_is_guarded_and_the_canary_is_the_only_frame() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let paused = Paused::launch(spec).await.unwrap();
        assert!(!is_up("omweb-1"));
        let guarded = paused.guard().await.unwrap();
        assert!(is_up("omweb-1"));
        let counters = guarded.guard().counters().unwrap();
        assert_eq!(counters.egress.dropped_for(Reason::SourceMac).packets, 1);
        assert_eq!(counters.egress.rx().packets, 1);
        // Its event is taken: whoever reads the events next sees only the guest's.
        assert!(guarded.guard().events().unwrap().next().is_none());
        let status = guarded.guard().status().unwrap();
        assert_eq!(status.allow, ["udp:192.0.2.10:51820"]);
        drop(guarded);
    });
    stage.assert_nothing_is_left();
}

fn is_up(interface: &str) -> bool {
    nix::ifaddrs::getifaddrs().unwrap().any(|entry| {
        entry.interface_name == interface
            && entry.flags.contains(nix::net::if_::InterfaceFlags::IFF_UP)
    })
}

#[test]
fn qemu_is_confined() {
    let stage = Stage::new(IDLE);
    // As whoever started the launcher may have left one open: an unmarked descriptor.
    let secret = tempfile::tempfile().unwrap();
    nix::fcntl::fcntl(
        &secret,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let inode = |path: &std::path::Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    let secret_file = secret
        .metadata()
        .map(|found| (found.dev(), found.ino()))
        .unwrap();
    stage.run(|spec| async {
        let running = run(spec).await;
        let proc = std::path::PathBuf::from(format!("/proc/{}", running.pid()));
        let ours = fs::read_link("/proc/thread-self/ns/net").unwrap();
        assert_ne!(
            fs::read_link(proc.join("ns/net")).unwrap(),
            ours,
            "a namespace of its own"
        );
        let status = fs::read_to_string(proc.join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "{status}");
        let limits = fs::read_to_string(proc.join("limits")).unwrap();
        let limit = |name: &str| {
            limits
                .lines()
                .find(|l| l.starts_with(name))
                .unwrap()
                .to_owned()
        };
        assert!(limit("Max file size").contains("16777216"), "{limits}");
        assert!(limit("Max core file size").contains(" 0 "), "{limits}");
        let pid = nix::unistd::Pid::from_raw(running.pid() as i32);
        assert_eq!(
            nix::unistd::getpgid(Some(pid)).unwrap(),
            pid,
            "a group of its own"
        );
        let environment = fs::read(proc.join("environ")).unwrap();
        assert_eq!(
            environment
                .split(|b| *b == 0)
                .filter(|v| !v.is_empty())
                .count(),
            1,
            "PATH only"
        );
        let taps = fs::read_dir(proc.join("fd"))
            .unwrap()
            .filter(|fd| {
                fs::read_link(fd.as_ref().unwrap().path())
                    .is_ok_and(|target| target.ends_with("net/tun"))
            })
            .count();
        assert_eq!(taps, 1);
        let inherited = fs::read_dir(proc.join("fd"))
            .unwrap()
            .any(|fd| inode(&fd.unwrap().path()).is_ok_and(|found| found == secret_file));
        assert!(!inherited, "a descriptor of the launcher's went on to QEMU");
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

async fn run(spec: Spec) -> omerta_vm_launcher::Running {
    Paused::launch(spec)
        .await
        .unwrap()
        .guard()
        .await
        .unwrap()
        .resume()
        .await
        .unwrap()
}

#[test]
fn the_end_of_the_console_outlives_the_guest() {
    let stage = Stage::new(CHATTER);
    stage.run(|spec| async {
        let running = run(spec).await;
        let log = running.console_log().to_owned();
        let most = Ended::MAX_CONSOLE_BYTES;
        within_async("the guest prints more than is kept", || {
            fs::metadata(&log).is_ok_and(|log| log.len() > most)
        })
        .await;
        let ended = running.kill().await;
        assert_eq!(ended.console.len() as u64, most);
        assert!(ended.console.iter().all(|byte| *byte == b'A'));
    });
    stage.assert_nothing_is_left();
}

async fn within_async(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "{what}: not in a minute");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn dropping_any_state_undoes_it() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        drop(Paused::launch(spec).await.unwrap());
    });
    stage.assert_nothing_is_left();
    stage.run(|spec| async {
        drop(Paused::launch(spec).await.unwrap().guard().await.unwrap());
    });
    stage.assert_nothing_is_left();
    stage.run(|spec| async {
        drop(run(spec).await);
    });
    stage.assert_nothing_is_left();
}

/// A launch that is cancelled after each of many delays: at whatever await it stands, all is undone.
#[test]
fn a_cancelled_launch_leaves_nothing() {
    let stage = Stage::new(IDLE);
    let mut cancelled = 0;
    for delay in (0..40).map(|n| Duration::from_millis(n * n)) {
        let finished =
            stage.run(|spec| async move { tokio::time::timeout(delay, run(spec)).await.is_ok() });
        cancelled += u32::from(!finished);
        stage.assert_nothing_is_left();
    }
    println!("measured: {cancelled} of 40 launches cancelled half-way");
    assert!(cancelled >= 5, "the delays are too long to cancel anything");
}

#[test]
fn a_paused_guest_stays_paused_until_resumed() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let mut running = run(spec).await;
        let control = running.control();
        control.pause().await.unwrap();
        assert_eq!(
            event(&mut running, |e| *e == GuestEvent::Paused).await,
            GuestEvent::Paused
        );
        control.resume().await.unwrap();
        event(&mut running, |e| *e == GuestEvent::Resumed).await;
        control.quit().await.unwrap();
        let over = |e: &GuestEvent| matches!(e, GuestEvent::Exited { .. } | GuestEvent::Shutdown);
        let exited = event(&mut running, over).await;
        assert_eq!(
            exited,
            GuestEvent::Exited {
                status: Some(ExitStatus::Code(0))
            }
        );
        assert_eq!(running.next_event().await, exited, "the end stays the end");
        assert!(control.pause().await.is_err(), "nobody is left to pause");
        let ended = running.kill().await;
        assert_eq!(ended.status, Some(ExitStatus::Code(0)));
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_paused_guest_is_not_resumed_without_its_guard() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let mut running = run(spec).await;
        let control = running.control();
        control.pause().await.unwrap();
        event(&mut running, |e| *e == GuestEvent::Paused).await;
        Guard::open("omweb-1").unwrap().detach().unwrap();
        control.resume().await.unwrap_err();
        // That its guard is lost may be told; it does not run on.
        let mut told = Vec::new();
        let listen = async {
            loop {
                told.push(running.next_event().await);
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(300), listen).await;
        assert!(!told.contains(&GuestEvent::Resumed), "{told:?}");
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_guarded_guest_is_not_resumed_when_its_guard_has_gone() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        Guard::open("omweb-1").unwrap().detach().unwrap();
        let error = guarded.resume().await.unwrap_err();
        assert!(error.report().contains("omweb-1"), "{}", error.report());
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_reset_guest_is_verified_again() {
    let stage = Stage::new(RESET);
    stage.run(|spec| async {
        let mut running = run(spec).await;
        event(&mut running, |e| *e == GuestEvent::Reset).await;
        Guard::open("omweb-1").unwrap().detach().unwrap();
        let lost = event(&mut running, |e| matches!(e, GuestEvent::GuardLost { .. })).await;
        let GuestEvent::GuardLost { why } = lost else {
            unreachable!()
        };
        assert!(why.contains("omweb-1"), "{why}");
        // It is stopped: no further reset comes.
        let mut later = Vec::new();
        let listen = async {
            loop {
                later.push(running.next_event().await);
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), listen).await;
        assert!(!later.contains(&GuestEvent::Reset), "{later:?}");
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_panicked_guest_is_paused_and_reported() {
    let stage = Stage::new(PANIC);
    stage.run(|spec| async {
        let mut running = run(spec).await;
        event(&mut running, |e| *e == GuestEvent::Panicked).await;
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_guest_that_turns_itself_off_is_reported_and_tidied_up() {
    let stage = Stage::new(POWER_OFF);
    stage.run(|spec| async {
        let mut running = run(spec).await;
        event(&mut running, |e| *e == GuestEvent::Shutdown).await;
        let exited = event(&mut running, |e| matches!(e, GuestEvent::Exited { .. })).await;
        assert_eq!(
            exited,
            GuestEvent::Exited {
                status: Some(ExitStatus::Code(0))
            }
        );
        assert_eq!(running.kill().await.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_guest_that_ignores_its_power_button_is_killed_at_the_deadline() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let running = run(spec).await;
        let started = Instant::now();
        let ended = running.stop(Duration::from_millis(700)).await;
        assert_eq!(ended.status, Some(ExitStatus::Signal(9)));
        let took = started.elapsed();
        println!(
            "measured: stop with a deadline of 700 ms took {} ms",
            took.as_millis()
        );
        assert!(
            took >= Duration::from_millis(700) && took < Duration::from_secs(5),
            "{took:?}"
        );
    });
    stage.assert_nothing_is_left();
}

#[test]
fn qemu_killed_from_outside_is_noticed() {
    let stage = Stage::new(IDLE);
    let run_dir = stage.spec().run_dir;
    stage.run(|spec| async {
        let mut running = run(spec).await;
        let pids = qemus_of(&run_dir);
        assert_eq!(pids, [running.pid()]);
        let pid = nix::unistd::Pid::from_raw(running.pid() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        // Nothing but the guest's own power button is told as its shutdown.
        let over = |e: &GuestEvent| matches!(e, GuestEvent::Exited { .. } | GuestEvent::Shutdown);
        let exited = event(&mut running, over).await;
        assert_eq!(
            exited,
            GuestEvent::Exited {
                status: Some(ExitStatus::Signal(9))
            }
        );
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn pausing_a_busy_guest_is_quick() {
    let stage = Stage::new(CHATTER);
    let mut took = stage.run(|spec| async {
        let running = run(spec).await;
        let control = running.control();
        let mut took = Vec::new();
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let before = Instant::now();
            control.pause().await.unwrap();
            took.push(before.elapsed());
            control.resume().await.unwrap();
        }
        running.kill().await;
        took
    });
    took.sort();
    println!(
        "measured: pause: median {:?}, worst {:?}",
        took[10], took[19]
    );
    assert!(took[10] < Duration::from_millis(500), "{took:?}");
    stage.assert_nothing_is_left();
}

#[test]
fn killing_is_quick() {
    let stage = Stage::new(IDLE);
    let mut took: Vec<_> = (0..10)
        .map(|_| {
            stage.run(|spec| async {
                let running = run(spec).await;
                let before = now_ns();
                let ended = running.kill().await;
                let gone = ended.tap_removed_at_ns.unwrap() - before;
                (
                    Duration::from_nanos(gone),
                    Duration::from_nanos(ended.ended_at_ns.unwrap() - before),
                )
            })
        })
        .collect();
    took.sort();
    let (gone, ended) = took[5];
    println!("measured: kill to QEMU reaped {ended:?}, to tap removed {gone:?} (median of 10)");
    assert!(gone < Duration::from_secs(1), "{took:?}");
}

fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Ticks of processor time that a process has had: fields 14 and 15 of proc_pid_stat(5).
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split(' ').collect();
    fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap()
}

#[test]
fn a_guest_whose_process_is_halted_runs_nothing_any_more_and_is_killed_as_any_other() {
    // Jumps to itself.
    let stage = Stage::new(&[0xeb, 0xfe]);
    stage.run(|spec| async {
        let running = run(spec).await;
        let pid = running.pid();
        let before = ticks(pid);
        let until = Instant::now() + Duration::from_secs(20);
        while ticks(pid) < before + 5 {
            assert!(Instant::now() < until, "it does not spin");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        running.halt().await.unwrap();
        let still = ticks(pid);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(ticks(pid), still);
        let control = running.control();
        let asked = tokio::time::timeout(Duration::from_millis(300), control.pause());
        let answer = asked.await;
        drop(control);
        assert!(answer.is_err(), "it answers");
        // Once more changes nothing.
        running.halt().await.unwrap();
        let ended = running.kill().await;
        assert_eq!(ended.status, Some(ExitStatus::Signal(9)));
        assert_eq!(ended.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_guest_that_has_ended_cannot_be_halted() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let mut running = run(spec).await;
        running.control().quit().await.unwrap();
        event(&mut running, |e| matches!(e, GuestEvent::Exited { .. })).await;
        assert!(running.halt().await.is_err());
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}
