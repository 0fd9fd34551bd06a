//! The guest's line protocol on the virtio-serial port `org.omerta.control`.
//!
//! The guest is hostile: whatever it writes may be garbage, endless, or a flood. The parser keeps
//! at most one line of [`ControlPort::MAX_LINE_BYTES`], allocates nothing per line, and turns
//! bytes into [`Report`]s only when they say something new.

use std::net::SocketAddr;
use std::num::NonZero;

use crate::WgPublicKey;

/// What a guest has said of itself. Nothing that the host decides may rest on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The guest says that this is its WireGuard public key.
    PublicKey(WgPublicKey),
    /// The guest says that it has seen a handshake with its consumer.
    Handshake,
}

/// What a guest has said of its tunnel, by its own WireGuard's account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestTunnel {
    /// Seconds since the latest handshake, if there was one.
    pub handshake_age: Option<u32>,
    /// Bytes sent to the consumer.
    pub sent_bytes: u64,
    /// Bytes received from the consumer.
    pub received_bytes: u64,
    /// Seconds between packets that only keep the way open.
    pub keepalive: Option<NonZero<u16>>,
    /// Where it sends.
    pub endpoint: Option<SocketAddr>,
}

/// Parses what comes out of one guest's control port, in whatever pieces it arrives.
#[derive(Debug)]
pub struct ControlPort {
    line: Vec<u8>,
    /// The current line is too long: skip to its end.
    skipping: bool,
    last_key: Option<WgPublicKey>,
    handshake_seen: bool,
    /// Said and not taken yet.
    tunnel: Option<GuestTunnel>,
    key_changes: u32,
    ignored_lines: u64,
}

impl Default for ControlPort {
    fn default() -> Self {
        Self::new()
    }
}

impl ControlPort {
    /// The longest line that is read, in bytes, without its newline.
    pub const MAX_LINE_BYTES: usize = 256;
    /// How many different keys one boot of a guest may report. An honest guest reports one.
    pub const MAX_KEYS_PER_BOOT: u32 = 4;

    /// A parser for a guest that has said nothing yet.
    pub fn new() -> Self {
        Self {
            line: Vec::with_capacity(Self::MAX_LINE_BYTES),
            skipping: false,
            last_key: None,
            handshake_seen: false,
            tunnel: None,
            key_changes: 0,
            ignored_lines: 0,
        }
    }

    /// How many lines were malformed, unknown, too long, or one key too many.
    pub fn ignored_lines(&self) -> u64 {
        self.ignored_lines
    }

    /// Forgets what the guest has said: it has been reset and will make a new key.
    pub fn guest_was_reset(&mut self) {
        *self = Self {
            ignored_lines: self.ignored_lines,
            ..Self::new()
        };
    }

    /// What the guest has said last of its tunnel, if it has said anything since this was asked last. However often it
    /// says so, whoever asks decides how often it is heard.
    pub fn take_tunnel(&mut self) -> Option<GuestTunnel> {
        self.tunnel.take()
    }

    /// Takes the next bytes and hands each new report to `report`. Repetitions say nothing new
    /// and make no report.
    pub fn receive(&mut self, bytes: &[u8], mut report: impl FnMut(Report)) {
        for &byte in bytes {
            if byte == b'\n' {
                if let Some(new) = self.end_line() {
                    report(new);
                }
            } else if self.line.len() < Self::MAX_LINE_BYTES {
                self.line.push(byte);
            } else {
                self.skipping = true;
            }
        }
    }

    fn end_line(&mut self) -> Option<Report> {
        let parsed = if self.skipping {
            None
        } else {
            parse_line(&self.line)
        };
        self.line.clear();
        self.skipping = false;
        let Some(parsed) = parsed else {
            self.ignore();
            return None;
        };
        let parsed = match parsed {
            Line::Report(report) => report,
            Line::Tunnel(tunnel) => {
                self.tunnel = Some(tunnel);
                return None;
            }
        };
        match parsed {
            Report::Handshake if self.handshake_seen => None,
            Report::Handshake => {
                self.handshake_seen = true;
                Some(parsed)
            }
            Report::PublicKey(key) if self.last_key == Some(key) => None,
            Report::PublicKey(_) if self.key_changes >= Self::MAX_KEYS_PER_BOOT => {
                self.ignore();
                None
            }
            Report::PublicKey(key) => {
                self.key_changes += 1;
                self.last_key = Some(key);
                Some(parsed)
            }
        }
    }

    fn ignore(&mut self) {
        self.ignored_lines = self.ignored_lines.saturating_add(1);
    }
}

/// What a line says.
enum Line {
    Report(Report),
    Tunnel(GuestTunnel),
}

fn parse_line(line: &[u8]) -> Option<Line> {
    let line = std::str::from_utf8(line).ok()?;
    match line.split_once(' ') {
        None if line == "handshake" => Some(Line::Report(Report::Handshake)),
        Some(("public_key", key)) => Some(Line::Report(Report::PublicKey(key.parse().ok()?))),
        Some(("tunnel", facts)) => parse_tunnel(facts).map(Line::Tunnel),
        _ => None,
    }
}

/// `AGE SENT RECEIVED KEEPALIVE ENDPOINT`: a dash for no handshake and no endpoint, 0 for no keepalive.
fn parse_tunnel(facts: &str) -> Option<GuestTunnel> {
    let mut words = facts.split(' ');
    let mut word = || words.next();
    let tunnel = GuestTunnel {
        handshake_age: unless_dash(word()?, number)?,
        sent_bytes: number(word()?)?,
        received_bytes: number(word()?)?,
        keepalive: NonZero::new(number(word()?)?),
        endpoint: unless_dash(word()?, |text| text.parse().ok())?,
    };
    word().is_none().then_some(tunnel)
}

fn unless_dash<T>(word: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<Option<T>> {
    match word {
        "-" => Some(None),
        word => parse(word).map(Some),
    }
}

/// Decimal digits alone: Rust's own takes a sign.
fn number<T: std::str::FromStr>(word: &str) -> Option<T> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| word.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reports(port: &mut ControlPort, bytes: &[u8]) -> Vec<Report> {
        let mut reports = Vec::new();
        port.receive(bytes, |report| reports.push(report));
        reports
    }

    fn key(byte: u8) -> WgPublicKey {
        WgPublicKey::try_from([byte; 32]).unwrap()
    }

    #[test]
    fn an_honest_guest_is_heard_once() {
        let mut port = ControlPort::new();
        let line = format!("public_key {}\n", key(1));
        assert_eq!(
            reports(&mut port, line.as_bytes()),
            [Report::PublicKey(key(1))]
        );
        assert_eq!(reports(&mut port, line.as_bytes()), []);
        assert_eq!(
            reports(&mut port, b"handshake\nhandshake\n"),
            [Report::Handshake]
        );
        assert_eq!(port.ignored_lines(), 0);
    }

    #[test]
    fn malformed_lines_are_counted_and_ignored() {
        let mut port = ControlPort::new();
        let good = key(1).to_string();
        for line in [
            "\n".to_owned(),
            "handshake \n".to_owned(),
            "handshake\r\n".to_owned(),
            "HANDSHAKE\n".to_owned(),
            "public_key\n".to_owned(),
            format!("public_key  {good}\n"),
            format!("public_key {good} \n"),
            format!("public_key {}\n", &good[1..]),
            format!("private_key {good}\n"),
        ] {
            assert_eq!(reports(&mut port, line.as_bytes()), [], "{line:?}");
        }
        assert_eq!(reports(&mut port, b"\xff\xfe\n"), []);
        assert_eq!(port.ignored_lines(), 10);
    }

    #[test]
    fn an_overlong_line_is_skipped_whole() {
        let mut port = ControlPort::new();
        let mut bytes = vec![b'x'; ControlPort::MAX_LINE_BYTES + 1];
        bytes.extend_from_slice(b"handshake\nhandshake\n");
        assert_eq!(reports(&mut port, &bytes), [Report::Handshake]);
        assert_eq!(port.ignored_lines(), 1);
    }

    #[test]
    fn a_flood_of_keys_is_cut_short_until_the_next_boot() {
        let mut port = ControlPort::new();
        let flood: String = (1..=100)
            .map(|n| format!("public_key {}\n", key(n)))
            .collect();
        let heard = reports(&mut port, flood.as_bytes());
        assert_eq!(heard.len(), ControlPort::MAX_KEYS_PER_BOOT as usize);
        assert_eq!(port.ignored_lines(), 96);
        port.guest_was_reset();
        let line = format!("public_key {}\n", key(101));
        assert_eq!(
            reports(&mut port, line.as_bytes()),
            [Report::PublicKey(key(101))]
        );
        assert_eq!(port.ignored_lines(), 96);
    }

    #[test]
    fn what_a_guest_says_of_its_tunnel_is_kept_once_until_it_is_taken() {
        let mut port = ControlPort::new();
        assert_eq!(port.take_tunnel(), None);
        let said = b"tunnel - 0 0 0 -\ntunnel 7 1480 92 25 192.0.2.10:51820\n";
        assert_eq!(reports(&mut port, said), []);
        let tunnel = GuestTunnel {
            handshake_age: Some(7),
            sent_bytes: 1480,
            received_bytes: 92,
            keepalive: NonZero::new(25),
            endpoint: Some("192.0.2.10:51820".parse().unwrap()),
        };
        assert_eq!(port.take_tunnel(), Some(tunnel));
        assert_eq!(port.take_tunnel(), None);
        assert_eq!(port.ignored_lines(), 0);
        for line in [
            "tunnel",
            "tunnel 7 1480 92 25",
            "tunnel 7 1480 92 25 192.0.2.10:51820 more",
            "tunnel 7 1480 92 25 vpn.example.org:51820",
            "tunnel +7 1480 92 25 -",
            "tunnel 4294967296 1480 92 25 -",
            "tunnel 7 1480 92 65536 -",
            "tunnel 7  1480 92 25 -",
            "tunnel 7 18446744073709551616 92 25 -",
        ] {
            assert_eq!(reports(&mut port, format!("{line}\n").as_bytes()), []);
            assert_eq!(port.take_tunnel(), None, "{line}");
        }
        assert_eq!(port.ignored_lines(), 9);
        assert_eq!(reports(&mut port, said), []);
        port.guest_was_reset();
        assert_eq!(port.take_tunnel(), None, "said by the boot before");
    }

    fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<Vec<u8>>(),
            Just(b"handshake\n".to_vec()),
            Just(b"\n".to_vec()),
            Just(b"tunnel 7 1 2 25 192.0.2.10:51820\n".to_vec()),
            Just(b"tunnel - 0 0 0 -\n".to_vec()),
            Just(b"public_key ".to_vec()),
            any::<[u8; 32]>().prop_filter_map("zero", |bytes| {
                WgPublicKey::try_from(bytes)
                    .ok()
                    .map(|k| format!("public_key {k}\n").into_bytes())
            }),
            (1usize..600).prop_map(|n| vec![b'a'; n]),
        ];
        proptest::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        /// However the bytes are cut, the same reports come out, memory stays bounded, and the
        /// number of reports is bounded however much is written.
        #[test]
        fn pieces_do_not_matter_and_nothing_grows(bytes in hostile_bytes(), cut in 1usize..64) {
            let mut whole = ControlPort::new();
            let expected = reports(&mut whole, &bytes);
            let mut pieces = ControlPort::new();
            let mut heard = Vec::new();
            for piece in bytes.chunks(cut) {
                heard.extend(reports(&mut pieces, piece));
                prop_assert!(pieces.line.capacity() <= ControlPort::MAX_LINE_BYTES);
            }
            prop_assert_eq!(&heard, &expected);
            prop_assert_eq!(pieces.take_tunnel(), whole.take_tunnel());
            prop_assert!(heard.len() <= ControlPort::MAX_KEYS_PER_BOOT as usize + 1);
            prop_assert_eq!(pieces.ignored_lines(), whole.ignored_lines());
            let lines = bytes.iter().filter(|b| **b == b'\n').count() as u64;
            prop_assert!(whole.ignored_lines() <= lines);
        }

        /// A report is made only of a line that says exactly that.
        #[test]
        fn a_key_is_reported_only_as_written(bytes in hostile_bytes()) {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            for report in reports(&mut ControlPort::new(), &bytes) {
                let line = match report {
                    Report::PublicKey(key) => format!("public_key {key}"),
                    Report::Handshake => "handshake".to_owned(),
                };
                prop_assert!(text.split('\n').any(|l| l == line));
            }
        }
    }
}
