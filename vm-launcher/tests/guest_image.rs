//! The project's guest image, booted for real: it reports its key, it logs, it obeys its power
//! button, and it does not get far without its consumer.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use omerta_verdict::Reason;
use omerta_vm_launcher::{Consumer, ExitStatus, GuestEvent, Image, Paused};
use stage::{IDLE, Stage, event};

/// Where the image is: `OMERTA_IMAGE_DIR`, or `target/image`. `None`, said aloud, if it is not
/// built.
fn image() -> Option<Image> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/image");
    let directory = std::env::var_os("OMERTA_IMAGE_DIR").map_or_else(built, PathBuf::from);
    match Image::open(&directory) {
        Ok(image) => Some(image),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn the_guest_reports_a_key_sends_only_to_its_consumer_and_obeys_its_power_button() {
    let Some(image) = image() else { return };
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        // What was checked is what boots, whatever becomes of the files once it is launched.
        fs::copy(&image.kernel, &spec.image.kernel).unwrap();
        fs::copy(&image.initrd, &spec.image.initrd).unwrap();
        spec.memory_mib = 256;
        let files = [spec.image.kernel.clone(), spec.image.initrd.clone()];
        let paused = Paused::launch(spec).await.unwrap();
        for file in files {
            fs::write(file, b"").unwrap();
        }
        let running = paused.guard().await.unwrap();
        let started = Instant::now();
        let mut running = running.resume().await.unwrap();
        let wanted = |e: &GuestEvent| matches!(e, GuestEvent::PublicKeyReported(_));
        let key = event(&mut running, wanted).await;
        println!(
            "measured: {key:?} after {} ms",
            started.elapsed().as_millis()
        );

        // WireGuard tries its consumer, which is not there; nothing else is sent but the canary.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let counters = running.guard().counters().unwrap();
        for (reason, count) in &counters.egress.dropped {
            let expected = u64::from(*reason == Reason::SourceMac);
            assert_eq!(count.packets, expected, "{reason}");
        }
        println!(
            "measured: the guest sent {} packets to its consumer",
            counters.egress.allowed.packets
        );
        assert!(counters.egress.allowed.packets > 0);
        let log = fs::read_to_string(running.console_log()).unwrap();
        assert!(log.contains("10.77.0.2"), "{log}");

        let stopping = Instant::now();
        let ended = running.stop(Duration::from_secs(30)).await;
        println!(
            "measured: orderly stop {} ms",
            stopping.elapsed().as_millis()
        );
        assert_eq!(ended.status, Some(ExitStatus::Code(0)), "{log}");
        assert_eq!(ended.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}

#[test]
fn the_guest_follows_its_consumer_and_sends_nothing_where_it_was() {
    let Some(image) = image() else { return };
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        spec.image = image;
        spec.memory_mib = 256;
        let first = spec.consumer;
        let running = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let mut running = running.resume().await.unwrap();
        let reports = |e: &GuestEvent| matches!(e, GuestEvent::PublicKeyReported(_));
        event(&mut running, reports).await;

        let second = Consumer {
            endpoint: "198.51.100.7:4500".parse().unwrap(),
            ..first
        };
        running.control().allow(&second).unwrap();
        running.control().tell(&second);
        let log = running.console_log().to_owned();
        let follows = || {
            fs::read_to_string(&log)
                .unwrap()
                .contains("the consumer is at 198.51.100.7:4500 now")
        };
        let end = Instant::now() + Duration::from_secs(60);
        while !follows() {
            assert!(
                Instant::now() < end,
                "{}",
                fs::read_to_string(&log).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Nothing of what it sends from here on is for where the consumer was, and it does send.
        let counters = || running.guard().counters().unwrap();
        let (before, end) = (counters(), Instant::now() + Duration::from_secs(60));
        while counters().egress.allowed.packets == before.egress.allowed.packets {
            assert!(Instant::now() < end, "it does not try its consumer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let dropped = |counters: &omerta_dataplane::Counters| {
            let count = counters
                .egress
                .dropped
                .iter()
                .find(|(reason, _)| *reason == Reason::Endpoint);
            count.map(|(_, count)| count.packets)
        };
        assert_eq!(dropped(&counters()), dropped(&before));
        let ended = running.kill().await;
        assert_eq!(ended.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_kernel_panic_is_noticed() {
    let Some(image) = image() else { return };
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        // A kernel without a first process panics; it has no pvpanic driver loaded either, so what
        // is seen is the reset that its command line asks for, and the guard verified after it.
        spec.image.kernel = image.kernel;
        spec.memory_mib = 256;
        let running = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let mut running = running.resume().await.unwrap();
        let ended = |e: &GuestEvent| matches!(e, GuestEvent::Reset | GuestEvent::Panicked);
        println!("measured: {:?}", event(&mut running, ended).await);
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn after_a_reset_the_guest_has_another_key_and_reports_it() {
    let Some(image) = image() else { return };
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        spec.image = image;
        spec.memory_mib = 256;
        let running = Paused::launch(spec).await.unwrap().guard().await.unwrap();
        let mut running = running.resume().await.unwrap();
        let reports = |e: &GuestEvent| matches!(e, GuestEvent::PublicKeyReported(_));
        let first = event(&mut running, reports).await;
        running.control().reset().await.unwrap();
        event(&mut running, |e| *e == GuestEvent::Reset).await;
        let second = event(&mut running, reports).await;
        assert_ne!(first, second);
        let ended = running.kill().await;
        assert_eq!(ended.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}
