//! The accelerator that the probe names must run a guest.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::time::{Duration, Instant};

use omerta_vm_launcher::{GuestEvent, MachineType, Paused, probe_accel};
use stage::{IDLE, POWER_OFF, Stage, event};

#[test]
fn the_probed_accelerator_runs_a_guest() {
    let stage = Stage::new(POWER_OFF);
    stage.run(|mut spec| async move {
        let started = Instant::now();
        let report = probe_accel().await;
        let took = started.elapsed();
        println!(
            "measured: probe {} ms: {}: {}",
            took.as_millis(),
            report.accel,
            report.why
        );
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert!(!report.why.is_empty() && !report.why.contains('\n'));
        spec.accel = report.accel;
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let mut running = guarded.resume().await.unwrap();
        event(&mut running, |e| *e == GuestEvent::Shutdown).await;
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

/// The small machine runs no kernel here that is emulated for certain, but what its guests are made of
/// is the same: paused, guarded with a canary, running, ended.
#[test]
fn a_guest_lives_and_ends_on_the_small_machine_too() {
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        spec.machine = MachineType::Microvm;
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let mut running = guarded.resume().await.unwrap();
        running.control().reset().await.unwrap();
        event(&mut running, |e| *e == GuestEvent::Reset).await;
        let ended = running.kill().await;
        assert_eq!(ended.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}
