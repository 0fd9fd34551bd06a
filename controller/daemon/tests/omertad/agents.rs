//! The agent in a guest: asked where the image has one, and held against the guest where it does not answer. The
//! bare guests here have none, whatever their image says.

use std::fs;
use std::time::{Duration, Instant};

use omerta_test_support::IDLE;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::guests::{give_image, request};

/// An omertad that waits for agents for two seconds, with a bare image that says it has one.
fn start() -> Daemon {
    let directory = TempDir::new().unwrap();
    let config = directory.path().join("omertad.toml");
    fs::write(&config, "[agent]\narrival_seconds = 2\n").unwrap();
    let daemon = Daemon::start_with(directory, &["--config", config.to_str().unwrap()]);
    give_image(&daemon, IDLE);
    let agent = daemon.path().join("state/images/bare/omerta-agent");
    fs::write(agent, "the recipe's").unwrap();
    daemon
}

fn run(daemon: &Daemon, more: &[(&str, Value)]) -> Value {
    let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
    for (key, value) in more {
        body[key] = value.clone();
    }
    let answer = daemon.post("/v1/guests", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

fn soon(daemon: &Daemon, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let guest = daemon.get("/v1/guests/alpha").json();
        if wanted(&guest) {
            return guest;
        }
        assert!(Instant::now() < end, "{what}: {guest}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guest_whose_agent_does_not_come_is_ended() {
    let daemon = start();
    assert_eq!(run(&daemon, &[])["agent"], "awaited");
    let guest = soon(&daemon, "it ends", |guest| guest["state"] == "ended");
    assert_eq!(guest["ended"]["cause"], "agent", "{guest}");
    assert_eq!(guest["ended"]["message"], "its agent: missed", "{guest}");
}

#[test]
fn under_a_milder_policy_it_stands_still_or_runs_on_and_is_told() {
    let daemon = start();
    run(&daemon, &[("on_violation", json!("pause"))]);
    let guest = soon(&daemon, "it stands still", |guest| {
        guest["state"] == "suspended"
    });
    assert_eq!(guest["agent"], "missed");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    run(&daemon, &[("on_violation", json!("alert"))]);
    let guest = soon(&daemon, "it is told", |guest| guest["agent"] == "missed");
    assert_eq!(guest["state"], "running");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

#[test]
fn nobody_is_asked_where_nobody_is_wanted_or_there_is_none() {
    let daemon = start();
    let guest = run(&daemon, &[("agent", json!(false))]);
    assert_eq!(guest["agent"], Value::Null);
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    fs::remove_file(daemon.path().join("state/images/bare/omerta-agent")).unwrap();
    assert_eq!(run(&daemon, &[])["agent"], Value::Null);
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
    body["agent"] = json!(true);
    let refused = daemon
        .post("/v1/guests", &body.to_string())
        .refusal(400, "usage");
    assert!(refused.contains("--agent"), "{refused}");
}

#[test]
fn guest_whose_agent_is_asked_may_have_its_consumer_move() {
    let daemon = start();
    run(&daemon, &[("on_violation", json!("alert"))]);
    let body = json!({ "endpoint": "198.51.100.7:4500" }).to_string();
    let moved = daemon.request("PUT", "/v1/guests/alpha/peer", &body);
    assert_eq!(moved.status, 200, "{moved:?}");
    let consumer = moved.json()["consumer"].clone();
    let consumer = consumer.as_str().unwrap();
    assert!(consumer.ends_with("@198.51.100.7:4500"), "{consumer}");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}
