//! Starting and ending.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::daemon::{Daemon, command, complaint, namespace, run_to_end};

#[test]
fn second_omertad_is_refused_with_the_socket_and_the_first_ones_pid() {
    let mut first = Daemon::start();
    let mut second = command(&first.namespace, first.path());
    second.args(["--metrics", "off"]);
    let line = complaint(&run_to_end(second), 1);
    assert!(
        line.contains(&format!("(pid {})", first.process.pid())),
        "{line}"
    );
    assert!(
        line.contains(&first.socket().display().to_string()),
        "{line}"
    );
    assert!(
        first.process.ended().unwrap().is_none(),
        "the first one goes on"
    );
    assert_eq!(first.get("/v1/version").status, 200);
}

/// Each thing that two omertads must not share is named, with the option that parts them.
#[test]
fn second_omertad_is_refused_what_the_first_has() {
    let first = Daemon::start();
    let elsewhere = tempfile::tempdir().unwrap();
    let at = |name: &str| elsewhere.path().join(name);
    let mut second = first.namespace.command(env!("CARGO_BIN_EXE_omertad"));
    second.arg("--socket").arg(at("omertad.sock"));
    second.arg("--run-dir").arg(first.path().join("run"));
    second.args(["--metrics", "off", "--guest-pool", "10.99.0.0/16"]);
    let line = complaint(&run_to_end(second), 1);
    let run_dir = first.path().join("run").display().to_string();
    let pid = format!("(pid {})", first.process.pid());
    for part in [run_dir.as_str(), &pid, "--run-dir"] {
        assert!(line.contains(part), "{part}: {line}");
    }

    let mut third = command(&first.namespace, elsewhere.path());
    third.args(["--metrics", "off"]);
    let line = complaint(&run_to_end(third), 1);
    for part in ["10.77.0.0/16", "network namespace", "--guest-pool"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let left = std::fs::read_dir(elsewhere.path()).unwrap().count();
    assert_eq!(left, 0, "what a refused one made is gone");

    // With nothing in common both run.
    let fourth = Daemon::start();
    assert_eq!(fourth.get("/v1/version").status, 200);
    assert_eq!(first.get("/v1/version").status, 200);
}

#[test]
fn unknown_configuration_key_is_refused_with_file_and_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("omertad.toml");
    std::fs::write(&file, "accel = \"tcg\"\non_violatoin = \"drop\"\n").unwrap();
    let mut command = command(&namespace(), directory.path());
    command.arg("--config").arg(&file);
    let line = complaint(&run_to_end(command), 2);
    assert!(
        line.contains("omertad.toml: line 2") && line.contains("`on_violatoin`"),
        "{line}"
    );
    assert!(
        !directory.path().join("omertad.sock.lock").exists(),
        "nothing is left half-made"
    );
}

#[test]
fn bad_option_value_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = command(&namespace(), directory.path());
    command.args(["--on-violation", "shrug"]);
    let line = complaint(&run_to_end(command), 2);
    assert!(
        line.contains("`shrug`") && line.contains("drop, alert, pause or terminate"),
        "{line}"
    );
}

#[test]
fn pool_that_is_no_network_is_told_once_with_what_to_write() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = command(&namespace(), directory.path());
    command.args(["--guest-pool", "10.79.0.1/16"]);
    let line = complaint(&run_to_end(command), 2);
    assert!(line.contains("write 10.79.0.0/16"), "{line}");
    assert_eq!(line.matches("10.79.0.1").count(), 1, "{line}");
}

#[test]
fn metrics_address_in_use_is_named_and_nothing_is_left() {
    let namespace = namespace();
    let bind = || TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = namespace.enter(bind).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let directory = tempfile::tempdir().unwrap();
    let mut command = command(&namespace, directory.path());
    command.args(["--metrics", &address]);
    let line = complaint(&run_to_end(command), 1);
    assert!(
        line.contains(&address) && line.contains("--metrics off"),
        "{line}"
    );
    for left in ["omertad.sock", "omertad.sock.lock", "run/omertad.lock"] {
        assert!(!directory.path().join(left).exists(), "{left}");
    }
}

#[test]
fn without_root_it_says_so() {
    // The build directory may be closed to others.
    let directory = tempfile::tempdir().unwrap();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory.path(), open).unwrap();
    let copy = directory.path().join("omertad");
    std::fs::copy(env!("CARGO_BIN_EXE_omertad"), &copy).unwrap();
    let mut command = std::process::Command::new(copy);
    command.uid(65_534).gid(65_534).current_dir("/");
    let line = complaint(&run_to_end(command), 1);
    assert!(
        line.contains("needs root") && line.contains("sudo"),
        "{line}"
    );
}

#[test]
fn either_signal_ends_it_and_nothing_is_left() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = Daemon::start();
        daemon.process.signal(signal).unwrap();
        let status = daemon.process.wait(Duration::from_secs(5)).unwrap();
        assert_eq!(
            status.and_then(|status| status.code()),
            Some(0),
            "{signal}: {}",
            daemon.log()
        );
        for left in ["omertad.sock", "omertad.sock.lock", "run/omertad.lock"] {
            assert!(!daemon.path().join(left).exists(), "{signal}: {left}");
        }
    }
}

#[test]
fn what_a_killed_omertad_left_is_replaced() {
    let mut first = Daemon::start();
    // As its guests' launchers leave it: a run directory whose lock nobody holds.
    let abandoned = first.path().join("run/alpha");
    std::fs::create_dir(&abandoned).unwrap();
    std::fs::write(abandoned.join("lock"), b"").unwrap();
    first.process.signal(Signal::SIGKILL).unwrap();
    first.process.wait(Duration::from_secs(5)).unwrap();
    assert!(first.socket().exists());
    let second = Daemon::start_with(first.into_directory(), &["--metrics", "off"]);
    assert_eq!(
        second.get("/v1/version").json()["pid"],
        second.process.pid()
    );
    assert!(!abandoned.exists());
    let mode = std::fs::metadata(second.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn an_open_event_stream_does_not_keep_it_from_ending() {
    let mut daemon = Daemon::start();
    let socket = daemon.socket();
    let reader = std::thread::spawn(move || {
        let stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        crate::daemon::exchange(stream, "GET", "/v1/events?follow=true", "")
    });
    std::thread::sleep(Duration::from_millis(200));
    daemon.process.signal(Signal::SIGTERM).unwrap();
    let status = daemon.process.wait(Duration::from_secs(5)).unwrap();
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    assert_eq!(reader.join().unwrap().status, 200);
}
