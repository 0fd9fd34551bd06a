//! Guests with disks: of the store, in the jail, and what is left when they are gone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use omerta_images::qcow2::Layer;
use omerta_images::{DiskFormat, RootDevice, Seed, Source, Sources, Store, Trust, TrustedKeys};
use omerta_vm_launcher::{DiskError, GuestEvent, Image, LaunchError, LayerSpec, Paused, Spec};
use stage::{IDLE, Stage};

/// Imports the image of `sources` into a store of its own, and opens it.
fn imported(store: &Path, sources: &Sources, seed: Seed) -> Image {
    let trust = Trust {
        keys: TrustedKeys::default(),
        require_signature: false,
    };
    let name = "test".parse().unwrap();
    let manifest = sources.measure(name, seed, &mut |_| ()).unwrap();
    let store = Store::at(store);
    let bytes = manifest.to_bytes().unwrap();
    store
        .import(&bytes, None, sources, &trust, &mut |_| ())
        .unwrap();
    Image::of_store(&store.open(&manifest.name, &trust).unwrap())
}

/// The stage's guest of a few instructions, with a disk of `format` that holds `content`.
fn with_disk(mut spec: Spec, format: DiskFormat, content: &[u8]) -> Spec {
    let directory = spec.image.kernel.parent().unwrap().to_owned();
    let path = directory.join("disk");
    fs::write(&path, content).unwrap();
    let sources = Sources {
        kernel: spec.image.kernel.clone(),
        initrd: spec.image.initrd.clone(),
        disk: Some(Source {
            path,
            format,
            root: RootDevice::DISK,
        }),
        agent: false,
        firewall_log: false,
    };
    spec.image = imported(&directory.join("store"), &sources, Seed::Nocloud);
    spec.layer = Some(LayerSpec {
        directory,
        layer: Layer::new(64 << 20).unwrap(),
    });
    spec
}

#[test]
fn a_guest_runs_on_a_layer_above_the_images_disk_and_the_layer_is_scrubbed_at_the_end() {
    for (format, content) in [
        (DiskFormat::Raw, vec![7; 1 << 20]),
        (DiskFormat::Qcow2, Layer::new(32 << 20).unwrap().content()),
    ] {
        let stage = Stage::new(IDLE);
        stage.run(|spec| async move {
            let spec = with_disk(spec, format, &content);
            let base = spec.image.disk().unwrap().path.clone();
            let paused = Paused::launch(spec).await.unwrap();
            let running = paused.guard().await.unwrap().resume().await.unwrap();
            let ended = running.kill().await;
            assert_eq!(ended.leftovers, [""; 0]);
            let scrubbed = ended.scrubbed.expect("it had a disk");
            assert!(scrubbed.bytes >= 64 << 20, "{scrubbed:?}");
            assert_eq!(fs::read(base).unwrap(), content, "the image is as it was");
        });
        stage.assert_nothing_is_left();
    }
}

#[test]
fn an_image_cannot_be_removed_while_its_guest_lives() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let spec = with_disk(spec, DiskFormat::Raw, &[7; 1 << 20]);
        let store = Store::at(spec.image.kernel.ancestors().nth(3).unwrap());
        let name = "test".parse().unwrap();
        let paused = Paused::launch(spec).await.unwrap();
        let running = paused.guard().await.unwrap().resume().await.unwrap();
        assert!(store.remove(&name).is_err(), "it is in use");
        running.kill().await;
        store.remove(&name).unwrap();
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_disk_that_was_altered_in_the_store_is_not_started() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let spec = with_disk(spec, DiskFormat::Raw, &[7; 1 << 20]);
        let base = spec.image.disk().unwrap().path.clone();
        fs::write(base, [8; 1 << 20]).unwrap();
        let refused = Paused::launch(spec).await.unwrap_err();
        assert!(
            matches!(refused, LaunchError::Disk(DiskError::Altered(_))),
            "{refused}"
        );
    });
    stage.assert_nothing_is_left();
}

/// The Debian image, where it is built: `OMERTA_DEBIAN_DIR`, or `target/debian`.
fn debian() -> Option<PathBuf> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/debian");
    let directory = std::env::var_os("OMERTA_DEBIAN_DIR").map_or_else(built, PathBuf::from);
    if !directory.join("disk.qcow2").exists() {
        println!(
            "skipped: {} has no disk.qcow2: see vm-launcher/image/debian.sh",
            directory.display()
        );
        return None;
    }
    Some(directory)
}

/// Takes minutes where guests are emulated.
#[test]
fn debian_boots_on_a_layer_and_takes_up_its_seed() {
    let Some(directory) = debian() else { return };
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        let place = spec.image.kernel.parent().unwrap().to_owned();
        let sources = Sources::within(&directory);
        spec.image = imported(&place.join("store"), &sources, Seed::Nocloud);
        spec.layer = Some(LayerSpec {
            directory: place,
            layer: Layer::new(3 << 30).unwrap(),
        });
        spec.memory_mib = 512;
        spec.console_shell = true;
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me";
        spec.ssh_key = Some(key.parse().unwrap());
        let begun = Instant::now();
        let paused = Paused::launch(spec).await.unwrap();
        let mut running = paused.guard().await.unwrap().resume().await.unwrap();
        // An emulated boot takes minutes where other work keeps the processors busy.
        let reported = async {
            while !matches!(running.next_event().await, GuestEvent::PublicKeyReported(_)) {}
        };
        tokio::time::timeout(Duration::from_secs(480), reported)
            .await
            .expect("its key");
        println!("measured: its key after {} ms", begun.elapsed().as_millis());
        let socket = running.console_socket().to_owned();
        let ask = move || {
            use std::io::{Read, Write};
            let mut console = std::os::unix::net::UnixStream::connect(socket).unwrap();
            let question = "cloud-init status --wait; hostname; ip -4 -o addr show eth0; ip route; cat /root/.ssh/authorized_keys; df -m / | tail -n1; systemctl is-system-running; systemctl --failed; nft list ruleset | head -5; echo the-\"end\"\n";
            // Whoever does not read what comes keeps the guest from writing more.
            console
                .set_read_timeout(Some(Duration::from_secs(2)))
                .unwrap();
            let until = Instant::now() + Duration::from_secs(400);
            let (mut told, mut buffer) = (String::new(), [0; 4096]);
            while Instant::now() < until && !told.contains("the-end") {
                if !told.contains("cloud-init status") {
                    let _ = console.write_all(question.as_bytes());
                }
                if let Ok(length) = console.read(&mut buffer) {
                    told.push_str(&String::from_utf8_lossy(&buffer[..length]));
                }
            }
            told
        };
        let told = tokio::task::spawn_blocking(ask).await.unwrap();
        println!("measured: all asked after {} ms\n{told}", begun.elapsed().as_millis());
        for fact in ["status: done", "web-1", "10.77.0.2/32", "192.0.2.10 via 10.77.0.1", key] {
            assert!(told.contains(fact), "{fact}");
        }
        let ended = running.stop(Duration::from_secs(60)).await;
        assert_eq!(ended.leftovers, [""; 0]);
        println!("measured: scrubbed {:?}, {} ms in all", ended.scrubbed, begun.elapsed().as_millis());
    });
    stage.assert_nothing_is_left();
}
