//! Guests that are told to stand still, run on, start again, or run no longer than so long.

use std::time::{Duration, Instant};

use omerta_test_support::{CHATTER, IDLE};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::guests::{request, run, start};

fn log_bytes(guest: &Value) -> u64 {
    let log = guest["log"].as_str().unwrap();
    std::fs::metadata(log).unwrap().len()
}

fn kinds(daemon: &Daemon) -> Vec<String> {
    let events = daemon.get("/v1/events?guest=alpha").body;
    let kind = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap();
        event["kind"].as_str().unwrap().to_owned()
    };
    events.lines().map(kind).collect()
}

fn within_a_minute(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "{what}: not in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_guest_stands_still_while_it_is_held_and_runs_on_when_released() {
    let daemon = start(CHATTER);
    let guest = run(&daemon, "alpha");
    within_a_minute("the guest prints", || log_bytes(&guest) > 1000);

    let answer = daemon.post("/v1/guests/alpha/pause", "");
    assert_eq!(
        (answer.status, &answer.json()["state"]),
        (200, &json!("held"))
    );
    let printed = log_bytes(&guest);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(log_bytes(&guest), printed, "it ran while it was held");
    // Asked for again, it is as it is.
    assert_eq!(daemon.post("/v1/guests/alpha/pause", "").status, 200);
    let refused = daemon.post("/v1/guests/alpha/reset", "");
    assert!(refused.refusal(409, "refused").contains("resume it first"));

    let answer = daemon.post("/v1/guests/alpha/resume", "");
    assert_eq!(
        (answer.status, &answer.json()["state"]),
        (200, &json!("running"))
    );
    within_a_minute("the guest prints again", || log_bytes(&guest) > printed);
    assert_eq!(kinds(&daemon)[4..], ["held", "released"]);
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    let refused = daemon.post("/v1/guests/alpha/resume", "");
    assert!(refused.refusal(409, "refused").contains("ended"));
}

#[test]
fn a_held_guest_whose_guard_is_gone_does_not_run_on() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    assert_eq!(daemon.post("/v1/guests/alpha/pause", "").status, 200);
    let mut cut = daemon.namespace.command("ip");
    cut.args(["link", "delete", "omalpha"]);
    assert!(cut.status().unwrap().success());
    let answer = daemon.post("/v1/guests/alpha/resume", "");
    assert_ne!(answer.status, 200, "{answer:?}");
    within_a_minute("it is ended", || {
        daemon.get("/v1/guests/alpha").json()["state"] == "ended"
    });
    assert!(!kinds(&daemon).contains(&"released".to_owned()));
}

#[test]
fn a_reset_is_told_and_the_guest_starts_again() {
    let daemon = start(CHATTER);
    run(&daemon, "alpha");
    let answer = daemon.post("/v1/guests/alpha/reset", "");
    assert_eq!(
        (answer.status, &answer.json()["state"]),
        (200, &json!("running"))
    );
    within_a_minute("the reset is told", || {
        kinds(&daemon).contains(&"reset".to_owned())
    });
    assert_eq!(daemon.get("/v1/guests/alpha").json()["state"], "running");
}

#[test]
fn a_guest_is_killed_when_its_time_is_over_also_while_it_is_held() {
    let daemon = start(IDLE);
    let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
    body["timeout_seconds"] = json!(2);
    body["labels"] = json!({ "plan": "small" });
    let answer = daemon.post("/v1/guests", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.json()["labels"]["plan"], "small");
    assert_eq!(daemon.post("/v1/guests/alpha/pause", "").status, 200);
    within_a_minute("it is ended", || {
        daemon.get("/v1/guests/alpha").json()["state"] == "ended"
    });
    let ended = daemon.get("/v1/guests/alpha").json()["ended"].clone();
    assert_eq!(ended["cause"], "timeout", "{ended}");
}

#[test]
fn labels_and_times_that_cannot_be_are_refused_by_name() {
    let daemon = start(IDLE);
    let many: serde_json::Map<String, Value> =
        (0..17).map(|n| (format!("l{n}"), json!("v"))).collect();
    for (field, value, named) in [
        ("timeout_seconds", json!(0), "timeout_seconds is 0"),
        ("labels", Value::Object(many), "17 labels"),
        ("labels", json!({ "a b": "c" }), "a b=c"),
        ("labels", json!({ "a": "\u{1b}[2J" }), "label `a="),
        ("labels", json!({ "a": "x".repeat(64) }), "a="),
    ] {
        let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
        body[field] = value;
        let message = daemon
            .post("/v1/guests", &body.to_string())
            .refusal(400, "usage");
        assert!(message.contains(named), "{message}");
    }
    assert_eq!(
        daemon.get("/v1/guests?ended=true").json()["guests"],
        json!([])
    );
}
