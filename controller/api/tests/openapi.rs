//! `openapi.yaml` says what the types do.
// Helpers outside of test functions may fail the test, too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use omerta_api::{
    ApiError, Cause, Ended, ErrorKind, Event, Freshness, Guest, GuestLimits, GuestList, GuestState,
    Occurrence, OnSilence, OnViolation, Peer, PeerList, PeerRequest, PeerTunnel, RunRequest,
    StopRequest, Version, Witness, route,
};
use serde::Serialize;
use serde_json::Value;

fn document() -> Value {
    serde_saphyr::from_str(include_str!("../openapi.yaml")).unwrap()
}

fn words<'a>(values: impl IntoIterator<Item = &'a Value>) -> BTreeSet<String> {
    values
        .into_iter()
        .map(|value| value.as_str().unwrap().to_owned())
        .collect()
}

fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

fn word(value: impl Serialize) -> String {
    serde_json::to_value(value)
        .unwrap()
        .as_str()
        .unwrap()
        .to_owned()
}

fn run_request() -> RunRequest {
    RunRequest {
        name: "alpha".into(),
        image: "default".into(),
        consumer: "KEY@192.0.2.10:51820".into(),
        tunnel_address: Some("10.66.0.2/24".into()),
        tunnel_peer: Some(Ipv4Addr::new(10, 66, 0, 1)),
        tunnel: Some("host".into()),
        preshared_key: Some("key".to_owned().into()),
        keepalive_seconds: Some(25),
        reach: vec!["tcp:80".into()],
        cpus: Some(1),
        memory_mib: Some(256),
        disk_mib: Some(4096),
        ssh_key: Some("ssh-ed25519 AAAA".into()),
        mode: Some("filtered".into()),
        on_violation: Some(OnViolation::Terminate),
        limits: Some(GuestLimits::default()),
        console_shell: false,
        agent: Some(true),
        timeout_seconds: Some(60),
        labels: [("plan".to_owned(), "small".to_owned())].into(),
    }
}

fn ended() -> Ended {
    Ended {
        cause: Cause::Rogue,
        reason: Some("endpoint".into()),
        frame: Some("frame".into()),
        frame_to_paused_us: Some(1),
        frame_to_ended_us: Some(2),
        frame_to_tap_removed_us: Some(3),
        message: Some("message".into()),
        leftovers: vec!["directory".into()],
    }
}

fn guest() -> Guest {
    Guest {
        id: 7,
        name: "alpha".into(),
        state: GuestState::Running,
        interface: "omalpha".into(),
        address: Ipv4Addr::new(10, 77, 0, 2),
        gateway: Ipv4Addr::new(10, 77, 0, 1),
        mac: "52:54:00:4d:00:02".into(),
        public_key: None,
        handshake: false,
        agent: Some("sound".into()),
        consumer: "KEY@192.0.2.10:51820".into(),
        tunnel: "guest".into(),
        reach: Vec::new(),
        consumer_name: Some("vpn.example.org:51820".into()),
        on_violation: OnViolation::Terminate,
        mode: "filtered".into(),
        limits: GuestLimits::default(),
        image: "default".into(),
        cpus: 1,
        memory_mib: 256,
        timeout_seconds: None,
        labels: [].into(),
        pid: None,
        console: None,
        log: None,
        rogue_frames: 0,
        since: "2026-01-01T00:00:00Z".into(),
        ended: None,
    }
}

fn occurrences() -> Vec<Occurrence> {
    let text = || String::from("text");
    let all = vec![
        Occurrence::Requested { image: text() },
        Occurrence::Launched { interface: text() },
        Occurrence::Guarded {
            allow: vec![text()],
        },
        Occurrence::Started { pid: 1 },
        Occurrence::Adopted { pid: 1 },
        Occurrence::PublicKey { public_key: text() },
        Occurrence::Handshake {},
        Occurrence::Tunnel {
            tunnel: Freshness::Fresh,
            witness: Witness::Guest,
            handshake_seconds: Some(1),
            endpoint: Some(text()),
            keepalive_seconds: Some(1),
            sent_bytes: 1,
            received_bytes: 1,
        },
        Occurrence::Agent {
            report: text(),
            what: Some(text()),
        },
        Occurrence::Console {
            attempts: 1,
            unread: 1,
            line: text(),
        },
        Occurrence::ConsoleSilent {},
        Occurrence::Outside { found: text() },
        Occurrence::TunnelSilent {
            seconds: 1,
            never: true,
            on_silence: OnSilence::End,
        },
        Occurrence::TunnelBack {},
        Occurrence::ConsumerMoved {
            from: text(),
            to: text(),
        },
        Occurrence::ConsumerStays {
            name: text(),
            endpoint: text(),
            message: text(),
        },
        Occurrence::Rogue {
            reason: text(),
            direction: text(),
            frame: text(),
            length: 1,
            action: OnViolation::Alert,
            attempt: Some(text()),
            suppressed: 0,
        },
        Occurrence::Paused {
            cause: Cause::Rogue,
            reason: Some(text()),
            frame: Some(text()),
            frame_to_paused_us: Some(1),
        },
        Occurrence::PauseFailed { message: text() },
        Occurrence::Held {},
        Occurrence::Released {},
        Occurrence::ReleaseFailed { message: text() },
        Occurrence::Reset {},
        Occurrence::Panicked {},
        Occurrence::Stopping {
            deadline_seconds: 1,
        },
        Occurrence::Scrubbed { bytes: 1 },
        Occurrence::Ended(ended()),
        Occurrence::Lost { events: 1 },
    ];
    // A kind that is added must be added above: this does not compile otherwise.
    for occurrence in &all {
        match occurrence {
            Occurrence::Requested { .. }
            | Occurrence::Launched { .. }
            | Occurrence::Guarded { .. }
            | Occurrence::Started { .. }
            | Occurrence::Adopted { .. }
            | Occurrence::PublicKey { .. }
            | Occurrence::Handshake {}
            | Occurrence::Tunnel { .. }
            | Occurrence::Agent { .. }
            | Occurrence::Console { .. }
            | Occurrence::ConsoleSilent {}
            | Occurrence::Outside { .. }
            | Occurrence::ConsumerMoved { .. }
            | Occurrence::ConsumerStays { .. }
            | Occurrence::TunnelSilent { .. }
            | Occurrence::TunnelBack {}
            | Occurrence::Rogue { .. }
            | Occurrence::Paused { .. }
            | Occurrence::PauseFailed { .. }
            | Occurrence::Held {}
            | Occurrence::Released {}
            | Occurrence::ReleaseFailed { .. }
            | Occurrence::Reset {}
            | Occurrence::Panicked {}
            | Occurrence::Stopping { .. }
            | Occurrence::Scrubbed { .. }
            | Occurrence::Ended(_)
            | Occurrence::Lost { .. }
            | Occurrence::Unknown => {}
        }
    }
    all
}

fn event(what: Occurrence) -> Value {
    let event = Event {
        at: "2026-01-01T00:00:00Z".into(),
        guest: Some("alpha".into()),
        what,
    };
    serde_json::to_value(event).unwrap()
}

#[test]
fn every_path_and_method_is_described() {
    let document = document();
    let described: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| {
            keys(item)
                .into_iter()
                .filter(|key| key != "parameters")
                .map(|method| (path.clone(), method))
        })
        .collect();
    let served: BTreeSet<(String, String)> = route::ALL
        .iter()
        .flat_map(|(path, methods)| {
            methods
                .iter()
                .map(|method| ((*path).to_owned(), (*method).to_owned()))
        })
        .collect();
    assert_eq!(described, served);
}

#[test]
fn every_type_has_the_described_fields() {
    let schemas = &document()["components"]["schemas"];
    let error = ApiError {
        error: ErrorKind::Usage,
        message: "message".into(),
    };
    let version = Version {
        version: "1".into(),
        pid: 1,
        accel: "tcg".into(),
        accel_why: "why".into(),
        machine_why: "q35: configured".into(),
    };
    let stop = StopRequest {
        deadline_seconds: Some(1),
    };
    let list = GuestList {
        guests: vec![guest()],
    };
    let tunnel = PeerTunnel {
        witness: Witness::Host,
        seen_seconds: 1,
        handshake_seconds: Some(70),
        endpoint: Some("192.0.2.10:51820".into()),
        keepalive_seconds: Some(25),
        sent_bytes: 1,
        received_bytes: 1,
    };
    let peer = Peer {
        tunnel: Some(tunnel.clone()),
        guest: "alpha".into(),
        state: GuestState::Running,
        public_key: "KEY".into(),
        endpoint: "192.0.2.10:51820".into(),
        name: Some("vpn.example.org:51820".into()),
        sent_quiet_seconds: Some(1),
        received_quiet_seconds: Some(1),
        former_endpoints: Vec::new(),
        guest_public_key: None,
        handshake: false,
        sent_bytes: None,
        received_bytes: None,
    };
    let peers = PeerList {
        peers: vec![peer.clone()],
    };
    let peer_request = PeerRequest {
        endpoint: "192.0.2.10:51820".into(),
    };
    for (name, full) in [
        ("Peer", serde_json::to_value(peer).unwrap()),
        ("PeerTunnel", serde_json::to_value(tunnel).unwrap()),
        ("PeerList", serde_json::to_value(peers).unwrap()),
        ("PeerRequest", serde_json::to_value(peer_request).unwrap()),
        ("ApiError", serde_json::to_value(error).unwrap()),
        ("Version", serde_json::to_value(version).unwrap()),
        ("RunRequest", serde_json::to_value(run_request()).unwrap()),
        ("StopRequest", serde_json::to_value(stop).unwrap()),
        ("GuestList", serde_json::to_value(list).unwrap()),
        ("Guest", serde_json::to_value(guest()).unwrap()),
        ("Ended", serde_json::to_value(ended()).unwrap()),
    ] {
        assert_eq!(keys(&schemas[name]["properties"]), keys(&full), "{name}");
    }
    let of_events: BTreeSet<String> = occurrences()
        .into_iter()
        .flat_map(|what| keys(&event(what)))
        .collect();
    assert_eq!(keys(&schemas["Event"]["properties"]), of_events);
}

#[test]
fn what_is_required_is_what_cannot_be_left_out() {
    let schemas = &document()["components"]["schemas"];
    let required = |name: &str| words(schemas[name]["required"].as_array().into_iter().flatten());
    let cannot_be_left_out = |full: Value, read: &dyn Fn(Value) -> bool| -> BTreeSet<String> {
        keys(&full)
            .into_iter()
            .filter(|key| {
                let mut without = full.clone();
                without.as_object_mut().unwrap().remove(key);
                !read(without)
            })
            .collect()
    };
    let run = cannot_be_left_out(serde_json::to_value(run_request()).unwrap(), &|value| {
        serde_json::from_value::<RunRequest>(value).is_ok()
    });
    assert_eq!(required("RunRequest"), run);
    let ended = cannot_be_left_out(serde_json::to_value(ended()).unwrap(), &|value| {
        serde_json::from_value::<Ended>(value).is_ok()
    });
    assert_eq!(required("Ended"), ended);
    // Fields of a guest are null rather than absent.
    assert_eq!(
        required("Guest"),
        keys(&serde_json::to_value(guest()).unwrap())
    );
    for name in ["RunRequest", "StopRequest"] {
        assert_eq!(schemas[name]["additionalProperties"], false, "{name}");
    }
}

#[test]
fn every_word_is_described() {
    let schemas = &document()["components"]["schemas"];
    let described = |name: &str| words(schemas[name]["enum"].as_array().unwrap());
    assert_eq!(described("ErrorKind"), ErrorKind::ALL.map(word).into());
    assert_eq!(described("OnViolation"), OnViolation::ALL.map(word).into());
    assert_eq!(described("GuestState"), GuestState::ALL.map(word).into());
    assert_eq!(described("Witness"), Witness::ALL.map(word).into());
    assert_eq!(described("Freshness"), Freshness::ALL.map(word).into());
    assert_eq!(described("Cause"), Cause::ALL.map(word).into());
    let kinds: BTreeSet<String> = occurrences()
        .into_iter()
        .map(|what| event(what)["kind"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(described("EventKind"), kinds);
    for state in GuestState::ALL {
        assert_eq!(word(state), state.word());
    }
    for witness in Witness::ALL {
        assert_eq!(word(witness), witness.word());
    }
    for freshness in Freshness::ALL {
        assert_eq!(word(freshness), freshness.word());
    }
    for cause in Cause::ALL {
        assert_eq!(word(cause), cause.word());
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    match value.as_str() {
                        Some(target) if key == "$ref" => found.push(target.to_owned()),
                        _ => references(value, found),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }
    let document = document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 20);
    for target in found {
        let pointer = target.strip_prefix('#').expect("a local reference");
        assert!(document.pointer(pointer).is_some(), "{target}");
    }
}
