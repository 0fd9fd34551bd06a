//! A guest that means no harm, and its consumer: downloads, reconnects, moves and reboots, under the strictest policy, with
//! all witnesses looking. Nobody may raise an alarm. A minute of it, or `OMERTA_HONEST_SECONDS`.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use omerta_incidents::{What, read};
use omerta_test_support::{Namespace, Process, Veth};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::red_team::guest::{self, Console, Image};

/// What the server sends to each who connects.
const DOWNLOAD: usize = 4 << 20;
/// What nobody may tell of such a guest.
const ALARMS: [&str; 9] = [
    "rogue",
    "console",
    "console_silent",
    "outside",
    "tunnel_silent",
    "paused",
    "panicked",
    "lost",
    "ended",
];

/// The consumer, one hop from the provider.
struct Consumer {
    namespace: Namespace,
    interface: String,
    key: String,
    _wireguard: Process,
}

impl Consumer {
    fn beside(daemon: &Daemon) -> Self {
        let namespace = Namespace::new("honest").unwrap();
        let provider = &daemon.namespace;
        for one in [provider, &namespace] {
            one.disable_ipv6().unwrap();
        }
        provider.enable_forwarding().unwrap();
        Veth::across((provider, "uplink"), (&namespace, "eth0")).unwrap();
        provider.ip("addr add 192.0.2.1/24 dev uplink").unwrap();
        provider.ip("link set uplink up").unwrap();
        namespace.ip("link set lo up").unwrap();
        namespace.ip("addr add 192.0.2.10/24 dev eth0").unwrap();
        namespace.ip("link set eth0 up").unwrap();
        namespace.ip("route add default via 192.0.2.1").unwrap();
        // Control sockets of wireguard-go are shared by all namespaces.
        let interface = format!("omh{}", std::process::id());
        let mut command = namespace.command("wireguard-go");
        command
            .args(["-f", &interface])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let wireguard = Process::spawn(command).unwrap();
        let socket = format!("/var/run/wireguard/{interface}.sock");
        let end = Instant::now() + Duration::from_secs(30);
        while !std::path::Path::new(&socket).exists() {
            assert!(Instant::now() < end, "no {socket}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let private = said(namespace.command("wg").arg("genkey"), "");
        let consumer = Self {
            key: said(namespace.command("wg").arg("pubkey"), &private),
            namespace,
            interface,
            _wireguard: wireguard,
        };
        consumer.set(
            &["private-key", "/dev/stdin", "listen-port", "51820"],
            &private,
        );
        let namespace = &consumer.namespace;
        namespace
            .ip(&format!("addr add 10.66.0.1/24 dev {}", consumer.interface))
            .unwrap();
        namespace
            .ip(&format!("link set {} mtu 1420 up", consumer.interface))
            .unwrap();
        let listener = namespace.enter(|| TcpListener::bind("10.66.0.1:80").unwrap());
        serve(listener.unwrap());
        consumer
    }

    fn set(&self, words: &[&str], input: &str) {
        let mut command = self.namespace.command("wg");
        said(command.arg("set").arg(&self.interface).args(words), input);
    }

    /// Lets the guest of this key in, and begins a session anew.
    fn welcome(&self, key: &str) {
        let peers = said(
            self.namespace
                .command("wg")
                .args(["show", &self.interface, "peers"]),
            "",
        );
        for peer in peers.lines() {
            self.set(&["peer", peer, "remove"], "");
        }
        self.set(&["peer", key, "allowed-ips", "10.66.0.2/32"], "");
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(format!("/var/run/wireguard/{}.sock", self.interface));
    }
}

/// What a command says, which must succeed.
fn said(command: &mut Command, input: &str) -> String {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Sends the download to each who connects, for as long as this process lives.
fn serve(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut stream = stream;
                // One that a reboot cut off is never missed.
                let _ = stream.set_write_timeout(Some(Duration::from_secs(60)));
                let _ = stream.write_all(&vec![0x6f; DOWNLOAD]);
            });
        }
    });
}

fn shown(daemon: &Daemon) -> Value {
    daemon.get("/v1/guests/alpha").json()
}

/// The key that the guest reports, once it is another one than `before`.
fn key(daemon: &Daemon, before: &str) -> String {
    let end = Instant::now() + Duration::from_secs(240);
    loop {
        let guest = shown(daemon);
        match guest["public_key"].as_str() {
            Some(key) if key != before => return key.to_owned(),
            _ => assert!(Instant::now() < end, "no key: {guest}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn honest_traffic_raises_no_alarm() {
    let Some(daemon) = guest::start(60) else {
        return;
    };
    // Its images' word that their firewall is heard, which it is for what it blocks: nothing here.
    let promise = daemon.path().join("state/images/honest/firewall-log");
    std::fs::write(promise, "").unwrap();
    let seconds = std::env::var("OMERTA_HONEST_SECONDS").map_or(60, |text| text.parse().unwrap());
    let consumer = Consumer::beside(&daemon);
    let more = json!({
        "consumer": format!("{}@192.0.2.10:51820", consumer.key),
        "on_violation": "terminate",
        "agent": true,
    });
    let guest = guest::run(&daemon, "alpha", Image::Honest, more);
    let mut console = Console::of(&guest);
    let mut known = key(&daemon, "");
    consumer.welcome(&known);
    console.ask("download");

    let end = Instant::now() + Duration::from_secs(seconds);
    let mut port = 51820;
    let (mut downloads, mut reconnects, mut moves, mut reboots) = (1, 0, 0, 0);
    // Each at least once, however slow the machine.
    while Instant::now() < end || reboots == 0 {
        consumer.welcome(&known);
        reconnects += 1;
        console.ask("download");

        port = if port == 51820 { 4500 } else { 51820 };
        consumer.set(&["listen-port", &port.to_string()], "");
        let to = json!({ "endpoint": format!("192.0.2.10:{port}") }).to_string();
        let moved = daemon.request("PUT", "/v1/guests/alpha/peer", &to);
        assert_eq!(moved.status, 200, "{moved:?}");
        moves += 1;
        console.ask("download");
        downloads += 2;

        // A reboot takes an emulated guest longer than all of that.
        if downloads % 20 == 3 {
            assert_eq!(daemon.post("/v1/guests/alpha/reset", "").status, 200);
            reboots += 1;
            known = key(&daemon, &known);
            consumer.welcome(&known);
            console.begins_anew();
            console.ask("download");
            downloads += 1;
        }
    }
    println!(
        "measured: {downloads} downloads of {} MiB, {reconnects} reconnects, {moves} moves, {reboots} reboots",
        DOWNLOAD >> 20
    );
    let events = daemon.get("/v1/events?guest=alpha").body;
    for line in events.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let kind = event["kind"].as_str().unwrap();
        assert!(!ALARMS.contains(&kind), "{line}");
        let report = event["report"].as_str().unwrap_or("sound");
        assert!(matches!(report, "arrived" | "sound"), "{line}");
    }
    let guest = shown(&daemon);
    assert_eq!(guest["state"], "running", "{guest}");
    assert_eq!(guest["rogue_frames"], 0, "{guest}");
    let mut recorded = Vec::new();
    read(&daemon.path().join("state/incidents"), |entry| {
        if let What::Incident(incident) = &entry.what {
            recorded.push(incident.clone());
        }
    })
    .unwrap();
    assert!(recorded.is_empty(), "{recorded:?}");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}
