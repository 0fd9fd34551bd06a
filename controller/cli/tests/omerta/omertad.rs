//! Stands in for omertad: a unix socket that answers requests as the test says.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use crate::run::{Ran, omerta};

/// One request, as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub body: String,
}

/// Listens until the test's process ends.
pub struct Omertad {
    dir: tempfile::TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Omertad {
    /// Answers every request with the status and body that `answer` gives.
    pub fn answering(answer: impl Fn(&Asked) -> (u16, String) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let listener = UnixListener::bind(dir.path().join("omertad.sock")).unwrap();
        let seen = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let request = read_request(&stream);
                let (status, body) = answer(&request);
                seen.lock().unwrap().push(request);
                let head = format!(
                    "HTTP/1.1 {status} Status\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                // A client that was told enough may have hung up.
                let _ = stream.write_all(format!("{head}{body}").as_bytes());
            }
        });
        Self { dir, asked }
    }

    /// Answers every request with one document.
    pub fn always(status: u16, body: Value) -> Self {
        Self::answering(move |_| (status, body.to_string()))
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("omertad.sock")
    }

    /// Runs `omerta` against this socket.
    pub fn omerta(&self, arguments: &str) -> Ran {
        omerta(&format!("--socket {} {arguments}", self.socket().display()))
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

fn read_request(stream: &UnixStream) -> Asked {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        if header.trim().is_empty() {
            break;
        }
        let (name, value) = header.split_once(':').unwrap();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    Asked {
        method,
        path,
        body: String::from_utf8(body).unwrap(),
    }
}

/// A consumer as it stands on the command line and on the wire.
pub const CONSUMER: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=@192.0.2.10:51820";

/// A running guest that has shaken hands, as omertad shows it.
pub fn guest(name: &str, state: &str) -> Value {
    json!({
        "id": 7, "name": name, "state": state, "interface": format!("om{name}"),
        "address": "10.77.0.2", "gateway": "10.77.0.1", "mac": "52:54:00:12:34:56",
        "public_key": "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=", "handshake": true,
        "consumer": CONSUMER, "on_violation": "terminate", "mode": "filtered",
        "limits": {
            "egress": {"packets_per_second": null, "bits_per_second": 100_000_000},
            "ingress": {"packets_per_second": 20_000, "bits_per_second": null}
        },
        "image": "demo", "cpus": 1, "memory_mib": 256, "pid": 4242,
        "console": "/run/omerta/guests/alpha/console.sock",
        "log": "/run/omerta/guests/alpha/console.log",
        "rogue_frames": 0, "since": "2026-11-24T13:37:00.000001Z", "ended": null,
        "field_of_a_newer_omertad": 1
    })
}

/// A guest that was ended for what it sent.
pub fn ended_guest(name: &str) -> Value {
    let mut guest = guest(name, "ended");
    for (field, value) in [
        ("pid", Value::Null),
        ("console", Value::Null),
        ("log", Value::Null),
        ("rogue_frames", json!(3)),
        (
            "ended",
            json!({
                "cause": "rogue", "reason": "endpoint",
                "frame": "udp 10.77.0.2:1234 → 198.51.100.1:53",
                "frame_to_paused_us": 1234, "frame_to_ended_us": 56_789,
                "frame_to_tap_removed_us": 1_234_567
            }),
        ),
    ] {
        guest[field] = value;
    }
    guest
}
