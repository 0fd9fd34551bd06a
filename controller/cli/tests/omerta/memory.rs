//! Commands that have less memory than they need: killed or failed, they leave the guard in force that was
//! in force before, with its policy, and the next command works.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use omerta_dataplane::{Guard, Standing};
use omerta_test_support::Tap;

use crate::guard::{GUEST, Stage};
use crate::run::OMERTA;

const MEMORY: &str = "/sys/fs/cgroup/memory";
/// In MiB: from too little for the program itself to enough.
const LIMITS: [u32; 9] = [1, 3, 6, 10, 14, 20, 30, 60, 400];
const LIST: u32 = 100_000;

/// Runs `omerta` in a memory cgroup (version 1) of its own, with so many MiB; how it ended.
fn run_with(stage: &Stage, mib: u32, arguments: &str) -> Ended {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let group = PathBuf::from(format!(
        "{MEMORY}/omerta-test-{}-{number}",
        std::process::id()
    ));
    fs::create_dir(&group).unwrap();
    fs::write(group.join("memory.limit_in_bytes"), format!("{mib}M")).unwrap();
    let script = format!(
        "echo $$ > {}/tasks && exec {OMERTA} {arguments}",
        group.display()
    );
    let mut command = stage.namespace().command("sh");
    let status = command.args(["-c", &script]).output().unwrap().status;
    // What it has made in the kernel stays charged to the group; that goes all the same.
    let _ = fs::remove_dir(&group);
    match (status.code(), status.signal()) {
        (Some(0), _) => Ended::Done,
        (Some(1), _) => Ended::Failed,
        (None, Some(nix::libc::SIGKILL)) => Ended::Killed,
        // Rust's words for memory that there is none of.
        (None, Some(nix::libc::SIGABRT)) | (Some(101), _) => Ended::Killed,
        other => panic!("{arguments} with {mib} MiB: {other:?}"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Done,
    Failed,
    Killed,
}

/// Tells how it ended with each limit, and that both were seen: too little, and enough.
fn told(what: &str, ended: &[Ended]) {
    println!("{what} with {LIMITS:?} MiB: {ended:?}");
    assert_eq!(ended.last(), Some(&Ended::Done), "{what}");
    assert!(
        ended.contains(&Ended::Killed) || ended.contains(&Ended::Failed),
        "{what}"
    );
}

fn status(stage: &Stage, interface: &str) -> omerta_dataplane::GuardStatus {
    stage
        .namespace()
        .enter(|| {
            let guard = Guard::open(interface).unwrap();
            guard.verify().unwrap();
            guard.status().unwrap()
        })
        .unwrap()
}

#[test]
fn a_command_without_memory_leaves_the_guard_and_its_policy_in_force() {
    let Some(stage) = Stage::set() else { return };
    if !PathBuf::from(MEMORY).join("memory.limit_in_bytes").exists() {
        eprintln!("skipped: no memory controller of cgroup version 1");
        return;
    }
    stage
        .guard("attach", &format!("{GUEST} --allow udp:192.0.2.1:1"))
        .done();
    let files = tempfile::TempDir::new().unwrap();
    let list = files.path().join("list");
    let lines = (0..LIST).map(|number| {
        let [_, a, b, c] = number.to_be_bytes();
        format!("udp:100.{}.{b}.{c}:7\n", 64 + a)
    });
    fs::write(&list, lines.collect::<String>()).unwrap();

    let mut ended = Vec::new();
    for mib in LIMITS {
        let how = run_with(
            &stage,
            mib,
            &format!("guard replace omt0 --file {}", list.display()),
        );
        let allow = status(&stage, "omt0").allow;
        let wanted = if how == Ended::Done { LIST as usize } else { 1 };
        // What was killed after its last step has done it.
        assert!(
            allow.len() == wanted || (how == Ended::Killed && allow.len() == LIST as usize),
            "{how:?}: {} endpoints",
            allow.len()
        );
        // The next command works.
        stage.guard("mode", "direct").done();
        stage.guard("mode", "filtered").done();
        let one = files.path().join("one");
        fs::write(&one, "udp:192.0.2.1:1\n").unwrap();
        stage
            .guard("replace", &format!("--file {}", one.display()))
            .done();
        ended.push(how);
    }
    told("replace", &ended);

    let before = status(&stage, "omt0");
    let inode = stage.namespace().inode().unwrap();
    let note = format!("/sys/fs/bpf/omerta/{inode}/omt0/programs");
    let mut ended = Vec::new();
    for mib in LIMITS {
        fs::remove_file(&note).unwrap();
        symlink("0000000000000001", &note).unwrap();
        let how = run_with(&stage, mib, "guard upgrade omt0");
        let after = status(&stage, "omt0");
        assert_eq!((&after.allow, after.epoch), (&before.allow, before.epoch));
        if how == Ended::Done {
            assert_eq!(after.programs, "current");
        }
        stage.guard("upgrade", "").done();
        assert_eq!(status(&stage, "omt0").programs, "current");
        ended.push(how);
    }
    told("upgrade", &ended);

    let _other = stage
        .namespace()
        .enter(|| Tap::create("omt1"))
        .unwrap()
        .unwrap();
    let attach = format!("guard attach omt1 {GUEST} --allow udp:192.0.2.1:1");
    let mut ended = Vec::new();
    for mib in LIMITS {
        let how = run_with(&stage, mib, &attach);
        // The other's guard is none of its business.
        assert_eq!(status(&stage, "omt0").standing, Standing::InForce);
        if how != Ended::Done {
            let ran = stage.omerta(&attach);
            // Killed when all was done.
            assert!(ran.code == 0 || how == Ended::Killed, "{ran:?}");
        }
        assert_eq!(status(&stage, "omt1").allow, ["udp:192.0.2.1:1"]);
        stage.omerta("guard detach omt1").done();
        ended.push(how);
    }
    told("attach", &ended);
}
