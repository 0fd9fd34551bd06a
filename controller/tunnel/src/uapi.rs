//! The text that userspace WireGuards are configured by (<https://www.wireguard.com/xplatform/>).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::num::NonZero;

use zeroize::Zeroizing;

use crate::device::moment;
use crate::{Addresses, AllowedIp, Change, Peer, PeerStatus, PublicKey, Secret, Setup, Status};

/// Room that a request has before it grows: what grows leaves copies of keys behind.
const ROOM: usize = 64 << 10;

/// A request of `set=1`, being written.
pub(crate) struct Request(Zeroizing<String>);

impl Request {
    pub(crate) fn new() -> Self {
        let mut text = String::with_capacity(ROOM);
        text.push_str("set=1\n");
        Self(Zeroizing::new(text))
    }

    /// The whole request.
    pub(crate) fn end(mut self) -> Zeroizing<String> {
        self.0.push('\n');
        self.0
    }

    /// Whether another change may not fit any more.
    pub(crate) fn is_full(&self) -> bool {
        self.0.len() > ROOM / 2
    }

    pub(crate) fn set_up(&mut self, setup: &Setup) {
        self.0.push_str("private_key=");
        self.hex(setup.private_key.expose());
        let port = setup.listen_port.map_or(0, NonZero::get);
        self.line("listen_port", port);
    }

    pub(crate) fn change(&mut self, change: &Change) {
        self.0.push_str("public_key=");
        self.hex(change.public_key().as_bytes());
        match change {
            Change::Remove(_) => self.line("remove", "true"),
            Change::Add(peer) => {
                self.line("replace_allowed_ips", "true");
                self.preshared_key(peer.preshared_key.as_ref());
                if let Some(endpoint) = peer.endpoint {
                    self.line("endpoint", endpoint);
                }
                self.keepalive(peer.keepalive);
                self.allow(&peer.allowed_ips);
            }
            Change::Update(update) => {
                self.line("update_only", "true");
                if let Some(preshared_key) = &update.preshared_key {
                    self.preshared_key(preshared_key.as_ref());
                }
                if let Some(endpoint) = update.endpoint {
                    self.line("endpoint", endpoint);
                }
                if let Some(keepalive) = update.keepalive {
                    self.keepalive(keepalive);
                }
                match &update.allowed_ips {
                    None => {}
                    Some(Addresses::More(more)) => self.allow(more),
                    Some(Addresses::Exactly(all)) => {
                        self.line("replace_allowed_ips", "true");
                        self.allow(all);
                    }
                }
            }
        }
    }

    fn preshared_key(&mut self, key: Option<&Secret>) {
        self.0.push_str("preshared_key=");
        // All zero is none.
        self.hex(key.map_or(&[0; 32], Secret::expose));
    }

    fn keepalive(&mut self, keepalive: Option<NonZero<u16>>) {
        self.line(
            "persistent_keepalive_interval",
            keepalive.map_or(0, NonZero::get),
        );
    }

    fn allow(&mut self, allowed_ips: &BTreeSet<AllowedIp>) {
        for allowed_ip in allowed_ips {
            self.line("allowed_ip", allowed_ip);
        }
    }

    fn line(&mut self, key: &str, value: impl std::fmt::Display) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{key}={value}");
    }

    fn hex(&mut self, bytes: &[u8; 32]) {
        for byte in bytes {
            let _ = write!(self.0, "{byte:02x}");
        }
        self.0.push('\n');
    }
}

/// Reads the answer to `get=1`, without its last, empty line.
pub(crate) fn parse_status(text: &str) -> Result<Status, &'static str> {
    let mut status = Status::default();
    let mut handshake = (0, 0);
    for line in text.lines() {
        let (key, value) = line.split_once('=').ok_or("a line without =")?;
        let peer = status.peers.last_mut();
        match (key, peer) {
            ("errno", _) if value == "0" => {}
            ("errno", _) => return Err("it is refused"),
            ("private_key" | "own_public_key" | "fwmark" | "protocol_version", _) => {}
            ("listen_port", _) => status.listen_port = number(value)?,
            ("public_key", _) => {
                handshake = (0, 0);
                let bytes = unhex(value).ok_or("a key")?;
                let public_key = PublicKey::try_from(*bytes).map_err(|_| "a key")?;
                status.peers.push(PeerStatus {
                    peer: Peer {
                        public_key,
                        preshared_key: None,
                        endpoint: None,
                        allowed_ips: BTreeSet::new(),
                        keepalive: None,
                    },
                    last_handshake: None,
                    sent_bytes: 0,
                    received_bytes: 0,
                });
            }
            (_, None) => return Err("a peer's line before any peer"),
            ("preshared_key", Some(status)) => {
                let bytes = unhex(value).ok_or("a preshared key")?;
                status.peer.preshared_key = (*bytes != [0; 32]).then(|| Secret::from(*bytes));
            }
            ("endpoint", Some(status)) => {
                status.peer.endpoint = Some(value.parse().map_err(|_| "an endpoint")?);
            }
            ("persistent_keepalive_interval", Some(status)) => {
                status.peer.keepalive = NonZero::new(number(value)?);
            }
            ("allowed_ip", Some(status)) => {
                status
                    .peer
                    .allowed_ips
                    .insert(value.parse().map_err(|_| "an allowed IP")?);
            }
            ("last_handshake_time_sec", Some(status)) => {
                handshake.0 = number(value)?;
                status.last_handshake = moment(handshake.0, handshake.1);
            }
            ("last_handshake_time_nsec", Some(status)) => {
                handshake.1 = number(value)?;
                status.last_handshake = moment(handshake.0, handshake.1);
            }
            ("tx_bytes", Some(status)) => status.sent_bytes = number(value)?,
            ("rx_bytes", Some(status)) => status.received_bytes = number(value)?,
            // What later versions tell.
            (_, Some(_)) => {}
        }
    }
    status.peers.sort_by_key(|status| status.peer.public_key);
    Ok(status)
}

fn number<T: std::str::FromStr>(value: &str) -> Result<T, &'static str> {
    value.parse().map_err(|_| "a number")
}

fn unhex(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let mut bytes = Zeroizing::new([0; 32]);
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_tells_is_read_and_its_own_key_is_not_kept() {
        let text = format!(
            "private_key={key}\nlisten_port=51820\npublic_key={peer}\npreshared_key={none}\nprotocol_version=1\n\
             endpoint=[2001:db8::1]:7\nlast_handshake_time_sec=5\nlast_handshake_time_nsec=6\ntx_bytes=8\nrx_bytes=9\n\
             persistent_keepalive_interval=25\nallowed_ip=10.0.0.1/32\nallowed_ip=::/0\nlater=thing\nerrno=0\n",
            key = "41".repeat(32),
            peer = "42".repeat(32),
            none = "00".repeat(32),
        );
        let status = parse_status(&text).unwrap();
        assert_eq!(status.listen_port, 51820);
        let [peer] = &status.peers[..] else {
            panic!("{status:?}")
        };
        assert_eq!(peer.peer.public_key.as_bytes(), &[0x42; 32]);
        assert_eq!(peer.peer.preshared_key, None);
        assert_eq!(peer.peer.endpoint, Some("[2001:db8::1]:7".parse().unwrap()));
        assert_eq!(peer.peer.keepalive, NonZero::new(25));
        assert_eq!((peer.sent_bytes, peer.received_bytes), (8, 9));
        assert_eq!(peer.last_handshake, moment(5, 6));
        assert_eq!(peer.peer.allowed_ips.len(), 2);
        assert!(!format!("{status:?}").contains(&"41".repeat(4)));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let key = "42".repeat(32);
        for text in [
            "nonsense".to_owned(),
            "errno=5\n".to_owned(),
            "endpoint=192.0.2.1:1\n".to_owned(),
            "public_key=42\n".to_owned(),
            format!("public_key={}\n", "00".repeat(32)),
            format!("public_key={key}\nendpoint=here\n"),
            format!("public_key={key}\nallowed_ip=10.0.0.0/33\n"),
            format!("public_key={key}\ntx_bytes=-1\n"),
        ] {
            assert!(parse_status(&text).is_err(), "{text}");
        }
    }
}
