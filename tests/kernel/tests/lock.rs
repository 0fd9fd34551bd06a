//! Whoever hangs while it changes one interface's guard holds up that one alone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use omerta_dataplane::{Guard, GuardError};
use omerta_kernel_tests::{config, goes, remove_left_overs, victim};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::{Endpoint, Mode};

/// Runs `work` in a namespace of its own that has taps `guest` and `other`; it is given the
/// directory of the namespace's pins.
fn with_taps(work: impl FnOnce(PathBuf) + Send) {
    let namespace = Namespace::new("ot-lock").unwrap();
    let pins = PathBuf::from(format!("/sys/fs/bpf/omerta/{}", namespace.inode().unwrap()));
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let taps = ["guest", "other"].map(|name| Tap::create(name).unwrap());
            work(pins);
            drop(taps);
        })
        .unwrap();
}

fn endpoint(port: u16) -> Endpoint {
    format!("udp:192.0.2.77:{port}").parse().unwrap()
}

/// Everything that can be done with the guard of `other`.
fn use_the_other() {
    let guard = Guard::attach("other", &config(Mode::Filtered)).unwrap();
    guard.allow(&[endpoint(1)]).unwrap();
    assert_eq!(guard.status().unwrap().epoch, 2);
    assert!(Guard::list().unwrap().contains(&"other".to_owned()));
    assert!(!Guard::remove_stale("other", None).unwrap());
    Guard::open("other").unwrap().detach().unwrap();
}

#[test]
fn a_guard_is_changed_while_anothers_lock_is_held() {
    with_taps(|pins| {
        let guest = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        let held = pins.join("guest%lock");
        fs::create_dir(&held).unwrap();
        let lock = File::open(&held).unwrap();
        lock.lock().unwrap();
        let freed = AtomicBool::new(false);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let epoch = guest.allow(&[endpoint(1)]).unwrap();
                assert!(freed.load(Ordering::SeqCst), "changed in spite of the lock");
                epoch
            });
            use_the_other();
            assert_eq!(Guard::list().unwrap(), ["guest"]);
            // It must wait, not find a way round.
            thread::sleep(Duration::from_millis(100));
            freed.store(true, Ordering::SeqCst);
            drop(lock);
            assert_eq!(waiting.join().unwrap(), 2);
        });
        assert!(!held.exists(), "the lock goes with its last holder");
        guest.detach().unwrap();
        assert!(goes(&pins));
    });
}

#[test]
#[ignore = "stopped by another test"]
fn attach_change_and_detach_without_end() {
    victim::has_begun();
    loop {
        let guard = match Guard::attach("guest", &config(Mode::Filtered)) {
            Err(GuardError::AlreadyGuarded { .. }) => Guard::open("guest").unwrap(),
            guard => guard.unwrap(),
        };
        for port in 1..9 {
            guard.allow(&[endpoint(port)]).unwrap();
        }
        guard.detach().unwrap();
    }
}

#[test]
fn a_process_that_hangs_at_any_instant_holds_up_its_own_interface_alone() {
    let mut random = fastrand::Rng::with_seed(3);
    with_taps(|pins| {
        for _ in 0..20 {
            let mut hung = victim::begin("attach_change_and_detach_without_end", "").unwrap();
            thread::sleep(Duration::from_micros(random.u64(..300_000)));
            let process = Pid::from_raw(hung.id().cast_signed());
            kill(process, Signal::SIGSTOP).unwrap();
            use_the_other();
            hung.kill().unwrap();
            hung.wait().unwrap();
            Guard::pinned().unwrap();
            if let Ok(guard) = Guard::open("guest") {
                guard.detach().unwrap();
            }
            Guard::remove_stale("guest", None).unwrap();
            assert!(!pins.exists(), "what a dead process held is removed");
        }
    });
}
