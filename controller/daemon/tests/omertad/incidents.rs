//! What omertad records of guests that are caught.

use std::path::Path;
use std::time::{Duration, Instant};

use omerta_dataplane::Guard;
use omerta_incidents::{Book, Bounds, Deed, Incident, Outcome, What, Witness, read};
use omerta_test_support::{IDLE, Injector, ip};
use serde_json::{Value, json};

use crate::daemon::{Daemon, namespace};
use crate::guests::{give_image, request, run, start};

/// An omertad whose configuration says `text`.
fn configured(text: &str) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("omertad.toml");
    std::fs::write(&config, text).unwrap();
    let arguments = ["--metrics", "off", "--config", config.to_str().unwrap()];
    let daemon = Daemon::start_in(namespace(), directory, &arguments);
    give_image(&daemon, IDLE);
    daemon
}

fn within_a_minute(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "{what}: not in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A datagram of the guest's to `to`, port 53.
fn datagram(daemon: &Daemon, guest: &Value, to: [u8; 4]) -> Vec<u8> {
    let policy = || Guard::inspect("omalpha").unwrap().status;
    let status = serde_json::to_value(daemon.namespace.enter(policy).unwrap()).unwrap();
    let mac = |text: &Value| -> Vec<u8> {
        let pairs = text.as_str().unwrap().split(':');
        pairs
            .map(|pair| u8::from_str_radix(pair, 16).unwrap())
            .collect()
    };
    let from: std::net::Ipv4Addr = guest["address"].as_str().unwrap().parse().unwrap();
    let mut frame = mac(&status["gateway_mac"]);
    frame.extend(mac(&guest["mac"]));
    frame.extend([0x08, 0, 0x45, 0, 0, 29, 0, 1, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(from.octets());
    frame.extend(to);
    frame.extend([0x12, 0x34, 0, 53, 0, 9, 0, 0, b'x']);
    frame
}

/// The incidents and outcomes that are recorded, once `enough` of them are.
fn recorded(
    state: &Path,
    mut enough: impl FnMut(&[Incident], &[Outcome]) -> bool,
) -> (Vec<Incident>, Vec<Outcome>) {
    let mut found = (Vec::new(), Vec::new());
    within_a_minute("it is recorded", || {
        found = (Vec::new(), Vec::new());
        // A line that is being written is there at the next look.
        let read = read(&state.join("incidents"), |entry| match &entry.what {
            What::Incident(incident) => found.0.push(Incident::clone(incident)),
            What::Outcome(outcome) => found.1.push(Outcome::clone(outcome)),
            other => panic!("{other:?}"),
        });
        read.is_ok() && enough(&found.0, &found.1)
    });
    found
}

#[test]
fn a_guest_that_is_ended_for_a_frame_is_recorded_with_the_frame_and_what_was_done() {
    let daemon = start(IDLE);
    let guest = run(&daemon, "alpha");
    let frame = datagram(&daemon, &guest, [198, 51, 100, 1]);
    let inject = || Injector::into("omalpha").unwrap();
    let injector = daemon.namespace.enter(inject).unwrap();
    for _ in 0..3 {
        injector.inject(&frame).unwrap();
    }
    let state = daemon.path().join("state");
    let ended = |outcomes: &[Outcome]| outcomes.iter().any(|o| o.deed == Deed::Ended);
    let (incidents, outcomes) = recorded(&state, |_, outcomes| ended(outcomes));
    assert_eq!(incidents.len(), 1, "{incidents:?}");
    let incident = &incidents[0];
    assert_eq!(
        (incident.guest.as_str(), incident.action.as_str()),
        ("alpha", "terminate")
    );
    assert_eq!(
        (incident.attempt.as_str(), incident.epoch),
        ("dns", Some(1))
    );
    let caught = incident.frame.as_ref().unwrap();
    assert_eq!(caught.reason, "endpoint");
    assert_eq!(caught.head().unwrap(), frame);
    let deeds: Vec<_> = outcomes.iter().map(|outcome| outcome.deed).collect();
    assert_eq!(deeds, [Deed::Paused, Deed::Ended]);
    assert!(outcomes.iter().all(|outcome| outcome.case == incident.case));
    let end = &outcomes[1];
    assert!(end.frame_to_paused_us.is_some() && end.frame_to_tap_removed_us.is_some());
    let shown = daemon.get("/v1/guests/alpha").json()["ended"].clone();
    assert_eq!(shown["frame_to_ended_us"], json!(end.frame_to_ended_us));
    let events = daemon.get("/v1/events?guest=alpha").body;
    assert!(events.contains(r#""attempt":"dns""#), "{events}");
}

#[test]
fn frames_below_their_threshold_are_told_and_those_that_reach_it_act() {
    let daemon = configured("[rogue.thresholds]\nendpoint = { frames = 3, seconds = 60 }\n");
    let guest = run(&daemon, "alpha");
    let frame = datagram(&daemon, &guest, [198, 51, 100, 1]);
    let inject = || Injector::into("omalpha").unwrap();
    let injector = daemon.namespace.enter(inject).unwrap();
    let told = || daemon.get("/v1/guests/alpha").json();
    for count in 1..=2 {
        injector.inject(&frame).unwrap();
        within_a_minute("the frame is counted", || told()["rogue_frames"] == count);
        assert_eq!(told()["state"], "running");
    }
    injector.inject(&frame).unwrap();
    within_a_minute("the third acts", || told()["state"] == "ended");
    let state = daemon.path().join("state");
    let (incidents, _) = recorded(&state, |incidents, outcomes| {
        incidents.len() == 2 && outcomes.len() == 2
    });
    let actions: Vec<_> = incidents.iter().map(|i| i.action.as_str()).collect();
    assert_eq!(actions, ["alert", "terminate"]);
}

#[test]
fn a_guest_that_is_only_reported_is_recorded_once_for_each_reason() {
    let daemon = start(IDLE);
    let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
    body["on_violation"] = "alert".into();
    let answer = daemon.post("/v1/guests", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    let guest = answer.json();
    let frame = datagram(&daemon, &guest, [198, 51, 100, 1]);
    let mut forged = frame.clone();
    forged[11] ^= 1;
    let inject = || Injector::into("omalpha").unwrap();
    let injector = daemon.namespace.enter(inject).unwrap();
    for _ in 0..50 {
        injector.inject(&frame).unwrap();
        injector.inject(&forged).unwrap();
    }
    within_a_minute("all are counted", || {
        daemon.get("/v1/guests/alpha").json()["rogue_frames"] == 100
    });
    let state = daemon.path().join("state");
    let (incidents, outcomes) = recorded(&state, |incidents, _| incidents.len() == 2);
    let attempts: Vec<_> = incidents.iter().map(|i| i.attempt.as_str()).collect();
    assert_eq!((attempts, outcomes.len()), (vec!["dns", "spoof"], 0));
}

#[test]
fn a_record_that_is_not_written_any_more_keeps_no_guest_from_its_end() {
    let daemon = start(IDLE);
    let guest = run(&daemon, "alpha");
    let frame = datagram(&daemon, &guest, [198, 51, 100, 1]);
    // The first segment's place is taken, as a full disk would have it.
    let place = daemon
        .path()
        .join(format!("state/incidents/{:020}.ndjson", 1));
    std::fs::create_dir(&place).unwrap();
    let inject = || Injector::into("omalpha").unwrap();
    let injector = daemon.namespace.enter(inject).unwrap();
    injector.inject(&frame).unwrap();
    within_a_minute("the guest is ended", || {
        daemon.get("/v1/guests/alpha").json()["ended"]["cause"] == "rogue"
    });
    within_a_minute("it is told", || {
        daemon.log().contains("an incident is not recorded")
    });
}

#[test]
fn a_guest_whose_firewall_is_promised_to_be_heard_and_is_not_is_told_of_once_and_runs_on() {
    let daemon = start(IDLE);
    // The recipe's word that the image's firewall speaks; a bare guest has none.
    let promise = daemon.path().join("state/images/bare/firewall-log");
    std::fs::write(promise, "").unwrap();
    let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
    body["on_violation"] = "alert".into();
    let answer = daemon.post("/v1/guests", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    let frame = datagram(&daemon, &answer.json(), [198, 51, 100, 1]);
    let inject = || Injector::into("omalpha").unwrap();
    let injector = daemon.namespace.enter(inject).unwrap();
    let silent = || {
        let events = daemon.get("/v1/events?guest=alpha").body;
        events.matches(r#""kind":"console_silent""#).count()
    };
    assert_eq!(silent(), 0);
    injector.inject(&frame).unwrap();
    within_a_minute("its silence is told", || silent() == 1);
    injector.inject(&frame).unwrap();
    let state = daemon.path().join("state");
    let (incidents, outcomes) = recorded(&state, |incidents, _| incidents.len() == 2);
    let told: Vec<_> = incidents
        .iter()
        .map(|incident| (incident.attempt.as_str(), incident.action.as_str()))
        .collect();
    assert_eq!(told, [("dns", "alert"), ("silence", "alert")]);
    assert_eq!(incidents[1].witnesses, [Witness::Console]);
    assert!(outcomes.is_empty(), "{outcomes:?}");
    assert_eq!(daemon.get("/v1/guests/alpha").json()["state"], "running");
}

#[test]
fn what_the_host_has_towards_a_guest_that_is_not_its_own_is_told_and_recorded_once_each() {
    let daemon = start(IDLE);
    let address = run(&daemon, "alpha")["address"]
        .as_str()
        .unwrap()
        .to_owned();
    let told = || {
        let events = daemon.get("/v1/events?guest=alpha").body;
        let is_outside = |line: &&str| line.contains(r#""kind":"outside""#);
        events
            .lines()
            .filter(is_outside)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let socket = daemon.namespace.enter(|| {
        ip("link add other type veth peer name far").unwrap();
        ip("link set other up").unwrap();
        ip(&format!("route add {address}/32 dev other metric 9")).unwrap();
        ip(&format!(
            "neigh add {address} lladdr 52:54:00:00:00:99 dev other"
        ))
        .unwrap();
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((address.as_str(), 9)).unwrap();
        socket
    });
    within_a_minute("all three are told", || told().len() == 3);
    let all = told().concat();
    for part in ["a route to", "a neighbour entry of", "a udp socket to"] {
        assert!(all.contains(part), "{part}: {all}");
    }
    let state = daemon.path().join("state");
    let (incidents, outcomes) = recorded(&state, |incidents, _| incidents.len() == 3);
    for incident in &incidents {
        assert_eq!(incident.witnesses, [Witness::Outside]);
        assert_eq!(incident.action, "alert");
    }
    assert!(outcomes.is_empty(), "{outcomes:?}");
    assert_eq!(daemon.get("/v1/guests/alpha").json()["state"], "running");
    drop(socket);
}

/// A record that ends in an incident of a guest's, as an omertad leaves it that is killed right after.
fn begin(directory: &Path, case: &str, action: &str) {
    let bounds = Bounds::of_bytes(1 << 20);
    let at = "2026-01-01T00:00:00Z";
    let mut book = Book::open(&directory.join("state/incidents"), bounds, "a test", at).unwrap();
    let incident = Incident {
        case: case.into(),
        guest: "alpha".into(),
        interface: "omalpha".into(),
        consumer: String::new(),
        witnesses: vec![Witness::Agent],
        attempt: "agent".into(),
        inferred_from: "its agent: forged".into(),
        action: action.into(),
        epoch: None,
        frame: None,
        before: Vec::new(),
    };
    book.append(at, What::Incident(Box::new(incident))).unwrap();
}

fn again(daemon: Daemon) -> Daemon {
    let (namespace, directory) = daemon.die();
    Daemon::start_in(namespace, directory, &["--metrics", "off"])
}

/// The next omertad of one that died when it had begun to record a case of its guest `alpha`, and the case.
fn next_after(daemon: Daemon, action: &str) -> (Daemon, String) {
    let case = format!("{}-4", daemon.get("/v1/guests/alpha").json()["id"]);
    let (namespace, directory) = daemon.die();
    begin(directory.path(), &case, action);
    let daemon = Daemon::start_in(namespace, directory, &["--metrics", "off"]);
    (daemon, case)
}

#[test]
fn a_guest_that_was_to_end_for_an_incident_when_omertad_died_is_ended_by_the_next_which_records_that()
 {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    let (daemon, case) = next_after(daemon, "terminate");
    let ended = daemon.get("/v1/guests/alpha").json()["ended"].clone();
    assert_eq!(ended["cause"], "abandoned", "{ended}");
    let message = ended["message"].as_str().unwrap();
    assert!(message.contains(&case), "{message}");
    let state = daemon.path().join("state");
    let (_, outcomes) = recorded(&state, |_, outcomes| outcomes.len() == 1);
    let outcome = &outcomes[0];
    assert_eq!(
        (outcome.case.as_str(), outcome.deed),
        (case.as_str(), Deed::Ended)
    );
    assert_eq!(outcome.frame_to_ended_us, None);
    assert!(
        outcome.message.as_ref().unwrap().contains(&case),
        "{outcome:?}"
    );
    // Once.
    let daemon = again(daemon);
    let (_, outcomes) = recorded(&daemon.path().join("state"), |_, _| true);
    assert_eq!(outcomes.len(), 1, "{outcomes:?}");
}

#[test]
fn a_guest_that_was_to_stand_still_for_an_incident_when_omertad_died_does_and_its_case_goes_on() {
    let daemon = start(IDLE);
    let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
    body["on_violation"] = "pause".into();
    assert_eq!(daemon.post("/v1/guests", &body.to_string()).status, 201);
    let (daemon, case) = next_after(daemon, "pause");
    let shown = daemon.get("/v1/guests/alpha").json();
    assert_eq!(shown["state"], "suspended", "{shown}: {}", daemon.log());
    let daemon = again(daemon);
    assert_eq!(daemon.get("/v1/guests/alpha").json()["state"], "suspended");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    let state = daemon.path().join("state");
    let (_, outcomes) = recorded(&state, |_, outcomes| outcomes.len() == 2);
    let deeds: Vec<_> = outcomes.iter().map(|outcome| outcome.deed).collect();
    assert_eq!(deeds, [Deed::Paused, Deed::Ended]);
    assert!(outcomes.iter().all(|outcome| outcome.case == case));
    let paused = &outcomes[0];
    assert!(paused.frame_to_paused_us.is_none() && paused.message.is_some());
}

#[test]
fn cases_of_a_guest_that_is_taken_over_are_counted_on() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    let (daemon, case) = next_after(daemon, "alert");
    let guest = daemon.get("/v1/guests/alpha").json();
    assert_eq!(guest["state"], "running", "{guest}");
    let frame = datagram(&daemon, &guest, [198, 51, 100, 1]);
    let inject = || Injector::into("omalpha").unwrap();
    let injector = daemon.namespace.enter(inject).unwrap();
    injector.inject(&frame).unwrap();
    let state = daemon.path().join("state");
    let (incidents, outcomes) = recorded(&state, |_, outcomes| outcomes.len() == 2);
    assert_eq!(incidents[0].case, case);
    let next = format!("{}-5", guest["id"]);
    assert_eq!(incidents[1].case, next);
    assert!(
        outcomes.iter().all(|outcome| outcome.case == next),
        "{outcomes:?}"
    );
}

#[test]
fn a_case_of_a_guest_that_nothing_is_left_of_is_told_to_its_end_and_its_number_is_not_given_again()
{
    let directory = tempfile::tempdir().unwrap();
    begin(directory.path(), "41-1", "terminate");
    let daemon = Daemon::start_with(directory, &["--metrics", "off"]);
    give_image(&daemon, IDLE);
    let state = daemon.path().join("state");
    let (_, outcomes) = recorded(&state, |_, outcomes| outcomes.len() == 1);
    let outcome = &outcomes[0];
    assert_eq!((outcome.case.as_str(), outcome.deed), ("41-1", Deed::Ended));
    assert!(
        outcome.message.as_ref().unwrap().contains("it is gone"),
        "{outcome:?}"
    );
    assert_eq!(run(&daemon, "alpha")["id"], 42);
}
