//! Guests whose tunnels omertad keeps, and their consumers: WireGuard in namespaces of their own.

mod hostile;
mod secrets;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::num::NonZero;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use omerta_test_support::{IDLE, Namespace, Veth};
use omerta_tunnel::{AllowedIp, Device, Peer, Peers, PublicKey, Secret, Setup, Userspace};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::{Answer, Daemon};
use crate::guests::give_image;

const CONSUMER: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 2);

/// One consumer, at 198.51.100.N, where omertad is at 198.51.100.254.
struct Consumer {
    device: Userspace,
    peers: Peers,
    namespace: Namespace,
    number: u8,
    key: Secret,
    /// What it has for its guest, and the guest is to have.
    preshared_key: Option<Secret>,
    _directory: TempDir,
}

impl Consumer {
    fn of(daemon: &Daemon, number: u8) -> Self {
        let namespace = Namespace::new("omcons").unwrap();
        let cable = format!("up{number}");
        Veth::across((&daemon.namespace, &cable), (&namespace, "far")).unwrap();
        daemon
            .namespace
            .ip(&format!(
                "address add 198.51.100.254 peer 198.51.100.{number}/32 dev {cable}"
            ))
            .unwrap();
        daemon
            .namespace
            .ip(&format!("link set {cable} up"))
            .unwrap();
        namespace
            .ip(&format!(
                "address add 198.51.100.{number} peer 198.51.100.254/32 dev far"
            ))
            .unwrap();
        namespace.ip("link set far up").unwrap();
        // To guests whose tunnels are their own.
        let guests = "route add 10.77.0.0/16 via 198.51.100.254 dev far onlink";
        namespace.ip(guests).unwrap();
        daemon.namespace.enable_forwarding().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let key = Secret::generate().unwrap();
        let socket = directory.path().join("wg");
        // Whom nobody else here runs as.
        let user = 64_000 + u32::from(number);
        let mut device = namespace
            .enter(|| Userspace::create("omcons0", &socket, user, false))
            .unwrap()
            .unwrap();
        let setup = Setup {
            private_key: key.clone(),
            listen_port: NonZero::new(51820),
        };
        device.set_up(&setup).unwrap();
        namespace
            .ip(&format!("address add {CONSUMER}/24 dev omcons0"))
            .unwrap();
        namespace.ip("link set omcons0 mtu 1420 up").unwrap();
        Self {
            device,
            peers: Peers::new(),
            namespace,
            number,
            key,
            preshared_key: None,
            _directory: directory,
        }
    }

    fn request(&self, name: &str, image: &str) -> Value {
        let preshared_key = self
            .preshared_key
            .as_ref()
            .map(|key| key.base64().to_string());
        json!({
            "preshared_key": preshared_key,
            "name": name,
            "image": image,
            "memory_mib": if image == "bare" { 64 } else { 128 },
            "consumer": format!("{}@198.51.100.{}:51820", self.key.public_key(), self.number),
            "tunnel": "host",
            "reach": ["tcp:80"],
        })
    }

    fn welcome(&mut self, public_key: PublicKey) {
        let mut wanted = Peers::new();
        let peer = Peer {
            public_key,
            preshared_key: self.preshared_key.clone(),
            endpoint: None,
            allowed_ips: [AllowedIp::host(IpAddr::V4(GUEST))].into(),
            keepalive: None,
        };
        wanted.add(peer).unwrap();
        self.device.sync(&self.peers, &wanted).unwrap();
        self.peers = wanted;
    }

    /// Asks for a guest, and lets it in as soon as its key is known.
    fn run(&mut self, daemon: &Daemon, name: &str, image: &str) -> Answer {
        let body = self.request(name, image).to_string();
        std::thread::scope(|threads| {
            let asked = threads.spawn(|| daemon.post("/v1/guests", &body));
            self.welcome(key_of(daemon, name));
            asked.join().unwrap()
        })
    }
}

fn key_of(daemon: &Daemon, name: &str) -> PublicKey {
    let mut key = None;
    within_a_minute("a key", || {
        let guest = daemon.get(&format!("/v1/guests/{name}"));
        key = (guest.status == 200)
            .then(|| guest.json()["public_key"].as_str().map(str::to_owned))
            .flatten();
        key.is_some()
    });
    key.unwrap().parse().unwrap()
}

fn within_a_minute(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "{what}: not in a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is said of a guest's tunnel, by whom it is expected to be, once something is.
fn said_of(daemon: &Daemon, name: &str, witness: &str) -> Value {
    let mut said = Value::Null;
    within_a_minute("something of the tunnel", || {
        let peers = daemon.get("/v1/peers").json();
        let peers = peers["peers"].as_array().unwrap();
        let peer = peers.iter().find(|peer| peer["guest"] == name).unwrap();
        said = peer["tunnel"].clone();
        !said.is_null()
    });
    assert_eq!(said["witness"], witness, "{said}");
    said
}

fn start(config: &str) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("omertad.toml");
    std::fs::write(&file, config).unwrap();
    let file = file.to_str().unwrap().to_owned();
    let daemon = Daemon::start_with(directory, &["--metrics", "off", "--config", &file]);
    give_image(&daemon, IDLE);
    daemon
}

/// The processes that drive tunnels of the omertad of this directory, each with its command line.
fn drivers(directory: &Path) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").unwrap() {
        let path = process.unwrap().path();
        let command = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let mounts = std::fs::read_to_string(path.join("mountinfo")).unwrap_or_default();
        // A driver's socket is in a directory of the run directory's, which is mounted where it looks.
        let ours = directory
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        if command.starts_with("wireguard-go")
            && mounts.contains(&ours)
            && mounts.contains(".tunnel")
        {
            let pid = path.file_name().unwrap().to_str().unwrap();
            found.push((pid.parse().unwrap(), command));
        }
    }
    found
}

/// What is there that a host's tunnel needs: processes and sockets by what they are called by.
fn remains(directory: &Path) -> Vec<String> {
    let drivers = drivers(directory).into_iter();
    let mut found: Vec<_> = drivers.map(|(_, command)| command).collect();
    let run = directory.join("run");
    for entry in std::fs::read_dir(run).into_iter().flatten() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        if name.ends_with(".tunnel") {
            found.push(name);
        }
    }
    found
}

fn assert_nothing_remains(daemon: &Daemon) {
    let path = daemon.path().to_owned();
    within_a_minute("the end of all", || remains(&path).is_empty());
    for interface in ["omalpha", "ombeta"] {
        assert!(
            daemon
                .namespace
                .ip(&format!("link show {interface}"))
                .is_err(),
            "{interface}"
        );
    }
}

fn interfaces(daemon: &Daemon) -> Vec<String> {
    let list = || nix::net::if_::if_nameindex().unwrap();
    let names = || {
        let all = list();
        let names = all.iter().map(|interface| interface.name());
        names
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    };
    daemon.namespace.enter(names).unwrap()
}

#[test]
fn a_guest_whose_consumer_does_not_shake_hands_in_time_is_ended_and_has_not_run() {
    let daemon = start("[tunnel]\nanswer_seconds = 3\n");
    let consumer = Consumer::of(&daemon, 1);
    let body = consumer.request("alpha", "bare").to_string();
    let message = daemon.post("/v1/guests", &body).refusal(409, "refused");
    assert!(message.contains("has not shaken hands"), "{message}");
    let events = daemon.get("/v1/events?guest=alpha").body;
    assert!(!events.contains("\"started\""), "{events}");
    assert_eq!(daemon.get("/v1/guests/alpha").json()["state"], "ended");
    assert_nothing_remains(&daemon);
}

#[test]
fn a_guest_begins_once_its_consumer_has_shaken_hands_and_leaves_nothing() {
    let daemon = start("");
    let mut consumer = Consumer::of(&daemon, 1);
    let before = interfaces(&daemon);
    let answer = consumer.run(&daemon, "alpha", "bare");
    assert_eq!(answer.status, 201, "{answer:?}\n{}", daemon.log());
    let guest = answer.json();
    assert_eq!(guest["state"], "running");
    assert_eq!(guest["tunnel"], "host");
    // Told right after that it runs.
    within_a_minute("the handshake is told", || {
        daemon.get("/v1/guests/alpha").json()["handshake"] == true
    });
    assert_eq!(guest["reach"], json!(["tcp:10.66.0.1:80"]));
    assert_eq!(guest["address"], GUEST.to_string());
    // Tap and tunnel are elsewhere.
    assert_eq!(interfaces(&daemon), before);
    assert!(!remains(daemon.path()).is_empty(), "no driver");
    let peers = daemon.get("/v1/peers").json();
    assert_eq!(
        peers["peers"][0]["received_bytes"], 0,
        "its guard is read: {peers}"
    );
    assert_eq!(peers["peers"][0]["guest_public_key"], guest["public_key"]);
    let tunnel = said_of(&daemon, "alpha", "host");
    assert_eq!(tunnel["endpoint"], "198.51.100.1:51820", "{tunnel}");
    assert_eq!(tunnel["keepalive_seconds"], 25, "{tunnel}");
    // By its clock or ours it was as long ago as it takes to see that.
    assert!(
        tunnel["handshake_seconds"].as_u64().unwrap() < 60,
        "{tunnel}"
    );
    assert!(tunnel["received_bytes"].as_u64().unwrap() > 0, "{tunnel}");
    let told = daemon.get("/v1/events?guest=alpha").body;
    let told = told
        .lines()
        .filter(|line| line.contains("\"kind\":\"tunnel\""));
    let told: Vec<_> = told.collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].contains("\"tunnel\":\"fresh\",\"witness\":\"host\""),
        "{told:?}"
    );
    // Its tunnel outlives what boots in it.
    assert_eq!(daemon.post("/v1/guests/alpha/reset", "").status, 200);
    within_a_minute("the reset", || {
        daemon
            .get("/v1/events?guest=alpha")
            .body
            .contains("\"reset\"")
    });
    assert_eq!(daemon.get("/v1/guests/alpha").json()["handshake"], true);
    let moved = daemon.request(
        "PUT",
        "/v1/guests/alpha/peer",
        "{\"endpoint\":\"198.51.100.9:1\"}",
    );
    assert_ne!(moved.status, 200, "{moved:?}");
    let ended = daemon.post("/v1/guests/alpha/kill", "").json();
    assert_eq!(ended["ended"]["leftovers"], Value::Null, "{ended}");
    assert_nothing_remains(&daemon);
    // And again, with another key.
    let again = consumer.run(&daemon, "beta", "bare").json();
    assert_eq!(again["state"], "running", "{again}");
    assert_ne!(again["public_key"], guest["public_key"]);
    assert_eq!(daemon.post("/v1/guests/beta/kill", "").status, 200);
}

#[test]
fn who_waits_for_a_handshake_can_be_ended() {
    let daemon = start("");
    let consumer = Consumer::of(&daemon, 1);
    let body = consumer.request("alpha", "bare").to_string();
    std::thread::scope(|threads| {
        let asked = threads.spawn(|| daemon.post("/v1/guests", &body));
        key_of(&daemon, "alpha");
        within_a_minute("it waits", || {
            daemon.get("/v1/guests/alpha").json()["state"] == "guarded"
        });
        let ended = daemon.post("/v1/guests/alpha/kill", "").json();
        assert_eq!(ended["state"], "ended", "{ended}");
        assert_ne!(asked.join().unwrap().status, 201);
    });
    assert_nothing_remains(&daemon);
}

#[test]
fn a_guest_ends_with_the_omertad_that_kept_its_tunnel_and_the_next_one_says_so() {
    let daemon = start("");
    let mut consumer = Consumer::of(&daemon, 1);
    let guest = consumer.run(&daemon, "alpha", "bare").json();
    let pid = guest["pid"].as_u64().unwrap();
    let (namespace, directory) = daemon.die();
    within_a_minute("the end of its QEMU", || {
        !PathBuf::from(format!("/proc/{pid}/exe")).exists()
    });
    let daemon = Daemon::start_in(namespace, directory, &["--metrics", "off"]);
    let found = daemon.get("/v1/guests/alpha").json();
    assert_eq!(found["ended"]["cause"], "abandoned", "{found}");
    assert_eq!(found["ended"]["leftovers"], Value::Null, "{found}");
    assert_nothing_remains(&daemon);
}

#[test]
fn what_makes_no_tunnel_of_the_hosts_is_refused_by_name() {
    let daemon = start("");
    let consumer = Consumer::of(&daemon, 1);
    for (change, names) in [
        (json!({ "reach": [] }), "things to reach"),
        (json!({ "reach": ["tcp:0"] }), "tcp:0"),
        (json!({ "reach": ["tcp:10.0.0.1:80"] }), "tcp:10.0.0.1:80"),
        (json!({ "reach": ["tcp:80", "tcp:80"] }), "twice"),
        (json!({ "tunnel": "both" }), "both"),
        (json!({ "tunnel": "guest" }), "the tunnel is the guest's"),
        (json!({ "agent": true }), "agent"),
    ] {
        let mut request = consumer.request("alpha", "bare");
        for (key, value) in change.as_object().unwrap() {
            request[key] = value.clone();
        }
        let answer = daemon.post("/v1/guests", &request.to_string());
        let message = answer.refusal(400, "usage");
        assert!(message.contains(names), "{message}");
    }
    assert_eq!(daemon.get("/v1/guests").json()["guests"], json!([]));
}

/// The image that `make image` builds, where it is.
fn built_image() -> Option<PathBuf> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/image");
    let directory = std::env::var_os("OMERTA_IMAGE_DIR").map_or_else(built, PathBuf::from);
    let found = directory.join("vmlinuz").exists();
    if !found {
        println!(
            "skipped: no image in {}, see `make image`",
            directory.display()
        );
    }
    found.then_some(directory)
}

/// Has the guest ask its consumer for a page, by its console, until it has; what the guest prints then.
fn fetch(daemon: &Daemon, consumer: &Consumer, name: &str, page: &str) -> IpAddr {
    let listener = consumer
        .namespace
        .enter(|| TcpListener::bind((CONSUMER, 80)).unwrap())
        .unwrap();
    listener.set_nonblocking(true).unwrap();
    let socket = daemon.get(&format!("/v1/guests/{name}")).json()["console"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut console = UnixStream::connect(socket).unwrap();
    console.set_nonblocking(true).unwrap();
    let mut asked = None;
    let end = Instant::now() + Duration::from_secs(180);
    let mut from = None;
    while !log_of(daemon, name).contains(page) {
        assert!(
            Instant::now() < end,
            "{name} does not ask: {}",
            log_of(daemon, name)
        );
        // A console that nobody reads stands still.
        let _ = console.read(&mut [0; 4096]);
        // While it boots nobody listens.
        if log_of(daemon, name).contains("# ")
            && asked.is_none_or(|asked: Instant| asked.elapsed() > Duration::from_secs(8))
        {
            console
                .write_all(b"\ntimeout 7 wget -q -O - http://10.66.0.1/\n")
                .unwrap();
            asked = Some(Instant::now());
        }
        match listener.accept() {
            Ok((mut stream, address)) => {
                stream.set_nonblocking(false).unwrap();
                stream
                    .set_read_timeout(Some(Duration::from_secs(5)))
                    .unwrap();
                let mut request = Vec::new();
                let mut some = [0; 512];
                // All of it: what is unread at the end cuts the answer off.
                while !request.ends_with(b"\r\n\r\n")
                    && let Ok(read @ 1..) = stream.read(&mut some)
                {
                    request.extend_from_slice(&some[..read]);
                }
                let length = page.len();
                let answer = format!("HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n{page}");
                // One that has gone asks again.
                let _ = stream.write_all(answer.as_bytes());
                from = Some(address.ip());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    from.unwrap()
}

fn log_of(daemon: &Daemon, name: &str) -> String {
    daemon.get(&format!("/v1/guests/{name}/log")).body
}

#[test]
fn guests_of_both_tunnels_fetch_their_own_consumers_page_at_once_and_reach_nothing_else() {
    let Some(image) = built_image() else {
        return;
    };
    let daemon = start("");
    let own = daemon.path().join("state/images/debian");
    std::fs::create_dir_all(&own).unwrap();
    for file in ["vmlinuz", "initrd.img"] {
        std::fs::copy(image.join(file), own.join(file)).unwrap();
    }
    let (mut first, mut second) = (Consumer::of(&daemon, 1), Consumer::of(&daemon, 2));
    second.preshared_key = Some(Secret::generate().unwrap());
    let by_host = {
        let mut request = first.request("alpha", "debian");
        request["console_shell"] = true.into();
        request["on_violation"] = "terminate".into();
        request
    };
    let by_guest = {
        let mut request = second.request("beta", "debian");
        request.as_object_mut().unwrap().remove("tunnel");
        request.as_object_mut().unwrap().remove("reach");
        request["keepalive_seconds"] = 7.into();
        request["console_shell"] = true.into();
        request
    };
    std::thread::scope(|threads| {
        let both = [&by_host, &by_guest].map(|request| {
            let daemon = &daemon;
            threads.spawn(move || daemon.post("/v1/guests", &request.to_string()))
        });
        first.welcome(key_of(&daemon, "alpha"));
        for asked in both {
            let answer = asked.join().unwrap();
            assert_eq!(answer.status, 201, "{answer:?}");
        }
        second.welcome(key_of(&daemon, "beta"));
    });
    std::thread::scope(|threads| {
        let fetched = [
            (&first, "alpha", "the page of the first"),
            (&second, "beta", "the page of the second"),
        ]
        .map(|(consumer, name, page)| {
            let daemon = &daemon;
            threads.spawn(move || fetch(daemon, consumer, name, page))
        });
        for from in fetched {
            assert_eq!(from.join().unwrap(), IpAddr::V4(GUEST));
        }
    });
    for (name, other) in [("alpha", "of the second"), ("beta", "of the first")] {
        assert!(!log_of(&daemon, name).contains(other), "{name}");
    }
    // By the device's word, and by the guest's.
    for (name, witness, number, keepalive) in [("alpha", "host", 1, 25), ("beta", "guest", 2, 7)] {
        let tunnel = said_of(&daemon, name, witness);
        let endpoint = format!("198.51.100.{number}:51820");
        assert_eq!(tunnel["endpoint"], endpoint, "{tunnel}");
        assert_eq!(tunnel["keepalive_seconds"], keepalive, "{tunnel}");
        assert!(
            tunnel["handshake_seconds"].as_u64().unwrap() < 180,
            "{tunnel}"
        );
        assert!(tunnel["received_bytes"].as_u64().unwrap() > 0, "{tunnel}");
    }
    // What is in the tunnel and not on the list: the guard sees it at the tap.
    let guest = daemon.get("/v1/guests/alpha").json();
    assert_eq!(
        (&guest["state"], &guest["rogue_frames"]),
        (&json!("running"), &json!(0))
    );
    let mut console = UnixStream::connect(guest["console"].as_str().unwrap()).unwrap();
    console
        .write_all(b"\ntimeout 5 wget -q -O - http://10.66.0.1:81/\n")
        .unwrap();
    within_a_minute("the end of who strays", || {
        daemon.get("/v1/guests/alpha").json()["state"] == "ended"
    });
    let ended = daemon.get("/v1/guests/alpha").json();
    assert_eq!(ended["ended"]["cause"], "rogue", "{ended}");
    assert_eq!(daemon.get("/v1/guests/beta").json()["state"], "running");
    assert_eq!(daemon.post("/v1/guests/beta/kill", "").status, 200);
    assert_nothing_remains(&daemon);
}
