//! The API without guests: what is refused and how.

use omerta_api::{RunRequest, route};
use serde_json::json;

use crate::daemon::Daemon;

fn request() -> serde_json::Value {
    json!({
        "name": "alpha",
        "image": "default",
        "consumer": "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=@192.0.2.10:51820",
    })
}

#[test]
fn version_tells_who_answers() {
    let daemon = Daemon::start();
    let version = daemon.get(route::VERSION).json();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(version["pid"], daemon.process.pid());
}

#[test]
fn there_are_no_guests_and_no_events_at_first() {
    let daemon = Daemon::start();
    assert_eq!(daemon.get(route::GUESTS).json(), json!({ "guests": [] }));
    let events = daemon.get(route::EVENTS);
    assert_eq!((events.status, events.body.as_str()), (200, ""));
    assert!(
        events
            .headers
            .contains("content-type: application/x-ndjson"),
        "{events:?}"
    );
}

#[test]
fn unknown_guest_is_not_found_and_named() {
    let daemon = Daemon::start();
    for answer in [
        daemon.get("/v1/guests/nobody"),
        daemon.get("/v1/guests/nobody/log"),
        daemon.post("/v1/guests/nobody/stop", ""),
        daemon.post("/v1/guests/nobody/kill", ""),
        daemon.get("/v1/events?guest=nobody"),
        daemon.get("/v1/events?guest=nobody&follow=true"),
    ] {
        let message = answer.refusal(404, "not_found");
        assert!(
            message.contains("`nobody`") && message.contains("omerta vm list"),
            "{message}"
        );
    }
}

#[test]
fn name_from_a_path_is_shown_printable_and_bounded() {
    let daemon = Daemon::start();
    let path = format!("/v1/guests/%1B%5B31m{}", "x".repeat(500));
    let message = daemon.get(&path).refusal(404, "not_found");
    assert!(
        message.chars().all(|c| !c.is_control()) && message.len() < 200,
        "{message:?}"
    );
    daemon.get("/v1/guests/%FF").refusal(400, "usage");
}

#[test]
fn unknown_route_and_method_are_refused() {
    let daemon = Daemon::start();
    let message = daemon.get("/v1/guest").refusal(404, "not_found");
    assert!(message.contains("/v1/guest"), "{message}");
    let message = daemon
        .request("DELETE", route::GUESTS, "")
        .refusal(400, "usage");
    assert!(message.contains("DELETE"), "{message}");
}

#[test]
fn bad_bodies_are_refused_with_what_is_wrong() {
    let daemon = Daemon::start();
    let mut unknown = request();
    unknown["kernel"] = json!("/etc/shadow");
    let mut missing = request();
    missing.as_object_mut().unwrap().remove("image");
    let mut wrong = request();
    wrong["cpus"] = json!(300);
    let mut policy = request();
    policy["on_violation"] = json!("shrug");
    for (body, names) in [
        (String::new(), "EOF"),
        ("{".to_owned(), "EOF"),
        ("[]".to_owned(), "request body"),
        (unknown.to_string(), "`kernel`"),
        (missing.to_string(), "`image`"),
        (wrong.to_string(), "300"),
        (policy.to_string(), "`shrug`"),
    ] {
        let message = daemon.post(route::GUESTS, &body).refusal(400, "usage");
        assert!(message.contains(names), "{body}: {message}");
    }
    let padded = format!("{}{}", " ".repeat(32 << 10), request());
    let message = daemon.post(route::GUESTS, &padded).refusal(400, "usage");
    assert!(message.contains("larger than 16384 bytes"), "{message}");
}

#[test]
fn bad_values_are_refused_and_nothing_is_kept() {
    let daemon = Daemon::start();
    for (key, value, names) in [
        ("name", json!("Alpha"), "`Alpha`"),
        ("image", json!("../../etc"), "`../../etc`"),
        ("consumer", json!("nobody"), "PUBLIC_KEY@ADDRESS:PORT"),
        ("tunnel_address", json!("10.66.0.2"), "10.66.0.2"),
        ("mode", json!("open"), "`open`"),
    ] {
        let mut body = request();
        body[key] = value;
        let message = daemon
            .post(route::GUESTS, &body.to_string())
            .refusal(400, "usage");
        assert!(message.contains(names), "{message}");
    }
    assert_eq!(
        daemon.get("/v1/guests?ended=true").json(),
        json!({ "guests": [] })
    );
}

#[test]
fn missing_image_is_not_found_with_its_path_and_the_remedy() {
    let daemon = Daemon::start();
    let message = daemon
        .post(route::GUESTS, &request().to_string())
        .refusal(404, "not_found");
    assert!(message.contains("state/images/default"), "{message}");
    assert!(message.contains("make image"), "{message}");
}

#[test]
fn bad_queries_are_refused() {
    let daemon = Daemon::start();
    for path in [
        "/v1/events?folow=true",
        "/v1/events?follow=perhaps",
        "/v1/guests?all=true",
    ] {
        daemon.get(path).refusal(400, "usage");
    }
}

#[test]
fn stop_deadline_out_of_range_is_refused() {
    let daemon = Daemon::start();
    for body in [r#"{"deadline_seconds":0}"#, r#"{"deadline_seconds":601}"#] {
        let message = daemon
            .post("/v1/guests/alpha/stop", body)
            .refusal(400, "usage");
        assert!(message.contains("1 to 600"), "{message}");
    }
}

#[test]
fn guest_that_cannot_be_launched_is_told_and_leaves_nothing() {
    let daemon = Daemon::start();
    let image = daemon.path().join("state/images/default");
    std::fs::create_dir_all(&image).unwrap();
    // Neither is what it says it is: QEMU refuses such a kernel.
    std::fs::write(image.join("vmlinuz"), b"not a kernel").unwrap();
    std::fs::write(image.join("initrd.img"), b"not an initrd").unwrap();
    let mut body: RunRequest = serde_json::from_value(request()).unwrap();
    body.name = format!("broken-{}", std::process::id());
    let body = serde_json::to_string(&body).unwrap();
    let message = daemon.post(route::GUESTS, &body).refusal(500, "failed");
    assert!(message.contains("guest `broken-"), "{message}");
    assert_eq!(daemon.get(route::GUESTS).json(), json!({ "guests": [] }));
    let ended = daemon.get("/v1/guests?ended=true").json();
    assert_eq!(ended["guests"][0]["state"], "ended");
    assert_eq!(ended["guests"][0]["ended"]["cause"], "launch_failed");
    let interface = ended["guests"][0]["interface"].as_str().unwrap().to_owned();
    let exists = || nix::net::if_::if_nametoindex(interface.as_str()).is_ok();
    assert!(!daemon.namespace.enter(exists).unwrap());
    let left = std::fs::read_dir(daemon.path().join("run")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["omertad.lock"], "its own lock");
    let events = daemon.get(route::EVENTS).body;
    let kinds: Vec<serde_json::Value> = events
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["kind"].clone())
        .collect();
    assert_eq!(kinds, ["requested", "ended"]);
    // The name is free again.
    daemon.post(route::GUESTS, &body).refusal(500, "failed");
}
