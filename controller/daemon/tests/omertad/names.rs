//! Consumers by name: omertad asks, and the allowlist follows what may be followed.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::A;
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use omerta_dataplane::Guard;
use omerta_test_support::{IDLE, Namespace};
use serde_json::{Value, json};

use crate::daemon::{Answer, Daemon, namespace};
use crate::guests::give_image;
use crate::recovery::{show, start_configured};

const KEY: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
const NAME: &str = "vpn.consumer.example:51820";

/// What the name server says of the name.
#[derive(Clone, Debug)]
enum Says {
    Addresses(Vec<Ipv4Addr>),
    NoSuchName,
    Nothing,
}

/// A name server in a namespace, on 127.0.0.1:53, until the namespace is gone.
#[derive(Clone)]
struct NameServer {
    says: Arc<Mutex<Says>>,
    asked: Arc<Mutex<u32>>,
}

impl NameServer {
    fn start(namespace: &Namespace, addresses: &[&str]) -> Self {
        namespace.ip("link set lo up").unwrap();
        let bind = || UdpSocket::bind("127.0.0.1:53").unwrap();
        let socket = namespace.enter(bind).unwrap();
        let server = Self {
            says: Arc::new(Mutex::new(Says::Nothing)),
            asked: Arc::default(),
        };
        server.say(addresses);
        let serving = server.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                let question = Message::from_vec(&bytes[..length]).unwrap();
                *serving.asked.lock().unwrap() += 1;
                if let Some(answer) = serving.answer(&question) {
                    socket.send_to(&answer, from).unwrap();
                }
            }
        });
        server
    }

    fn answer(&self, question: &Message) -> Option<Vec<u8>> {
        let query = question.queries[0].clone();
        let mut answer = Message::response(question.metadata.id, OpCode::Query);
        answer.add_query(query.clone());
        match self.says.lock().unwrap().clone() {
            Says::Nothing => return None,
            Says::NoSuchName => answer.metadata.response_code = ResponseCode::NXDomain,
            Says::Addresses(addresses) => {
                assert_eq!(query.query_type(), RecordType::A);
                let asked = query.name().to_string().to_ascii_lowercase();
                assert_eq!(asked, "vpn.consumer.example.");
                let record =
                    |address| Record::from_rdata(query.name().clone(), 0, RData::A(A(address)));
                answer.add_answers(addresses.into_iter().map(record));
            }
        }
        Some(answer.to_vec().unwrap())
    }

    fn say(&self, addresses: &[&str]) {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        *self.says.lock().unwrap() = Says::Addresses(addresses);
    }

    fn be(&self, says: Says) {
        *self.says.lock().unwrap() = says;
    }

    /// Waits until it was asked once more from now on.
    fn await_question(&self) {
        let before = *self.asked.lock().unwrap();
        within_a_minute("it is asked again", || {
            *self.asked.lock().unwrap() > before + 1
        });
    }
}

fn within_a_minute(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "{what}: not in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An omertad that asks a name server which says so, each second, on a host of 203.0.113.4/24.
fn stage(addresses: &[&str], names: &str) -> (Daemon, NameServer) {
    let stage = (namespace(), tempfile::tempdir().unwrap());
    let server = NameServer::start(&stage.0, addresses);
    for command in [
        "link add uplink type veth peer name beyond",
        "address add 203.0.113.4/24 dev uplink",
        "link set uplink up",
    ] {
        stage.0.ip(command).unwrap();
    }
    let images = stage.1.path().join("state/images");
    let config = format!(
        "image_dir = {images:?}\n[names]\nnameservers = [\"127.0.0.1\"]\nleast_seconds = 1\n{names}\n"
    );
    let daemon = start_configured(stage, &config);
    give_image(&daemon, IDLE);
    (daemon, server)
}

fn run(daemon: &Daemon, endpoint: &str) -> Answer {
    let body = json!({"name": "alpha", "image": "bare", "memory_mib": 64, "consumer": format!("{KEY}@{endpoint}")});
    daemon.post("/v1/guests", &body.to_string())
}

fn allowed(daemon: &Daemon) -> (Vec<String>, u64) {
    let status = || Guard::open("omalpha").unwrap().status().unwrap();
    let status = daemon.namespace.enter(status).unwrap();
    (status.allow, status.epoch)
}

fn events(daemon: &Daemon, kind: &str) -> Vec<Value> {
    let events = daemon.get("/v1/events?guest=alpha").body;
    let events = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.filter(|event| event["kind"] == kind).collect()
}

#[test]
fn allowlist_follows_a_name_in_one_commit_and_stays_where_one_of_several_addresses_is_the_same() {
    let (daemon, server) = stage(&["192.0.2.10"], "");
    let answer = run(&daemon, NAME);
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.json()["consumer"], format!("{KEY}@192.0.2.10:51820"));
    assert_eq!(answer.json()["consumer_name"], NAME);
    let (allow, epoch) = allowed(&daemon);
    assert_eq!(allow, ["udp:192.0.2.10:51820"]);

    server.say(&["198.51.100.7"]);
    within_a_minute("the allowlist follows", || {
        allowed(&daemon).0 == ["udp:198.51.100.7:51820"]
    });
    assert_eq!(allowed(&daemon).1, epoch + 1, "more than one commit");
    within_a_minute("the move is told", || {
        events(&daemon, "consumer_moved").len() == 1
    });
    let moved = &events(&daemon, "consumer_moved")[0];
    assert_eq!(
        (&moved["from"], &moved["to"]),
        (&json!("192.0.2.10:51820"), &json!("198.51.100.7:51820"))
    );

    server.say(&["192.0.2.77", "198.51.100.7", "127.0.0.1"]);
    server.await_question();
    assert_eq!(
        allowed(&daemon),
        (vec!["udp:198.51.100.7:51820".to_owned()], epoch + 1)
    );
    let peers = daemon.get("/v1/peers").json()["peers"].clone();
    assert_eq!(peers[0]["name"], NAME);
    assert_eq!(
        show(&daemon, "alpha")["state"],
        "running",
        "{}",
        daemon.log()
    );
}

#[test]
fn answers_that_lead_to_the_provider_or_are_none_keep_the_old_endpoint_and_are_told_once() {
    let (daemon, server) = stage(&["192.0.2.10"], "forbid = [\"198.18.0.0/15\"]");
    assert_eq!(run(&daemon, NAME).status, 201);
    let before = allowed(&daemon);
    let mut told = 0;
    for (address, why) in [
        ("127.0.0.1", "no address of one host"),
        ("169.254.169.254", "no address of one host"),
        ("224.0.0.1", "no address of one host"),
        ("0.0.0.0", "no address of one host"),
        ("100.100.100.200", "clouds"),
        ("10.77.0.1", "guests' own network"),
        ("203.0.113.4", "this host's own"),
        ("203.0.113.9", "203.0.113.0/24"),
        ("198.18.3.4", "198.18.0.0/15"),
    ] {
        server.say(&[address]);
        told += 1;
        within_a_minute(address, || events(&daemon, "consumer_stays").len() == told);
        let stays = events(&daemon, "consumer_stays").pop().unwrap();
        let message = stays["message"].as_str().unwrap();
        assert!(
            message.contains(address) && message.contains(why),
            "{address}: {message}"
        );
        assert_eq!(
            (&stays["name"], &stays["endpoint"]),
            (&json!(NAME), &json!("192.0.2.10:51820"))
        );
    }
    for says in [Says::NoSuchName, Says::Nothing, Says::Addresses(Vec::new())] {
        server.be(says.clone());
        told += 1;
        within_a_minute("what is no answer is told", || {
            events(&daemon, "consumer_stays").len() == told
        });
        server.await_question();
        assert_eq!(
            events(&daemon, "consumer_stays").len(),
            told,
            "told twice: {says:?}"
        );
        server.say(&["192.0.2.10"]);
        server.await_question();
    }
    assert_eq!(allowed(&daemon), before);
    assert_eq!(
        show(&daemon, "alpha")["state"],
        "running",
        "{}",
        daemon.log()
    );
    // It is followed again as soon as it leads where it may.
    server.say(&["127.0.0.1", "198.51.100.7"]);
    within_a_minute("the allowlist follows", || {
        allowed(&daemon).0 == ["udp:198.51.100.7:51820"]
    });
}

#[test]
fn guest_is_not_run_and_not_moved_where_its_consumers_name_must_not_lead() {
    let (daemon, server) = stage(&["203.0.113.9"], "allow = [\"203.0.113.128/25\"]");
    let refused = run(&daemon, NAME).refusal(400, "usage");
    assert!(
        refused.contains("203.0.113.0/24") && refused.contains("allow"),
        "{refused}"
    );
    server.be(Says::NoSuchName);
    run(&daemon, NAME).refusal(400, "usage");
    server.say(&["203.0.113.130"]);
    assert_eq!(run(&daemon, NAME).status, 201);
    let before = allowed(&daemon);
    server.say(&["127.0.0.1"]);
    let body = json!({ "endpoint": "vpn.consumer.example:4500" }).to_string();
    let put = daemon.request("PUT", "/v1/guests/alpha/peer", &body);
    put.refusal(400, "usage");
    assert_eq!(allowed(&daemon), before);
    assert_eq!(show(&daemon, "alpha")["consumer_name"], NAME);
}

#[test]
fn address_ends_what_a_name_began_and_a_name_begins_what_an_address_ended() {
    let (daemon, server) = stage(&["192.0.2.10"], "");
    assert_eq!(run(&daemon, NAME).status, 201);
    let put = |endpoint: &str| {
        let body = json!({ "endpoint": endpoint }).to_string();
        daemon.request("PUT", "/v1/guests/alpha/peer", &body)
    };
    let moved = put("198.51.100.7:4500");
    assert_eq!(
        (moved.status, &moved.json()["consumer_name"]),
        (200, &Value::Null),
        "{moved:?}"
    );
    server.say(&["192.0.2.99"]);
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(allowed(&daemon).0, ["udp:198.51.100.7:4500"]);
    let moved = put(NAME);
    assert_eq!(
        (moved.status, &moved.json()["consumer_name"]),
        (200, &json!(NAME)),
        "{moved:?}"
    );
    assert_eq!(allowed(&daemon).0, ["udp:192.0.2.99:51820"]);
    server.say(&["192.0.2.100"]);
    within_a_minute("the allowlist follows", || {
        allowed(&daemon).0 == ["udp:192.0.2.100:51820"]
    });
}

#[test]
fn next_omertad_follows_the_name() {
    let (daemon, server) = stage(&["192.0.2.10"], "");
    assert_eq!(run(&daemon, NAME).status, 201);
    let (namespace, directory) = daemon.die();
    server.say(&["198.51.100.7"]);
    let config = std::fs::read_to_string(directory.path().join("omertad.toml")).unwrap();
    let daemon = start_configured((namespace, directory), &config);
    assert_eq!(
        show(&daemon, "alpha")["consumer_name"],
        NAME,
        "{}",
        daemon.log()
    );
    within_a_minute("the allowlist follows", || {
        allowed(&daemon).0 == ["udp:198.51.100.7:51820"]
    });
    assert_eq!(
        show(&daemon, "alpha")["state"],
        "running",
        "{}",
        daemon.log()
    );
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}
