//! `omerta guard upgrade`: guards of another build get this one's programs.

use std::fs;
use std::os::unix::fs::symlink;

use omerta_dataplane::Guard;
use omerta_test_support::Tap;
use serde_json::{Value, json};

use crate::guard::{GUEST, Stage};
use crate::run::omerta;

/// Lets the guard of `name` say that its programs, or its maps, are of another build.
fn set_note(stage: &Stage, name: &str, note: &str, text: &str) {
    let inode = stage.namespace().inode().unwrap();
    let path = format!("/sys/fs/bpf/omerta/{inode}/{name}/{note}");
    fs::remove_file(&path).unwrap();
    symlink(text, &path).unwrap();
}

fn age(stage: &Stage, name: &str) {
    set_note(stage, name, "programs", "0000000000000001");
}

fn programs(stage: &Stage, name: &str) -> Value {
    let ran = stage.omerta(&format!("guard show {name} -o json")).done();
    let shown: Value = serde_json::from_str(&ran.stdout).unwrap();
    shown["programs"].clone()
}

#[test]
fn an_older_guard_is_shown_as_such_and_upgraded_once() {
    let Some(stage) = Stage::set() else { return };
    stage.guard("attach", GUEST).done();
    assert_eq!(programs(&stage, "omt0"), "current");
    let ran = stage.guard("upgrade", "").done();
    assert_eq!(ran.stdout, "omt0: current already\n");
    age(&stage, "omt0");
    assert_eq!(programs(&stage, "omt0"), "older");
    let ran = stage.guard("upgrade", "").done();
    assert_eq!(ran.stdout, "omt0: upgraded\n");
    assert_eq!(programs(&stage, "omt0"), "current");
    age(&stage, "omt0");
    let ran = stage.guard("upgrade", "-o json").done();
    let told: Value = serde_json::from_str(&ran.stdout).unwrap();
    let wanted = json!([{"interface": "omt0", "outcome": "upgraded", "counters": "continued"}]);
    assert_eq!(told, wanted);
}

#[test]
fn what_cannot_be_upgraded_is_refused_and_named() {
    let Some(stage) = Stage::set() else { return };
    stage.omerta("guard upgrade").failed(2, &["IFNAME"]);
    omerta("guard upgrade omt0 --all").failed(2, &["--all"]);
    stage.guard("upgrade", "").failed(3, &["omt0", "no guard"]);
    stage
        .omerta("guard upgrade nowhere")
        .failed(3, &["nowhere"]);
    stage.guard("attach", GUEST).done();
    set_note(
        &stage,
        "omt0",
        "layout",
        "0000000000000001-0000000000000001",
    );
    let words = ["omt0", "another version", "stays in force"];
    age(&stage, "omt0");
    stage.guard("upgrade", "").failed(4, &words);
    stage.omerta("guard list").failed(4, &words);
}

#[test]
fn all_guards_are_upgraded_but_those_of_an_owner() {
    let Some(stage) = Stage::set() else { return };
    stage.guard("attach", GUEST).done();
    let other = stage.namespace().enter(|| Tap::create("omt1")).unwrap();
    let _other = other.unwrap();
    stage.omerta(&format!("guard attach omt1 {GUEST}")).done();
    stage
        .namespace()
        .enter(|| {
            let inode = fs::metadata("/proc/thread-self/ns/net").unwrap();
            let inode = std::os::unix::fs::MetadataExt::ino(&inode);
            symlink("omertad", format!("/sys/fs/bpf/omerta/{inode}/omt1/owner")).unwrap();
        })
        .unwrap();
    for name in ["omt0", "omt1"] {
        age(&stage, name);
    }
    let ran = stage.omerta("guard upgrade --all").done();
    assert_eq!(
        ran.stdout,
        "omt0: upgraded\nomt1: left to omertad, which upgrades it when it starts\n"
    );
    stage.omerta("guard upgrade omt1").failed(4, &["omertad's"]);
    let mut ran = stage.omerta("guard upgrade omt0 omt1");
    assert!(
        ran.stdout
            .starts_with("omt0: current already\nomt1: not upgraded: "),
        "{ran:?}"
    );
    ran.stdout.clear();
    ran.failed(4, &["omertad's"]);
    let owner = "omertad".parse().unwrap();
    stage
        .namespace()
        .enter(|| Guard::open_as("omt1", &owner).and_then(Guard::detach))
        .unwrap()
        .unwrap();
}
