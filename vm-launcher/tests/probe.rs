//! What the launcher makes of what KVM does to a kernel, by a stand-in for QEMU.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use omerta_vm_launcher::{Accel, Image, KernelProbe, MicrovmProbe, probe_kernel, probe_microvm};

/// Does as the last bytes of its kernel say, and notes its pid beside itself.
const QEMU: &str = r#"#!/bin/sh
for kernel; do :; done
echo $$ > "$(dirname "$0")/pid"
case $(tail -c 8 "$kernel") in
finds...) case "$*" in *microvm*) echo '[    0.3] pci 0000:00:01.0: [1af4:1005] type 00' ;; esac
    echo '[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs'; exec sleep 600 ;;
came-up.) echo '[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs'; exec sleep 600 ;;
gave-up.) echo 'KVM internal error. Suberror: 1' >&2; exec sleep 600 ;;
hangs...) echo 'Booting the kernel.'; exec sleep 600 ;;
resets..) exit 0 ;;
killed..) kill -9 $$ ;;
no-room.) echo 'cannot set up guest memory: Cannot allocate memory' >&2; exit 1 ;;
esac
"#;

/// An image whose kernel has Linux's magic number and says what becomes of it.
fn image(directory: &Path, fate: &str) -> Image {
    let directory = directory.join(fate);
    fs::create_dir(&directory).unwrap();
    let mut kernel = vec![0; 0x300];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel.extend_from_slice(fate.as_bytes());
    fs::write(directory.join("vmlinuz"), kernel).unwrap();
    fs::write(directory.join("initrd.img"), b"initrd").unwrap();
    Image::open(&directory).unwrap()
}

fn stand_in() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qemu-system-x86_64");
    fs::write(&path, QEMU).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// This test binary again, with the stand-in before QEMU.
fn within(test: &str, directory: &Path) -> Child {
    let path = std::env::var("PATH").unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("PATH", format!("{}:{path}", directory.display()))
        .env("OMERTA_TEST_DIRECTORY", directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn directory() -> PathBuf {
    std::env::var_os("OMERTA_TEST_DIRECTORY").unwrap().into()
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: QEMU gets a network namespace of its own, which takes root");
    }
    root
}

#[test]
fn only_what_speaks_of_kvm_turns_it_off() {
    if is_root() {
        let stand_in = stand_in();
        let status = within("each_fate", stand_in.path()).wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by only_what_speaks_of_kvm_turns_it_off, with a stand-in on PATH"]
async fn each_fate() {
    let fates = [
        "came-up.", "gave-up.", "hangs...", "resets..", "killed..", "no-room.",
    ];
    let probes = fates.map(|fate| {
        let image = image(&directory(), fate);
        tokio::spawn(async move { (fate, probe_kernel(&image).await.unwrap()) })
    });
    for probe in probes {
        let (fate, probe) = probe.await.unwrap();
        let fits = match (fate, &probe) {
            ("came-up.", KernelProbe::Runs) => true,
            ("no-room.", KernelProbe::Unknown(why)) => why.contains("Cannot allocate memory"),
            ("gave-up." | "hangs..." | "resets.." | "killed..", KernelProbe::Fails(report)) => {
                report.accel == Accel::Tcg && report.why.contains("vmlinuz")
            }
            _ => false,
        };
        assert!(fits, "{fate}: {probe:?}");
    }
}

#[test]
fn the_small_machine_is_for_kernels_that_come_up_and_find_its_devices() {
    if is_root() {
        let stand_in = stand_in();
        let status = within("each_fate_on_microvm", stand_in.path())
            .wait()
            .unwrap();
        assert!(status.success(), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the_small_machine_is_for_kernels_that_come_up_and_find_its_devices"]
async fn each_fate_on_microvm() {
    for (fate, found) in [
        ("finds...", None),
        ("came-up.", Some("finds no virtio device")),
        ("gave-up.", Some("KVM internal error")),
        ("resets..", Some("ended with")),
        ("no-room.", Some("Cannot allocate memory")),
    ] {
        let probe = probe_microvm(&image(&directory(), fate)).await.unwrap();
        let fits = match (&probe, found) {
            (MicrovmProbe::Runs, None) => true,
            (MicrovmProbe::Fails(why), Some(expected)) => why.contains(expected),
            _ => false,
        };
        assert!(fits, "{fate}: {probe:?}");
    }
}

#[test]
fn a_probe_dies_with_the_launcher() {
    if !is_root() {
        return;
    }
    let stand_in = stand_in();
    let mut launcher = within("a_probe_that_goes_on", stand_in.path());
    let end = Instant::now() + Duration::from_secs(60);
    let pid = loop {
        let noted = fs::read_to_string(stand_in.path().join("pid")).unwrap_or_default();
        if let Ok(pid) = noted.trim().parse::<u32>() {
            break PathBuf::from(format!("/proc/{pid}"));
        }
        assert!(Instant::now() < end, "no probe");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_ne!(
        fs::read_link(pid.join("ns/net")).unwrap(),
        fs::read_link("/proc/thread-self/ns/net").unwrap()
    );
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    while pid.exists() {
        assert!(Instant::now() < end, "the probe outlives its launcher");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by a_probe_dies_with_the_launcher, which kills it"]
async fn a_probe_that_goes_on() {
    let image = image(&directory(), "hangs...");
    let _ = probe_kernel(&image).await;
}
