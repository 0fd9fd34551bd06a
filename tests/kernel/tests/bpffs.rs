//! What becomes of guards when somebody unmounts the bpffs that they are pinned in.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use omerta_dataplane::{Guard, GuardWatch};
use omerta_kernel_tests::config;
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::Mode;

const BPFFS: &str = "/sys/fs/bpf";
const ANCHOR: &str = "/run/omerta-bpf";

/// Runs the ignored test `work` of this binary where process 1 is its own, with mounts of its own:
/// what it unmounts, nobody else loses.
#[track_caller]
fn apart(work: &str) {
    let output = Command::new("unshare")
        .args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
            "--",
        ])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", work, "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let passed = output.status.success() && said.contains("1 passed");
    assert!(passed, "{said}{}", String::from_utf8_lossy(&output.stderr));
}

fn mount_new(kind: &str, at: &str) {
    mount(
        Some(kind),
        at,
        Some(kind),
        MsFlags::empty(),
        Some("mode=0700"),
    )
    .unwrap();
}

/// A new bpffs and a new /run, of this mount namespace alone; then `work` in a network namespace
/// with a tap `guest`.
fn on_mounts_of_its_own(work: impl FnOnce() + Send) {
    assert_eq!(std::process::id(), 1, "only where nobody else's mounts are");
    // What is unmounted here stays mounted elsewhere.
    let (none, private) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE);
    mount(none, "/", none, private, none).unwrap();
    mount_new("tmpfs", "/run");
    while is_bpffs(BPFFS) {
        unmount(BPFFS);
    }
    mount_new("bpf", BPFFS);
    let namespace = Namespace::new("ot-bpffs").unwrap();
    namespace
        .enter(|| {
            let _tap = Tap::create("guest").unwrap();
            work();
        })
        .unwrap();
}

fn unmount(at: &str) {
    umount2(at, MntFlags::MNT_DETACH).unwrap();
}

fn is_bpffs(path: &str) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// How many programs judge on each hook, once the kernel has had time to let go of them.
fn judging() -> [usize; 2] {
    [TcAttachType::Ingress, TcAttachType::Egress]
        .map(|hook| SchedClassifier::query_tcx("guest", hook).unwrap().1.len())
}

#[track_caller]
fn soon_judged_by(count: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while judging() != [count; 2] && Instant::now() < deadline {
        sleep(Duration::from_millis(5));
    }
    assert_eq!(judging(), [count; 2]);
}

#[test]
fn a_guard_judges_on_when_bpffs_is_unmounted_and_the_next_command_restores_it() {
    apart("unmount_bpffs_under_a_guard");
}

#[test]
#[ignore = "run by another test, with mounts of its own"]
fn unmount_bpffs_under_a_guard() {
    on_mounts_of_its_own(|| {
        drop(Guard::attach("guest", &config(Mode::Filtered)).unwrap());
        assert!(is_bpffs(ANCHOR));
        unmount(BPFFS);
        assert!(!is_bpffs(BPFFS));
        sleep(Duration::from_millis(300));
        assert_eq!(judging(), [1; 2]);
        // As it was, and where it was.
        let guard = Guard::open("guest").unwrap();
        guard.verify().unwrap();
        assert!(is_bpffs(BPFFS));
        assert_eq!(guard.replace(&[]).unwrap(), 2);

        // The other one may go, too.
        unmount(ANCHOR);
        guard.verify().unwrap();
        guard.detach().unwrap();
        soon_judged_by(0);
    });
}

#[test]
fn a_guard_is_found_when_another_bpffs_is_mounted_in_its_place() {
    apart("mount_another_bpffs_over_a_guard");
}

#[test]
#[ignore = "run by another test, with mounts of its own"]
fn mount_another_bpffs_over_a_guard() {
    on_mounts_of_its_own(|| {
        drop(Guard::attach("guest", &config(Mode::Filtered)).unwrap());
        unmount(BPFFS);
        mount_new("bpf", BPFFS);
        let guard = Guard::open("guest").unwrap();
        guard.verify().unwrap();
        guard.detach().unwrap();
        soon_judged_by(0);
        assert!(!Path::new(ANCHOR).exists(), "it goes with the last guard");
    });
}

#[test]
fn without_any_mount_only_a_watched_guard_judges() {
    apart("unmount_every_bpffs");
}

#[test]
#[ignore = "run by another test, with mounts of its own"]
fn unmount_every_bpffs() {
    for watched in [true, false] {
        let unmount_both = || {
            let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
            let watch = watched.then(|| GuardWatch::begin(&guard).unwrap());
            drop(guard);
            unmount(BPFFS);
            unmount(ANCHOR);
            sleep(Duration::from_millis(300));
            soon_judged_by(usize::from(watched));
            drop(watch);
            soon_judged_by(0);
        };
        if watched {
            on_mounts_of_its_own(unmount_both);
        } else {
            std::fs::remove_dir(ANCHOR).unwrap();
            mount_new("bpf", BPFFS);
            let namespace = Namespace::new("ot-bpffs").unwrap();
            namespace
                .enter(|| {
                    let _tap = Tap::create("guest").unwrap();
                    unmount_both();
                })
                .unwrap();
        }
    }
}
