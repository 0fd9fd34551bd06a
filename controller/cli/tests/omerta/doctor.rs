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

#[test]
fn within_ip_netns_exec_the_hosts_bpffs_is_found_and_the_rest_is_told_not_to_be_the_hosts() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let namespace = omerta_test_support::Namespace::new("omdoctor").unwrap();
    let name = namespace.name();
    let report = |enter: &[&str]| -> Value {
        let inner = doctor("-o json");
        let mut outer = std::process::Command::new(enter[0]);
        outer.args(&enter[1..]).arg(inner.get_program());
        outer.args(inner.get_args());
        let ran: Ran = outer.output().unwrap().into();
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let inside = report(&["ip", "netns", "exec", name]);
    assert_eq!(check(&inside, "bpffs")["status"], "ok");
    let net = format!("--net=/run/netns/{name}");
    let remedy = check(&inside, "mounts")["remedy"].as_str().unwrap();
    assert_eq!(remedy, format!("nsenter {net} omerta doctor"));
    // Which does as well as it says.
    let inside = report(&["nsenter", &net]);
    assert_eq!(check(&inside, "bpffs")["status"], "ok");
    let checks = inside["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["name"] != "mounts"));
}
