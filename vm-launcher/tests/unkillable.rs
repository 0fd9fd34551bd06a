//! A QEMU that does not die of SIGKILL: what may still send keeps its guard, and is told of.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::time::Duration;

use omerta_dataplane::Guard;
use omerta_test_support::{FrameSender, Grip};
use omerta_vm_launcher::{Ended, Paused};
use stage::{IDLE, Stage, qemus_of, within};

/// Ends a guest whose QEMU is held, and checks that nobody claims it gone.
fn assert_nothing_is_claimed(stage: &Stage, ended: &Ended) {
    assert_eq!(
        (ended.status, ended.ended_at_ns, ended.tap_removed_at_ns),
        (None, None, None)
    );
    let told = ended.leftovers.join("\n");
    for part in [
        "process: ",
        "guard of omweb-1: kept",
        "interface omweb-1: ",
        "directory ",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let traces = stage.traces();
    assert!(traces.contains("guard omweb-1"), "{traces:?}");
    assert!(traces.contains("interface omweb-1"), "{traces:?}");
}

/// Lets the process go and removes what was rightly left.
fn tidy(stage: &Stage, grip: Grip) {
    drop(grip);
    let run_dir = stage.spec().run_dir;
    within(Duration::from_secs(10), "QEMU and its tap go", || {
        !stage
            .traces()
            .iter()
            .any(|trace| trace.starts_with("interface"))
    });
    stage
        .namespace
        .enter(|| Guard::remove_stale("omweb-1", None).unwrap())
        .unwrap();
    std::fs::remove_dir_all(run_dir).unwrap();
}

#[test]
fn a_paused_guest_that_cannot_be_killed_is_told_of() {
    let stage = Stage::new(IDLE);
    let (ended, grip) = stage.run(|spec| async {
        let paused = Paused::launch(spec).await.unwrap();
        let grip = Grip::on(qemus_of(&paused.spec().run_dir)[0]).unwrap();
        (paused.end().await, grip)
    });
    // It was guarded while QEMU started.
    assert_nothing_is_claimed(&stage, &ended);
    tidy(&stage, grip);
}

#[test]
fn a_guarded_guest_that_cannot_be_killed_keeps_its_guard() {
    let stage = Stage::new(IDLE);
    let (ended, grip) = stage.run(|spec| async {
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let grip = Grip::on(qemus_of(&guarded.spec().run_dir)[0]).unwrap();
        (guarded.end().await, grip)
    });
    assert_nothing_is_claimed(&stage, &ended);
    tidy(&stage, grip);
}

#[test]
fn a_running_guest_that_cannot_be_killed_keeps_its_guard() {
    let stage = Stage::new(IDLE);
    let (ended, grip) = stage.run(|spec| async {
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let running = guarded.resume().await.unwrap();
        let grip = Grip::on(running.pid()).unwrap();
        (running.kill().await, grip)
    });
    assert_nothing_is_claimed(&stage, &ended);
    tidy(&stage, grip);
}

#[test]
fn a_launch_that_fails_tells_what_it_could_not_undo() {
    let stage = Stage::new(IDLE);
    let (error, grip) = stage.run(|spec| async {
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let grip = Grip::on(qemus_of(&guarded.spec().run_dir)[0]).unwrap();
        Guard::open("omweb-1").unwrap().detach().unwrap();
        (guarded.resume().await.unwrap_err(), grip)
    });
    let (cause, leftovers) = error.split();
    assert!(cause.report().contains("omweb-1"), "{}", cause.report());
    let told = leftovers.join("\n");
    assert!(
        told.contains("process: ") && told.contains("directory "),
        "{told}"
    );
    tidy(&stage, grip);
}

/// QEMU is the last who could send: the record is complete only once it is reaped.
#[test]
fn a_frame_between_kill_and_reap_is_in_the_final_counters() {
    let stage = Stage::new(IDLE);
    let ended = stage.run(|spec| async {
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let running = guarded.resume().await.unwrap();
        let before = running.guard().counters().unwrap().ingress.rx().packets;
        let pid = running.pid();
        let grip = Grip::on(pid).unwrap();
        let killing = tokio::spawn(running.kill());
        let dying = || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            status.contains("State:\tt")
        };
        while !dying() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let sender = FrameSender::open("omweb-1").unwrap();
        // Dropped by the guard, which the kernel tells the sender.
        let _ = sender.send(&[0xff; 60]);
        drop(grip);
        (before, killing.await.unwrap())
    });
    let (before, ended) = ended;
    assert_eq!(ended.leftovers, [""; 0]);
    assert!(ended.counters.unwrap().ingress.rx().packets > before);
    stage.assert_nothing_is_left();
}
