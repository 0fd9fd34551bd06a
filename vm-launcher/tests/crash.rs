//! A launcher that is killed takes its guests with it, and the next one can run the same guest.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use omerta_vm_launcher::Paused;
use stage::{IDLE, Stage, qemus_of, within};

#[test]
fn a_killed_launcher_leaves_no_guest_and_blocks_no_later_one() {
    let stage = Stage::new(IDLE);
    let spec = stage.spec();
    let mut launcher = stage
        .namespace
        .command(std::env::current_exe().unwrap().to_str().unwrap());
    launcher
        .args([
            "--exact",
            "a_launcher_that_waits_to_be_killed",
            "--ignored",
            "--nocapture",
        ])
        .env("OMERTA_TEST_DIRECTORY", stage.directory.path())
        .stdout(Stdio::piped());
    let mut launcher = launcher.spawn().unwrap();
    let output = BufReader::new(launcher.stdout.take().unwrap());
    assert!(
        output
            .lines()
            .any(|line| line.unwrap().contains("the guest runs"))
    );
    assert_eq!(qemus_of(&spec.run_dir).len(), 1);

    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let took = within(
        Duration::from_secs(5),
        "QEMU dies with its launcher",
        || qemus_of(&spec.run_dir).is_empty(),
    );
    println!("measured: QEMU gone {took:?} after its launcher was killed");
    within(Duration::from_secs(5), "the tap goes", || {
        !stage
            .traces()
            .iter()
            .any(|trace| trace.starts_with("interface"))
    });
    // What stays is inert: files, and pins of a guard whose interface is gone.
    assert!(!stage.traces().is_empty());

    stage.run(|spec| async {
        let running = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let running = running.resume().await.unwrap();
        assert_eq!(running.kill().await.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}

#[test]
#[ignore = "run by a_killed_launcher_leaves_no_guest_and_blocks_no_later_one"]
fn a_launcher_that_waits_to_be_killed() {
    let directory = std::path::PathBuf::from(std::env::var_os("OMERTA_TEST_DIRECTORY").unwrap());
    let image = omerta_vm_launcher::Image::open(&directory).unwrap();
    let spec = stage::spec(image, directory.join("web-1"));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    // On a thread that ends before its guest may: the guest must not die with a thread.
    let running = std::thread::scope(|scope| {
        let start = || {
            runtime.block_on(async {
                Paused::launch(spec)
                    .await
                    .unwrap()
                    .guard()
                    .await
                    .unwrap()
                    .resume()
                    .await
                    .unwrap()
            })
        };
        scope.spawn(start).join().unwrap()
    });
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(qemus_of(&directory.join("web-1")), [running.pid()]);
    println!("the guest runs");
    std::thread::sleep(Duration::from_secs(60));
    drop(running);
}

/// Not a test of the launcher: the stage's search must find what is there.
#[test]
fn the_search_for_traces_finds_a_guest() {
    let stage = Stage::new(IDLE);
    let traces = stage.run(|spec| async {
        let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let traces = stage.traces();
        drop(guarded);
        traces
    });
    for expected in [
        "interface omweb-1",
        "guard omweb-1",
        "run directory",
        "process",
        "pin",
    ] {
        assert!(
            traces.iter().any(|trace| trace.starts_with(expected)),
            "{expected}: {traces:?}"
        );
    }
}
