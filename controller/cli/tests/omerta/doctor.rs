//! `omerta doctor`: what it finds, and that each thing that is missing has its remedy.

use std::os::unix::process::CommandExt;

use serde_json::Value;

use crate::run::{Ran, command};

fn doctor(arguments: &str) -> std::process::Command {
    command(&format!(
        "--socket /nonexistent/omertad.sock doctor {arguments}"
    ))
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|check| check["name"] == name)
        .unwrap_or_else(|| panic!("no check named {name}: {report}"))
}

#[test]
fn whatever_is_not_as_it_should_be_has_a_remedy() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let mut without_qemu = doctor("-o json");
    without_qemu.env("PATH", "/nonexistent");
    let ran: Ran = without_qemu.output().unwrap().into();
    let ran = ran.done();
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["usable"], true);
    for check in report["checks"].as_array().unwrap() {
        assert_eq!(
            check["status"] == "ok",
            check.get("remedy").is_none(),
            "{check}"
        );
    }
    assert_eq!(check(&report, "kernel programs")["status"], "ok");
    let qemu = check(&report, "QEMU");
    assert_eq!(qemu["status"], "warning");
    assert!(qemu["remedy"].as_str().unwrap().contains("apt install"));
    let omertad = check(&report, "omertad");
    assert_eq!(omertad["status"], "warning");
    assert!(omertad["remedy"].as_str().unwrap().contains("start it"));
}

#[test]
fn the_table_ends_in_a_summary() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let ran: Ran = doctor("").output().unwrap().into();
    let ran = ran.done();
    let last = ran.stdout.lines().last().unwrap();
    assert!(last.ends_with("warnings, 0 failed"), "{last}");
}

#[test]
fn where_guards_cannot_work_it_says_so_and_fails() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    // The build's directory may be closed to others, so the binary is reached by an open file.
    let binary = std::fs::File::open(crate::run::OMERTA).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&binary));
    nix::fcntl::fcntl(
        &binary,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let output = std::process::Command::new(path)
        .args(["--socket", "/nonexistent/omertad.sock", "doctor"])
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("sudo omerta doctor"), "{said}");
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.contains("guards do not work"), "{complaint}");
}
