//! `omerta vm` and `omerta events` against a socket that answers as omertad does.

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::omertad::{CONSUMER, Omertad, ended_guest, guest};
use crate::run::{command, omerta};

#[test]
fn no_omertad_is_told_with_its_socket_and_the_way_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent.sock");
    // A socket that nobody listens to any more.
    let stale = dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    for socket in [absent, stale] {
        let socket = socket.display();
        for verb in [
            "vm list",
            "vm show a",
            "vm kill a",
            "vm logs a",
            "vm console a",
            "events",
            "events --follow",
            &format!("vm run --name a --image i --consumer {CONSUMER}"),
        ] {
            omerta(&format!("--socket {socket} {verb}")).failed(
                1,
                &[
                    "omertad is not running",
                    &socket.to_string(),
                    &format!("sudo omertad --socket {socket}"),
                ],
            );
        }
        let version = omerta(&format!("--socket {socket} version -o json")).done();
        let version: Value = serde_json::from_str(&version.stdout).unwrap();
        assert_eq!(
            version,
            json!({"omerta": env!("CARGO_PKG_VERSION"), "omertad": null})
        );
    }
}

#[test]
fn socket_comes_from_the_environment_and_the_option_wins() {
    let omertad = Omertad::always(200, json!({"guests": []}));
    let ran = command("vm list -o json")
        .env("OMERTA_SOCKET", omertad.socket())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let ran = command("--socket /nonexistent/omertad.sock vm list")
        .env("OMERTA_SOCKET", omertad.socket())
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
}

#[test]
fn refusals_keep_their_words_and_their_exit_code() {
    for (status, kind, code) in [
        (404, "not_found", 3),
        (400, "usage", 2),
        (409, "refused", 4),
        (500, "failed", 1),
    ] {
        let omertad = Omertad::always(
            status,
            json!({"error": kind, "message": "guest alpha: because"}),
        );
        for verb in [
            "vm show alpha",
            "vm stop alpha",
            "vm kill alpha",
            "vm logs alpha",
            "vm console alpha",
            "vm list",
            "events",
        ] {
            omertad
                .omerta(verb)
                .failed(code, &["omerta: guest alpha: because\n"]);
        }
    }
}

#[test]
fn what_is_no_omertad_is_not_believed() {
    let omertad = Omertad::answering(|_| (200, "<html>".to_owned()));
    omertad
        .omerta("vm list")
        .failed(1, &["different versions", "omertad.sock"]);
    omertad.omerta("events").failed(1, &["no event"]);
    let omertad = Omertad::answering(|_| (502, "<html>".to_owned()));
    omertad
        .omerta("vm list")
        .failed(1, &["502", "omertad.sock"]);
}

#[test]
fn run_asks_for_what_was_typed_and_prints_the_guest() {
    let omertad = Omertad::always(200, guest("alpha", "running"));
    let ran = omertad
        .omerta(&format!(
            "vm run --name alpha --image demo --consumer {CONSUMER} --tunnel-address 10.66.0.2/24 \
             --tunnel-peer 10.66.0.1 --cpus 2 --memory 512 --mode conntrack --on-violation pause \
             --limit egress-bits=100M --limit ingress-packets=20k --limit egress-packets=none \
             --console-shell -o json"
        ))
        .done();
    let shown: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(shown["name"], "alpha");
    let asked = omertad.asked();
    assert_eq!(
        (asked[0].method.as_str(), asked[0].path.as_str()),
        ("POST", "/v1/guests")
    );
    assert_eq!(
        serde_json::from_str::<Value>(&asked[0].body).unwrap(),
        json!({
            "name": "alpha", "image": "demo", "consumer": CONSUMER,
            "tunnel_address": "10.66.0.2/24", "tunnel_peer": "10.66.0.1", "cpus": 2,
            "memory_mib": 512, "mode": "conntrack", "on_violation": "pause", "console_shell": true,
            "limits": {
                "egress": {"packets_per_second": null, "bits_per_second": 100_000_000},
                "ingress": {"packets_per_second": 20_000, "bits_per_second": null}
            }
        })
    );
}

/// An omertad whose guest passes through `states`, one for each time it is looked at.
fn passing_through(states: &'static [&'static str], key_from: usize) -> Omertad {
    let looked = AtomicUsize::new(0);
    Omertad::answering(move |_| {
        let turn = looked.fetch_add(1, Ordering::Relaxed).min(states.len() - 1);
        let mut guest = match states[turn] {
            "ended" => {
                let mut guest = ended_guest("alpha");
                guest["ended"] = json!({"cause": "launch_failed", "message": "no qemu-system-x86_64: install qemu-system-x86"});
                guest
            }
            state => guest("alpha", state),
        };
        if turn < key_from {
            guest["public_key"] = Value::Null;
        }
        (200, guest.to_string())
    })
}

#[test]
fn run_follows_the_guest_until_it_runs() {
    let omertad = passing_through(&["launching", "paused", "guarded", "running"], 9);
    let run = format!("vm run --name alpha --image demo --consumer {CONSUMER} -o json");
    let ran = omertad.omerta(&run).done();
    assert_eq!(
        serde_json::from_str::<Value>(&ran.stdout).unwrap()["state"],
        "running"
    );
}

#[test]
fn run_waits_for_the_public_key_and_not_for_ever() {
    let run = format!("vm run --name alpha --image demo --consumer {CONSUMER} -o json --wait");
    let omertad = passing_through(&["running", "running", "running"], 2);
    let ran = omertad.omerta(&format!("{run} 30")).done();
    assert!(serde_json::from_str::<Value>(&ran.stdout).unwrap()["public_key"].is_string());
    let omertad = passing_through(&["running"], 9);
    omertad.omerta(&format!("{run} 1")).failed(
        1,
        &["guest alpha is running", "1 s", "omerta vm logs alpha"],
    );
}

#[test]
fn guest_that_does_not_come_to_run_is_a_failure_with_its_reason() {
    let omertad = passing_through(&["launching", "condemned", "ending", "ended"], 9);
    omertad
        .omerta(&format!(
            "vm run --name alpha --image demo --consumer {CONSUMER}"
        ))
        .failed(
            1,
            &["guest alpha", "launch_failed", "install qemu-system-x86"],
        );
}

#[test]
fn guests_are_shown_for_people() {
    let omertad = Omertad::always(
        200,
        json!({"guests": [guest("alpha", "running"), ended_guest("beta-2")]}),
    );
    let ran = omertad.omerta("vm list --all").done();
    assert_eq!(ran.stdout, include_str!("golden/vm_list.txt"));
    assert_eq!(omertad.asked()[0].path, "/v1/guests?ended=true");
    let ran = Omertad::always(200, guest("alpha", "running"))
        .omerta("vm show alpha")
        .done();
    assert_eq!(ran.stdout, include_str!("golden/vm_show.txt"));
    let ran = Omertad::always(200, ended_guest("alpha"))
        .omerta("vm kill alpha")
        .done();
    assert_eq!(ran.stdout, include_str!("golden/vm_ended.txt"));
}

#[test]
fn no_guests_are_an_empty_list() {
    let omertad = Omertad::always(200, json!({"guests": []}));
    assert_eq!(omertad.omerta("vm list").done().stdout, "");
    assert_eq!(omertad.omerta("vm list -o json").done().stdout, "[]\n");
}

#[test]
fn stop_passes_its_deadline_on_and_waits_for_the_end() {
    let looked = AtomicUsize::new(0);
    let omertad = Omertad::answering(move |_| {
        let guest = if looked.fetch_add(1, Ordering::Relaxed) < 2 {
            guest("alpha", "stopping")
        } else {
            ended_guest("alpha")
        };
        (200, guest.to_string())
    });
    let ran = omertad.omerta("vm stop alpha --deadline 30 -o json").done();
    assert_eq!(
        serde_json::from_str::<Value>(&ran.stdout).unwrap()["state"],
        "ended"
    );
    let asked = omertad.asked();
    assert_eq!(
        (asked[0].path.as_str(), asked[0].body.as_str()),
        ("/v1/guests/alpha/stop", r#"{"deadline_seconds":30}"#)
    );
}

#[test]
fn guest_that_ended_and_is_not_all_gone_is_a_failure() {
    let mut left = ended_guest("alpha");
    left["ended"]["leftovers"] = json!(["process: stuck", "directory /run/omerta/alpha"]);
    let omertad = Omertad::always(200, left);
    for verb in ["vm kill alpha", "vm stop alpha"] {
        let ran = omertad.omerta(verb);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.stdout.contains("process: stuck; directory"), "{ran:?}");
        assert!(
            ran.stderr
                .contains("guest alpha has ended but left behind: process: stuck"),
            "{ran:?}"
        );
    }
    // To look at its record is none.
    omertad.omerta("vm show alpha").done();
}

#[test]
fn log_of_a_hostile_guest_is_spelled_out() {
    let log = "boot\r\n\x1b]52;c;cm0=\x07\x1b[2Jhi\r\r\ntab\there\n\u{202e}end";
    let omertad = Omertad::answering(move |_| (200, log.to_owned()));
    let ran = omertad.omerta("vm logs alpha").done();
    assert_eq!(
        ran.stdout,
        "boot\n^[]52;c;cm0=^G^[[2Jhi\ntab\there\n\\u{202e}end\n"
    );
    let ran = omertad.omerta("vm logs alpha -o json").done();
    let json: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["lines"][0], "boot");
}

#[test]
fn ended_guest_has_no_console() {
    Omertad::always(200, ended_guest("alpha"))
        .omerta("vm console alpha")
        .failed(4, &["guest alpha is ended", "has no console"]);
}

const EVENTS: &str = include_str!("golden/events.ndjson");

#[test]
fn events_are_shown_for_people() {
    let omertad = Omertad::answering(|_| (200, EVENTS.to_owned()));
    let ran = omertad.omerta("events --guest alpha").done();
    assert_eq!(ran.stdout, include_str!("golden/events.txt"));
    assert_eq!(omertad.asked()[0].path, "/v1/events?guest=alpha");
}

#[test]
fn events_reach_programs_as_they_came() {
    let omertad = Omertad::answering(|_| (200, EVENTS.to_owned()));
    assert_eq!(omertad.omerta("events -o json").done().stdout, EVENTS);
}

#[test]
fn events_of_a_guest_that_nobody_knows_are_not_found() {
    let told = "no guest `nobody`: see `omerta vm list`";
    let omertad = Omertad::always(404, json!({"error": "not_found", "message": told}));
    for follow in ["", " --follow"] {
        let arguments = format!("events --guest nobody{follow}");
        omertad.omerta(&arguments).failed(3, &[told]);
    }
}

#[test]
fn followed_stream_that_ends_is_a_failure() {
    let omertad = Omertad::answering(|_| (200, EVENTS.to_owned()));
    let ran = omertad.omerta("events --follow -o json");
    assert_eq!((ran.code, ran.stdout.as_str()), (1, EVENTS));
    assert_eq!(
        ran.stderr,
        "omerta: omertad ended the stream of events: see whether it still runs, then follow again\n"
    );
    assert_eq!(omertad.asked()[0].path, "/v1/events?follow=true");
}
