//! Bad input and broken surroundings: each ends in one line that names the thing and the remedy,
//! within its deadline, with nothing left half-made.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use omerta_dataplane::{ErrorKind, Guard, GuardConfig, GuardError, Limits};
use omerta_test_support::{Tap, ip};
use omerta_verdict::Mode;
use omerta_vm_launcher::{LaunchError, Paused, RunDirError, Spec, TapError};
use stage::{IDLE, Stage};

async fn refusal(spec: Spec) -> LaunchError {
    let error = match Paused::launch(spec).await {
        Ok(paused) => paused
            .guard()
            .await
            .map(|_| ())
            .expect_err("it must be refused"),
        Err(error) => error,
    };
    let line = error.report();
    println!("refusal: {line}");
    assert!(!line.contains('\n') && line.len() < 500, "{line:?}");
    error
}

#[test]
fn an_unsound_spec_is_refused_as_bad_usage() {
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        spec.tap = "a,script=/bin/sh".into();
        assert_eq!(refusal(spec).await.kind(), ErrorKind::Usage);
    });
    stage.assert_nothing_is_left();
}

#[test]
fn an_image_that_has_gone_is_named_with_the_remedy() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        fs::remove_file(&spec.image.initrd).unwrap();
        let error = refusal(spec).await;
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let line = error.report();
        assert!(
            line.contains("initrd.img") && line.contains("make image"),
            "{line}"
        );
    });
    stage.assert_nothing_is_left();
}

#[test]
fn an_interface_of_the_taps_name_is_left_alone() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let theirs = Tap::create(&spec.tap).unwrap();
        let error = refusal(spec).await;
        assert!(matches!(&error, LaunchError::Tap(TapError::Exists(name)) if name == "omweb-1"));
        assert!(nix::net::if_::if_nametoindex("omweb-1").is_ok());
        drop(theirs);
    });
    stage.assert_nothing_is_left();
}

#[test]
fn an_address_that_another_interface_has_is_named_with_the_remedy() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let theirs = Tap::create("omother").unwrap();
        ip("link set omother up").unwrap();
        ip("route add 10.77.0.2/32 dev omother").unwrap();
        let error = refusal(spec).await;
        assert_eq!(error.kind(), ErrorKind::Refused);
        let line = error.report();
        for part in ["tap omweb-1", "10.77.0.2", "guest pool"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        drop(theirs);
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_run_directory_in_use_and_a_foreign_one_are_left_alone() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let first = Paused::launch(spec.clone()).await.unwrap();
        let mut second = spec.clone();
        second.tap = "omweb-2".into();
        let error = refusal(second).await;
        assert!(matches!(error, LaunchError::RunDir(RunDirError::InUse(_))));
        drop(first.guard().await.unwrap());

        fs::create_dir(&spec.run_dir).unwrap();
        fs::write(spec.run_dir.join("precious"), b"data").unwrap();
        let error = refusal(spec.clone()).await;
        assert!(matches!(
            error,
            LaunchError::RunDir(RunDirError::Foreign(_))
        ));
        assert!(spec.run_dir.join("precious").exists());
        fs::remove_dir_all(&spec.run_dir).unwrap();
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_tap_is_guarded_from_the_launch_on_and_nobody_else_guards_it() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let config = GuardConfig {
            mac: spec.mac,
            addresses: vec![spec.address.into()],
            gateways: vec![spec.gateway.into()],
            gateway_mac: Some(spec.gateway_mac()),
            mode: Mode::Filtered,
            allow: Vec::new(),
            egress: Limits::default(),
            ingress: Limits::default(),
            lease: None,
            owner: None,
        };
        let tap = spec.tap.clone();
        let paused = Paused::launch(spec).await.unwrap();
        let error = Guard::attach(&tap, &config).unwrap_err();
        assert!(
            matches!(error, GuardError::AlreadyGuarded { .. }),
            "{error:?}"
        );
        let guarded = paused.guard().await.unwrap();
        let ended = guarded.end().await;
        assert_eq!(ended.leftovers, [""; 0]);
    });
    stage.assert_nothing_is_left();
}

/// Runs the ignored test `name` of this file in a process of its own, with `PATH` set to `path`.
fn in_a_process_with_path(name: &str, path: &Path) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env("PATH", path)
        .output()
        .unwrap()
}

fn assert_passed(output: &std::process::Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{errors}"
    );
    print!(
        "{}",
        text.lines()
            .filter(|l| l.starts_with("refusal"))
            .collect::<Vec<_>>()
            .join("\n")
    );
}

#[test]
fn a_missing_qemu_is_named_with_the_remedy() {
    assert_passed(&in_a_process_with_path(
        "without_qemu",
        Path::new("/nonexistent"),
    ));
}

#[test]
#[ignore = "run by a_missing_qemu_is_named_with_the_remedy, without QEMU on PATH"]
fn without_qemu() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let line = refusal(spec).await.report();
        assert!(
            line.contains("qemu-system-x86_64") && line.contains("make setup"),
            "{line}"
        );
        let report = omerta_vm_launcher::probe_accel().await;
        assert_eq!(report.accel, omerta_vm_launcher::Accel::Tcg);
        println!("refusal: {}", report.why);
    });
    stage.assert_nothing_is_left();
}

/// Where scripts find their interpreters.
fn with_interpreters(mut spec: Spec) -> Spec {
    spec.jail.paths = vec!["/bin".into(), "/usr".into()];
    spec
}

/// A directory with a script in QEMU's place.
fn fake_qemu(script: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qemu-system-x86_64");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

#[test]
fn a_qemu_that_never_speaks_is_given_up_at_the_deadline() {
    let fake = fake_qemu("exec /bin/sleep 600");
    assert_passed(&in_a_process_with_path("with_a_silent_qemu", fake.path()));
}

#[test]
#[ignore = "run by a_qemu_that_never_speaks_is_given_up_at_the_deadline, with a fake on PATH"]
fn with_a_silent_qemu() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let started = Instant::now();
        let error = refusal(with_interpreters(spec)).await;
        assert!(matches!(error, LaunchError::Qmp(_)), "{error:?}");
        let took = started.elapsed();
        assert!(
            took > Duration::from_secs(9) && took < Duration::from_secs(15),
            "{took:?}"
        );
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_qemu_that_ends_at_once_is_quoted() {
    let fake = fake_qemu("echo 'cannot do this' >&2; exit 3");
    assert_passed(&in_a_process_with_path("with_a_failing_qemu", fake.path()));
}

#[test]
#[ignore = "run by a_qemu_that_ends_at_once_is_quoted, with a fake on PATH"]
fn with_a_failing_qemu() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let line = refusal(with_interpreters(spec)).await.report();
        assert!(
            line.contains("cannot do this") && line.contains("exit code 3"),
            "{line}"
        );
        assert!(line.contains("omerta doctor"), "what to do: {line}");
    });
    stage.assert_nothing_is_left();
}

/// Takes a connection of QMP's socket, hangs up, and dies a moment later.
const HANGS_UP: &str = r#"exec /usr/bin/perl -MIO::Socket::UNIX -e '
    my ($fd) = map { /^socket,id=qmp,fd=(\d+)/ ? $1 : () } @ARGV;
    my $socket = IO::Socket::UNIX->new_from_fd($fd, "r+");
    close $socket->accept;
    print STDERR "out of everything\n";
    select undef, undef, undef, 0.3;
    exit 5' -- "$@""#;

#[test]
fn a_qemu_that_hangs_up_before_it_ends_is_quoted() {
    if !Path::new("/usr/bin/perl").exists() {
        println!("skipped: the fake QEMU is written in Perl, which is not installed");
        return;
    }
    let fake = fake_qemu(HANGS_UP);
    assert_passed(&in_a_process_with_path(
        "with_a_qemu_that_hangs_up",
        fake.path(),
    ));
}

#[test]
#[ignore = "run by a_qemu_that_hangs_up_before_it_ends_is_quoted, with a fake on PATH"]
fn with_a_qemu_that_hangs_up() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let line = refusal(with_interpreters(spec)).await.report();
        for part in ["out of everything", "exit code 5", "omerta doctor"] {
            assert!(line.contains(part), "{part}: {line}");
        }
    });
    stage.assert_nothing_is_left();
}

#[test]
fn without_root_it_says_so() {
    let executable = std::env::current_exe().unwrap();
    // The test's own file may lie where only root can go.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("refusals");
    fs::copy(executable, &copy).unwrap();
    let output = Command::new(copy)
        .args(["--exact", "as_nobody", "--ignored", "--nocapture"])
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert_passed(&output);
}

#[test]
#[ignore = "run by without_root_it_says_so, as nobody"]
fn as_nobody() {
    let directory = tempfile::tempdir().unwrap();
    for file in ["vmlinuz", "initrd.img"] {
        fs::write(directory.path().join(file), b"x").unwrap();
    }
    let image = omerta_vm_launcher::Image::open(directory.path()).unwrap();
    let spec = stage::spec(image, directory.path().join("web-1"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let line = runtime.block_on(refusal(spec.clone())).report();
    assert!(line.contains("root"), "{line}");
    assert!(!spec.run_dir.exists());
}
