//! The short form of each part.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::Path;
use std::time::{Duration, Instant};

use omerta_soak::{Storm, parity::Parity};

const CONTROLLER: &str = env!("CARGO_BIN_EXE_omerta-soak");

fn cannot() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: not root");
    }
    !root
}

#[test]
fn kernel_and_native_agree_for_a_moment() {
    if cannot() {
        return;
    }
    let mut parity = Parity::new(fastrand::u64(..)).unwrap();
    let until = Instant::now() + Duration::from_secs(2);
    parity.run(until, None).unwrap();
    assert!(parity.frames() > 1000);
    println!("{}", parity.summary());
}

#[test]
fn exactly_the_right_frames_pass_while_the_policy_flips() {
    if cannot() {
        return;
    }
    let mut storm = Storm::new().unwrap();
    while !storm.has_flipped() {
        let until = Instant::now() + Duration::from_secs(2);
        storm.run(Path::new(CONTROLLER), until).unwrap();
    }
    println!("{}", storm.summary());
}

#[test]
fn killed_controllers_leak_and_lose_nothing() {
    if cannot() {
        return;
    }
    let mut storm = Storm::new().unwrap();
    let controller = Path::new(CONTROLLER);
    while storm.kills() < 20 {
        let (until, left) = (Instant::now() + Duration::from_secs(10), 20 - storm.kills());
        storm.run_killing(controller, until, left).unwrap();
    }
    assert!(storm.has_flipped());
    println!("{}", storm.summary());
}
