//! Guests' consumers move, and the allowlist follows.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use omerta_dataplane::{Guard, GuardStatus};
use omerta_test_support::{FrameSender, IDLE};
use serde_json::{Value, json};

use crate::daemon::{Answer, Daemon, namespace};
use crate::guests::{give_image, request, run, start};
use crate::recovery::{show, start_configured, traces};

const FIRST: &str = "192.0.2.10:51820";
const SECOND: &str = "198.51.100.7:4500";

fn put(daemon: &Daemon, name: &str, endpoint: &str) -> Answer {
    let body = json!({ "endpoint": endpoint }).to_string();
    daemon.request("PUT", &format!("/v1/guests/{name}/peer"), &body)
}

fn guard(daemon: &Daemon) -> GuardStatus {
    let status = || Guard::open("omalpha").unwrap().status().unwrap();
    daemon.namespace.enter(status).unwrap()
}

fn moves(daemon: &Daemon) -> Vec<(Value, Value)> {
    let events = daemon.get("/v1/events?guest=alpha").body;
    let events = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    events
        .filter(|event| event["kind"] == "consumer_moved")
        .map(|event| (event["from"].clone(), event["to"].clone()))
        .collect()
}

#[test]
fn allowlist_follows_the_consumer_in_one_commit_and_the_guest_runs_on() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    let before = guard(&daemon);
    assert_eq!(before.allow, [format!("udp:{FIRST}")]);
    let answer = put(&daemon, "alpha", SECOND);
    assert_eq!(answer.status, 200, "{answer:?}");
    let consumer = answer.json()["consumer"].clone();
    assert!(
        consumer.as_str().unwrap().ends_with(&format!("@{SECOND}")),
        "{consumer}"
    );
    let after = guard(&daemon);
    assert_eq!(after.allow, [format!("udp:{SECOND}")]);
    assert_eq!(after.epoch, before.epoch + 1, "more than one commit");
    assert_eq!(moves(&daemon), [(json!(FIRST), json!(SECOND))]);
    // Where it is already, it stays, without a commit and without an event.
    assert_eq!(put(&daemon, "alpha", SECOND).status, 200);
    assert_eq!(guard(&daemon).epoch, after.epoch);
    assert_eq!(moves(&daemon).len(), 1);

    let peers = daemon.get("/v1/peers").json()["peers"].clone();
    assert_eq!(peers[0]["guest"], "alpha");
    assert_eq!(peers[0]["endpoint"], SECOND);
    assert_eq!(peers[0]["former_endpoints"], json!([FIRST]));
    assert_eq!(
        (&peers[0]["handshake"], &peers[0]["sent_bytes"]),
        (&json!(false), &json!(0))
    );

    // The guard is looked at once a second, and what omertad changed is no tampering.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(
        show(&daemon, "alpha")["state"],
        "running",
        "{}",
        daemon.log()
    );
    // What another changes still is.
    let tamper = || {
        let ours = Guard::open_as("omalpha", &"omertad".parse().unwrap()).unwrap();
        ours.allow(&["udp:198.51.100.9:53".parse().unwrap()])
            .unwrap();
    };
    daemon.namespace.enter(tamper).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while show(&daemon, "alpha")["state"] != "ended" {
        assert!(Instant::now() < end, "it runs with another's policy");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn held_guest_whose_consumer_moved_runs_on_where_it_is_now() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    assert_eq!(daemon.post("/v1/guests/alpha/pause", "").status, 200);
    assert_eq!(put(&daemon, "alpha", SECOND).json()["state"], "held");
    assert_eq!(daemon.post("/v1/guests/alpha/resume", "").status, 200);
    assert_eq!(guard(&daemon).allow, [format!("udp:{SECOND}")]);
}

#[test]
fn next_omertad_takes_over_a_guest_whose_consumer_moved() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    assert_eq!(put(&daemon, "alpha", SECOND).status, 200);
    let (namespace, directory) = daemon.die();
    let daemon = Daemon::start_in(namespace, directory, &["--metrics", "off"]);
    let guest = show(&daemon, "alpha");
    assert_eq!(guest["state"], "running", "{guest} {}", daemon.log());
    assert!(
        guest["consumer"].as_str().unwrap().ends_with(SECOND),
        "{guest}"
    );
    let peers = daemon.get("/v1/peers").json()["peers"].clone();
    assert_eq!(peers[0]["former_endpoints"], json!([FIRST]));
    // And back.
    assert_eq!(put(&daemon, "alpha", FIRST).status, 200);
    assert_eq!(guard(&daemon).allow, [format!("udp:{FIRST}")]);
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
}

#[test]
fn guest_that_ended_while_no_omertad_was_there_is_shown_with_its_last_endpoint() {
    let daemon = start(IDLE);
    let pid = run(&daemon, "alpha")["pid"].as_i64().unwrap();
    assert_eq!(put(&daemon, "alpha", SECOND).status, 200);
    let (namespace, directory) = daemon.die();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
    let daemon = Daemon::start_in(namespace, directory, &["--metrics", "off"]);
    let guest = show(&daemon, "alpha");
    assert_eq!(guest["state"], "ended", "{guest}");
    assert!(
        guest["consumer"].as_str().unwrap().ends_with(SECOND),
        "{guest}"
    );
}

/// Killed between keeping a move and committing it, in either order of what is found.
#[test]
fn guest_is_taken_over_by_what_its_guard_allows_where_a_move_was_kept_and_not_made() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    let (namespace, directory) = daemon.die();
    let store = rusqlite::Connection::open(directory.path().join("state/guests.db")).unwrap();
    let endpoints = json!([SECOND, FIRST]).to_string();
    store
        .execute("UPDATE guests SET endpoints = ?1", [endpoints])
        .unwrap();
    drop(store);
    let daemon = Daemon::start_in(namespace, directory, &["--metrics", "off"]);
    let guest = show(&daemon, "alpha");
    assert_eq!(guest["state"], "running", "{guest} {}", daemon.log());
    assert!(
        guest["consumer"].as_str().unwrap().ends_with(FIRST),
        "{guest}"
    );
}

#[test]
fn moves_that_cannot_be_are_refused_and_change_nothing() {
    let daemon = start(IDLE);
    let guest = run(&daemon, "alpha");
    let gateway = format!("{}:1", guest["gateway"].as_str().unwrap());
    for endpoint in [
        "here",
        "192.0.2.10",
        "192.0.2.10:0",
        "[2001:db8::1]:1",
        "127.0.0.1:1",
        "169.254.169.254:80",
        "224.0.0.1:1",
        "0.0.0.0:1",
        gateway.as_str(),
    ] {
        put(&daemon, "alpha", endpoint).refusal(400, "usage");
    }
    put(&daemon, "beta", SECOND).refusal(404, "not_found");
    let unknown = daemon.request(
        "PUT",
        "/v1/guests/alpha/peer",
        r#"{"endpoint":"192.0.2.1:1","key":"x"}"#,
    );
    unknown.refusal(400, "usage");
    assert_eq!(guard(&daemon).allow, [format!("udp:{FIRST}")]);
    assert_eq!(moves(&daemon), []);
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    put(&daemon, "alpha", SECOND).refusal(409, "refused");
    assert_eq!(daemon.get("/v1/peers").json()["peers"], json!([]));
}

#[test]
fn consumer_that_moves_all_the_time_is_refused_until_it_rests() {
    let daemon = Daemon::start();
    give_image(&daemon, IDLE);
    let body = request("alpha", "bare");
    assert_eq!(daemon.post("/v1/guests", &body).status, 201);
    for port in 1..=20 {
        assert_eq!(
            put(&daemon, "alpha", &format!("198.51.100.7:{port}")).status,
            200
        );
    }
    let refused = put(&daemon, "alpha", "198.51.100.7:99").refusal(409, "refused");
    assert!(refused.contains("20 times within 60 s"), "{refused}");
    assert_eq!(guard(&daemon).allow, ["udp:198.51.100.7:20"]);
    assert_eq!(show(&daemon, "alpha")["state"], "running");
}

#[test]
fn guest_whose_consumer_never_answers_is_ended_and_one_that_nobody_waits_for_is_not() {
    let stage = (namespace(), tempfile::tempdir().unwrap());
    let images = format!("image_dir = {:?}\n", stage.1.path().join("state/images"));
    let daemon = start_configured(stage, &format!("{images}[tunnel]\nanswer_seconds = 1\n"));
    give_image(&daemon, IDLE);
    run(&daemon, "alpha");
    let end = Instant::now() + Duration::from_secs(60);
    while show(&daemon, "alpha")["state"] != "ended" {
        assert!(Instant::now() < end, "it runs without its consumer");
        std::thread::sleep(Duration::from_millis(10));
    }
    let ended = show(&daemon, "alpha")["ended"].clone();
    assert_eq!(ended["cause"], "silent", "{ended}");
    let events = daemon.get("/v1/events?guest=alpha").body;
    let silent = events
        .lines()
        .find(|line| line.contains("tunnel_silent"))
        .unwrap();
    let silent: Value = serde_json::from_str(silent).unwrap();
    assert_eq!(
        (&silent["seconds"], &silent["never"], &silent["on_silence"]),
        (&json!(1), &json!(true), &json!("end"))
    );
    let daemon = start_configured(daemon.die(), &images);
    run(&daemon, "beta");
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(show(&daemon, "beta")["state"], "running");
}

/// A frame of the consumer's, which its guard lets in.
fn from_consumer(guest: &Value) -> Vec<u8> {
    let mac: Vec<u8> = guest["mac"]
        .as_str()
        .unwrap()
        .split(':')
        .map(|pair| u8::from_str_radix(pair, 16).unwrap())
        .collect();
    let address: std::net::Ipv4Addr = guest["address"].as_str().unwrap().parse().unwrap();
    let mut header = vec![0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 10];
    header.extend(address.octets());
    let words = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = words.sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = mac;
    frame.extend([0x52, 0x54, 0, 0, 0, 1, 8, 0]);
    frame.extend(header);
    frame.extend(51820u16.to_be_bytes());
    frame.extend(40000u16.to_be_bytes());
    frame.extend([0, 16, 0, 0]);
    frame.extend([0; 8]);
    frame
}

#[test]
fn guest_whose_consumer_has_answered_is_not_ended_for_its_silence_at_the_start() {
    let stage = (namespace(), tempfile::tempdir().unwrap());
    let images = format!("image_dir = {:?}\n", stage.1.path().join("state/images"));
    let daemon = start_configured(stage, &format!("{images}[tunnel]\nanswer_seconds = 8\n"));
    give_image(&daemon, IDLE);
    let guest = run(&daemon, "alpha");
    let send = || {
        FrameSender::open("omalpha")
            .unwrap()
            .send(&from_consumer(&guest))
    };
    daemon.namespace.enter(send).unwrap().unwrap();
    let peers = daemon.get("/v1/peers").json()["peers"].clone();
    assert!(peers[0]["received_bytes"].as_u64().unwrap() > 0, "{peers}");
    let quiet = |peers: &Value| {
        let of = |direction: &str| peers[0][format!("{direction}_quiet_seconds")].as_u64();
        [of("sent").unwrap(), of("received").unwrap()]
    };
    assert_eq!(quiet(&peers), [0, 0]);
    std::thread::sleep(Duration::from_secs(16));
    assert_eq!(show(&daemon, "alpha")["state"], "running");
    let peers = || daemon.get("/v1/peers").json()["peers"].clone();
    let [sent, received] = quiet(&peers());
    assert!(sent >= 16 && received >= 16, "{sent} {received}");
    daemon.namespace.enter(send).unwrap().unwrap();
    let [sent, received] = quiet(&peers());
    assert!(sent >= 16 && received == 0, "{sent} {received}");
}
