//! omertad with real guests of a few instructions.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use omerta_dataplane::Guard;
use omerta_test_support::{CHATTER, FrameSender, Grip, IDLE, POWER_OFF, ip, write_bare_guest};
use serde_json::{Value, json};

use crate::daemon::Daemon;

/// An omertad with an image called `bare` of these instructions.
pub fn start(program: &[u8]) -> Daemon {
    let daemon = Daemon::start();
    give_image(&daemon, program);
    daemon
}

pub fn give_image(daemon: &Daemon, program: &[u8]) {
    write_bare_guest(&daemon.path().join("state/images/bare"), program).unwrap();
}

/// What is posted to run a guest.
pub fn request(name: &str, image: &str) -> String {
    let body = json!({
        "name": name,
        "image": image,
        "memory_mib": 64,
        "consumer": "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=@192.0.2.10:51820",
    });
    body.to_string()
}

pub fn run(daemon: &Daemon, name: &str) -> Value {
    let answer = daemon.post("/v1/guests", &request(name, "bare"));
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

fn within_a_minute(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "{what}: not in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn end_of_the_console_log_is_kept_with_the_record() {
    let daemon = start(CHATTER);
    let guest = run(&daemon, "alpha");
    let log = guest["log"].as_str().unwrap().to_owned();
    within_a_minute("the guest prints more than is kept", || {
        std::fs::metadata(&log).is_ok_and(|log| log.len() > 64 << 10)
    });
    assert!(daemon.get("/v1/guests/alpha/log").body.len() > 64 << 10);
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    let kept = daemon.get("/v1/guests/alpha/log");
    assert_eq!((kept.status, kept.body.len()), (200, 64 << 10));
    assert!(kept.body.bytes().all(|byte| byte == b'A'));
    // The next of that name has a log of its own.
    run(&daemon, "alpha");
    let log = daemon.get("/v1/guests/alpha/log");
    assert_eq!(log.status, 200, "{log:?}");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

#[test]
fn a_long_console_log_is_rotated_while_the_guest_prints_and_is_read_across_both_files() {
    let daemon = start(CHATTER);
    let guest = run(&daemon, "alpha");
    let log = guest["log"].as_str().unwrap();
    // As if it had printed so much already.
    let mut file = std::fs::File::options().append(true).open(log).unwrap();
    std::io::Write::write_all(&mut file, &vec![b'B'; 5 << 20]).unwrap();
    let length = |path: String| std::fs::metadata(path).map_or(0, |file| file.len());
    within_a_minute("the log is rotated", || {
        length(format!("{log}.1")) >= 4 << 20 && length(log.to_owned()) < 1 << 20
    });
    within_a_minute("it prints on", || length(log.to_owned()) > 0);
    // Before it has printed more than is read.
    assert_eq!(daemon.post("/v1/guests/alpha/pause", "").status, 200);
    let text = daemon.get("/v1/guests/alpha/log").body;
    let both =
        [format!("{log}.1"), log.to_owned()].map(|path| std::fs::read_to_string(path).unwrap());
    // What it prints is not held up by the rotation, and may be more than the rest of what is read.
    println!("it had printed {} bytes anew", both[1].len());
    let both = both.concat();
    assert_eq!(text.len(), 1 << 20);
    assert!(both.ends_with(&text), "not the last of both");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

#[test]
fn guest_whose_process_is_killed_while_it_stops_has_not_powered_down() {
    let daemon = start(IDLE);
    let guest = run(&daemon, "alpha");
    let pid = nix::unistd::Pid::from_raw(guest["pid"].as_i64().unwrap() as i32);
    let answer = std::thread::scope(|threads| {
        let stop = threads.spawn(|| {
            let body = json!({ "deadline_seconds": 60 });
            daemon.post("/v1/guests/alpha/stop", &body.to_string())
        });
        within_a_minute("the guest is stopping", || {
            daemon.get("/v1/guests/alpha").json()["state"] == "stopping"
        });
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        stop.join().unwrap()
    });
    let ended = answer.json()["ended"].clone();
    assert_eq!(ended["cause"], "exited", "{ended}");
    assert!(
        ended["message"].as_str().unwrap().contains("signal 9"),
        "{ended}"
    );
}

#[test]
fn guest_that_turns_itself_off_has_exited_without_a_fault() {
    let daemon = start(POWER_OFF);
    run(&daemon, "alpha");
    within_a_minute("the guest is gone", || {
        daemon.get("/v1/guests/alpha").json()["state"] == "ended"
    });
    let ended = daemon.get("/v1/guests/alpha").json()["ended"].clone();
    assert_eq!(
        (&ended["cause"], &ended["message"]),
        (&json!("exited"), &Value::Null)
    );
}

#[test]
fn log_that_was_removed_is_told_with_the_remedy() {
    let daemon = start(IDLE);
    let guest = run(&daemon, "alpha");
    std::fs::remove_file(guest["log"].as_str().unwrap()).unwrap();
    let answer = daemon.get("/v1/guests/alpha/log");
    assert_eq!(answer.status, 404, "{answer:?}");
    assert!(answer.body.contains("omerta vm kill alpha"), "{answer:?}");
}

#[test]
fn guest_that_cannot_be_killed_is_no_clean_end() {
    let mut daemon = start(IDLE);
    let guest = run(&daemon, "alpha");
    let grip = Grip::on(u32::try_from(guest["pid"].as_u64().unwrap()).unwrap()).unwrap();
    let answer = daemon.post("/v1/guests/alpha/kill", "");
    assert_eq!(answer.status, 200, "{answer:?}");
    let ended = answer.json()["ended"].clone();
    let left = ended["leftovers"].to_string();
    for part in ["did not die", "guard of omalpha: kept", "interface omalpha"] {
        assert!(left.contains(part), "{part}: {ended}");
    }
    let events = daemon.get("/v1/events?guest=alpha").body;
    let last: Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!(last["leftovers"], ended["leftovers"]);
    // What may still send is still judged.
    let guards = daemon.namespace.enter(|| Guard::list().unwrap()).unwrap();
    assert_eq!(guards, ["omalpha"]);
    // Its address is nobody else's.
    let next = run(&daemon, "beta");
    assert_ne!(next["address"], guest["address"]);

    daemon.process.signal(Signal::SIGTERM).unwrap();
    let status = daemon.process.wait(Duration::from_secs(20)).unwrap();
    assert_eq!(
        status.and_then(|status| status.code()),
        Some(1),
        "{}",
        daemon.log()
    );
    drop(grip);
    let namespace = &daemon.namespace;
    within_a_minute("the tap goes with QEMU", || {
        let gone = || nix::net::if_::if_nametoindex("omalpha").is_err();
        namespace.enter(gone).unwrap()
    });
    let swept = || Guard::remove_stale("omalpha", None).unwrap();
    assert!(namespace.enter(swept).unwrap());
}

/// Runs a guest, changes something about its tap behind omertad's back, and gives how it ended.
fn ended_by(change: impl FnOnce() + Send) -> String {
    let daemon = start(IDLE);
    let guest = run(&daemon, "alpha");
    let pid = guest["pid"].as_u64().unwrap();
    daemon.namespace.enter(change).unwrap();
    let changed = Instant::now();
    within_a_minute("the guest is ended", || {
        daemon.get("/v1/guests/alpha").json()["state"] == "ended"
    });
    println!("measured: ended {:?} after the change", changed.elapsed());
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    let ended = daemon.get("/v1/guests/alpha").json()["ended"].clone();
    assert_eq!(ended["cause"], "guard_failed", "{ended}");
    assert_eq!(ended["leftovers"], Value::Null, "{ended}");
    let message = ended["message"].as_str().unwrap().to_owned();
    assert!(
        !message.contains("guard attach"),
        "no remedy for what is gone: {message}"
    );
    let events = daemon.get("/v1/events?guest=alpha").body;
    println!("{}", events.lines().last().unwrap());
    message
}

fn ours() -> Guard {
    Guard::open_as("omalpha", &"omertad".parse().unwrap()).unwrap()
}

#[test]
fn guest_whose_guard_is_removed_is_ended() {
    let told = ended_by(|| ours().detach().unwrap());
    assert!(
        told.contains("omalpha") && told.contains("pins were removed"),
        "{told}"
    );
}

#[test]
fn guest_whose_allowlist_is_widened_by_another_is_ended() {
    let told = ended_by(|| {
        let endpoint = "udp:198.51.100.9:53".parse().unwrap();
        ours().allow(&[endpoint]).unwrap();
    });
    assert!(told.contains("policy was changed"), "{told}");
}

#[test]
fn guest_whose_tap_is_removed_is_ended() {
    let told = ended_by(|| ip("link delete omalpha").unwrap());
    assert!(told.contains("tap omalpha was removed, renamed"), "{told}");
}

#[test]
fn guest_whose_tap_is_renamed_is_ended() {
    let told = ended_by(|| ip("link set omalpha name other").unwrap());
    assert!(told.contains("tap omalpha was removed, renamed"), "{told}");
}

#[test]
fn guest_whose_tap_is_replaced_is_ended() {
    let told = ended_by(|| {
        ip("link set omalpha name other").unwrap();
        ip("link add omalpha type veth peer name far").unwrap();
    });
    assert!(told.contains("omalpha"), "{told}");
}

#[test]
fn guards_are_omertads_and_a_dead_ones_are_swept_whatever_its_run_directory() {
    let mut daemon = start(IDLE);
    run(&daemon, "alpha");
    let pinned = || Guard::pinned().unwrap();
    let found = daemon.namespace.enter(pinned).unwrap();
    let owner = found[0].owner.as_ref().map(ToString::to_string);
    assert_eq!(owner.as_deref(), Some("omertad"), "{found:?}");
    daemon.process.signal(Signal::SIGKILL).unwrap();
    daemon.process.wait(Duration::from_secs(5)).unwrap();
    let namespace = daemon.into_namespace();
    within_a_minute("the tap goes with QEMU", || {
        let gone = || nix::net::if_::if_nametoindex("omalpha").is_err();
        namespace.enter(gone).unwrap()
    });
    assert_eq!(namespace.enter(pinned).unwrap().len(), 1);
    let directory = tempfile::tempdir().unwrap();
    let second = Daemon::start_in(namespace, directory, &["--metrics", "off"]);
    assert!(second.namespace.enter(pinned).unwrap().is_empty());
}

#[test]
fn limits_of_a_guest_are_those_of_its_guard() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("omertad.toml");
    std::fs::write(&config, "[limits.egress]\npackets_per_second = 1000\n").unwrap();
    let arguments = ["--metrics", "off", "--config", config.to_str().unwrap()];
    let daemon = Daemon::start_in(crate::daemon::namespace(), directory, &arguments);
    give_image(&daemon, IDLE);
    let enforced = |interface: &str| {
        let status = daemon
            .namespace
            .enter(|| Guard::inspect(interface).unwrap().status);
        serde_json::to_value(status.unwrap().limits).unwrap()
    };
    let configured = json!({
        "egress": { "packets_per_second": 1000, "bits_per_second": null },
        "ingress": { "packets_per_second": null, "bits_per_second": null },
    });
    assert_eq!(run(&daemon, "alpha")["limits"], configured);
    assert_eq!(enforced("omalpha"), configured);

    // Those that are asked for hold in place of the configured ones.
    let asked = json!({
        "egress": { "packets_per_second": null, "bits_per_second": 8_000_000 },
        "ingress": { "packets_per_second": 500, "bits_per_second": null },
    });
    let mut body: Value = serde_json::from_str(&request("beta", "bare")).unwrap();
    body["limits"] = asked.clone();
    let answer = daemon.post("/v1/guests", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(daemon.get("/v1/guests/beta").json()["limits"], asked);
    assert_eq!(enforced("ombeta"), asked);

    body["name"] = "gamma".into();
    body["limits"]["egress"]["bits_per_second"] = 0.into();
    daemon
        .post("/v1/guests", &body.to_string())
        .refusal(400, "usage");
}

#[test]
fn failures_of_a_guards_programs_are_logged_with_the_guest() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    // Nobody reads the ring of events meanwhile.
    daemon.process.signal(Signal::SIGSTOP).unwrap();
    daemon
        .namespace
        .enter(|| {
            let sender = FrameSender::open("omalpha").unwrap();
            let guard = Guard::open("omalpha").unwrap();
            within_a_minute("the ring is full", || {
                for _ in 0..100 {
                    // It says so where the guard drops the frame.
                    let _ = sender.send(&[0x52; 60]);
                }
                let counters = guard.counters().unwrap();
                counters.events_lost.packets > counters.events_limited.packets
            });
        })
        .unwrap();
    daemon.process.signal(Signal::SIGCONT).unwrap();
    within_a_minute("the failure is logged", || {
        daemon.log().contains("no room for the event of a frame")
    });
    let log = daemon.log();
    let line = log
        .lines()
        .find(|line| line.contains("no room for the event"))
        .unwrap();
    assert!(line.contains("alpha"), "{line}");
}
