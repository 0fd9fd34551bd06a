//! What host and agent say to each other over the virtio-serial port `org.omerta.agent`.
//!
//! A message is two bytes of mark, the protocol's version, a kind, the body's length (16 bits, little-endian)
//! and the body, each of a length of its own. Neither side believes the other: bytes that begin no message
//! are skipped and counted, and at most one message is kept.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The name of the port.
pub const PORT_NAME: &str = "org.omerta.agent";
/// The version of the protocol. Messages of others are skipped.
pub const VERSION: u8 = 2;
const MARK: [u8; 2] = *b"Om";
const HEADER: usize = 6;
const LONGEST_BODY: usize = 96;

const HELLO: u8 = 1;
const ANSWER: u8 = 2;
const CHALLENGE: u8 = 3;

/// What an agent proves its answers with: made at its start, known to it and the host alone.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// A key of these random bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key itself, for whoever keeps it.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Key")
    }
}

/// What an agent says once, at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What it will prove its answers with.
    pub key: Key,
    /// SHA-256 of its own program.
    pub program: [u8; 32],
}

/// What the host asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// One more each time.
    pub sequence: u64,
    /// Random, and never asked again.
    pub nonce: [u8; 32],
    /// For how many seconds the agent may hear nothing before it powers the guest off; 0 is for ever.
    pub silence_seconds: u32,
    /// Whether a change powers the guest off.
    pub enforce: bool,
    /// Where the guest's consumer is, if it is elsewhere than the guest was told at its launch. The agent has the guest follow,
    /// and takes that one change for sealed.
    pub consumer: Option<SocketAddrV4>,
}

/// What has changed since the agent sealed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes(u8);

impl Changes {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// The rules of nftables or iptables.
    pub const FIREWALL: Self = Self(1);
    /// Interfaces, addresses, routes, rules of routing, forwarding.
    pub const ROUTES: Self = Self(2);
    /// The tunnel's key, or its peers and what they are allowed.
    pub const TUNNEL: Self = Self(4);
    /// The agent's program.
    pub const AGENT: Self = Self(8);
    const NAMED: [(Self, &'static str); 4] = [
        (Self::FIREWALL, "firewall"),
        (Self::ROUTES, "routes"),
        (Self::TUNNEL, "tunnel"),
        (Self::AGENT, "agent"),
    ];

    /// Both.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether nothing has changed.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Each change's word.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMED
            .into_iter()
            .filter(move |(change, _)| self.0 & change.0 != 0)
            .map(|(_, name)| name)
    }
}

/// What an agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The challenge's.
    pub sequence: u64,
    /// What has changed.
    pub changes: Changes,
    /// That the key's owner says so, of this challenge.
    pub proof: [u8; 32],
}

impl Answer {
    /// The answer to `challenge` by the owner of `key`.
    pub fn to(challenge: &Challenge, changes: Changes, key: &Key) -> Self {
        let mut proof = [0; 32];
        if let Some(mac) = proof_of(challenge, changes, key) {
            proof.copy_from_slice(&mac.finalize().into_bytes());
        }
        Self {
            sequence: challenge.sequence,
            changes,
            proof,
        }
    }

    /// Whether the owner of `key` answers `challenge`.
    pub fn proves(&self, challenge: &Challenge, key: &Key) -> bool {
        self.sequence == challenge.sequence
            && proof_of(challenge, self.changes, key)
                .is_some_and(|mac| mac.verify_slice(&self.proof).is_ok())
    }
}

/// `None` for a key that HMAC does not take, which none of this length is.
fn proof_of(challenge: &Challenge, changes: Changes, key: &Key) -> Option<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&key.0).ok()?;
    mac.update(b"omerta agent 2");
    mac.update(&challenge.sequence.to_le_bytes());
    mac.update(&challenge.nonce);
    mac.update(&encoded(challenge.consumer));
    mac.update(&[changes.0]);
    Some(mac)
}

/// An address and a port; zeroes where there is none.
fn encoded(consumer: Option<SocketAddrV4>) -> [u8; 6] {
    let mut bytes = [0; 6];
    if let Some(consumer) = consumer {
        bytes[..4].copy_from_slice(&consumer.ip().octets());
        bytes[4..].copy_from_slice(&consumer.port().to_be_bytes());
    }
    bytes
}

/// `None` for what is neither there nor an endpoint.
fn decoded(bytes: [u8; 6]) -> Option<Option<SocketAddrV4>> {
    let [a, b, c, d, high, low] = bytes;
    let consumer = SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low]));
    match (consumer.ip().is_unspecified(), consumer.port()) {
        (true, 0) => Some(None),
        (true, _) | (_, 0) => None,
        (false, _) => Some(Some(consumer)),
    }
}

/// Either side's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The agent's first.
    Hello(Hello),
    /// The host's question.
    Challenge(Challenge),
    /// The agent's answer.
    Answer(Answer),
}

impl Message {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Self::Hello(hello) => (HELLO, [hello.key.0, hello.program].concat()),
            Self::Challenge(challenge) => {
                let mut body = challenge.sequence.to_le_bytes().to_vec();
                body.extend(challenge.nonce);
                body.extend(challenge.silence_seconds.to_le_bytes());
                body.push(u8::from(challenge.enforce));
                body.extend(encoded(challenge.consumer));
                (CHALLENGE, body)
            }
            Self::Answer(answer) => {
                let mut body = answer.sequence.to_le_bytes().to_vec();
                body.push(answer.changes.0);
                body.extend(answer.proof);
                (ANSWER, body)
            }
        };
        let mut bytes = MARK.to_vec();
        bytes.extend([VERSION, kind]);
        bytes.extend((body.len() as u16).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn decode(kind: u8, body: &[u8]) -> Option<Self> {
        let mut fields = Fields(body);
        let message = match kind {
            HELLO => Self::Hello(Hello {
                key: Key(fields.take()?),
                program: fields.take()?,
            }),
            CHALLENGE => Self::Challenge(Challenge {
                sequence: u64::from_le_bytes(fields.take()?),
                nonce: fields.take()?,
                silence_seconds: u32::from_le_bytes(fields.take()?),
                enforce: match fields.take()? {
                    [0] => false,
                    [1] => true,
                    _ => return None,
                },
                consumer: decoded(fields.take()?)?,
            }),
            ANSWER => Self::Answer(Answer {
                sequence: u64::from_le_bytes(fields.take()?),
                changes: {
                    let [changes] = fields.take()?;
                    let known = Changes::NAMED
                        .iter()
                        .fold(0, |all, (change, _)| all | change.0);
                    if changes & !known != 0 {
                        return None;
                    }
                    Changes(changes)
                },
                proof: fields.take()?,
            }),
            _ => return None,
        };
        fields.0.is_empty().then_some(message)
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }
}

/// Messages out of a stream of bytes, in whatever pieces it arrives.
#[derive(Clone, Debug, Default)]
pub struct Messages {
    bytes: VecDeque<u8>,
    skipped: u64,
}

impl Messages {
    /// How many bytes began no message.
    pub const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Takes the next bytes and hands each message in them to `each`.
    pub fn receive(&mut self, bytes: &[u8], mut each: impl FnMut(Message)) {
        for &byte in bytes {
            self.bytes.push_back(byte);
            while let Some(message) = self.next() {
                each(message);
            }
        }
    }

    /// `None` where there is none yet. What is kept is less than a message then.
    fn next(&mut self) -> Option<Message> {
        loop {
            match parse(self.bytes.make_contiguous()) {
                Parsed::Message(message, length) => {
                    self.bytes.drain(..length);
                    return Some(message);
                }
                Parsed::More => return None,
                Parsed::Nothing => {
                    self.bytes.pop_front();
                    self.skipped = self.skipped.saturating_add(1);
                }
            }
        }
    }
}

enum Parsed {
    /// With how many bytes it has.
    Message(Message, usize),
    /// What there is may begin one.
    More,
    /// The first byte begins none.
    Nothing,
}

fn parse(bytes: &[u8]) -> Parsed {
    let begins = [MARK[0], MARK[1], VERSION];
    if bytes
        .iter()
        .zip(begins)
        .any(|(byte, expected)| *byte != expected)
    {
        return Parsed::Nothing;
    }
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return Parsed::More;
    };
    let length = u16::from_le_bytes([header[4], header[5]]) as usize;
    if length > LONGEST_BODY {
        return Parsed::Nothing;
    }
    let Some(body) = rest.get(..length) else {
        return Parsed::More;
    };
    match Message::decode(header[3], body) {
        Some(message) => Parsed::Message(message, HEADER + length),
        None => Parsed::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            any::<([u8; 32], [u8; 32])>().prop_map(|(key, program)| Message::Hello(Hello {
                key: Key::new(key),
                program
            })),
            any::<(u64, [u8; 32], u32, bool, Option<(u32, u16)>)>().prop_map(
                |(sequence, nonce, silence_seconds, enforce, consumer)| Message::Challenge(
                    Challenge {
                        sequence,
                        nonce,
                        silence_seconds,
                        enforce,
                        consumer: consumer.map(|(address, port)| SocketAddrV4::new(
                            Ipv4Addr::from_bits(address.max(1)),
                            port.max(1)
                        )),
                    }
                )
            ),
            any::<(u64, [u8; 32])>().prop_flat_map(|(sequence, proof)| (0..16_u8).prop_map(
                move |changes| {
                    Message::Answer(Answer {
                        sequence,
                        changes: Changes(changes),
                        proof,
                    })
                }
            )),
        ]
    }

    fn received(messages: &mut Messages, bytes: &[u8]) -> Vec<Message> {
        let mut all = Vec::new();
        messages.receive(bytes, |message| all.push(message));
        all
    }

    proptest! {
        #[test]
        fn what_is_said_is_heard(said in prop::collection::vec(message(), 0..8), cut in 1usize..40) {
            let bytes: Vec<u8> = said.iter().flat_map(Message::encode).collect();
            let mut messages = Messages::default();
            let heard: Vec<Message> =
                bytes.chunks(cut).flat_map(|piece| received(&mut messages, piece)).collect();
            prop_assert_eq!(heard, said);
            prop_assert_eq!(messages.skipped(), 0);
        }

        /// Neither memory nor what is skipped grows beyond what was written, and a message after garbage
        /// that cannot be the beginning of one is heard.
        #[test]
        fn garbage_is_skipped(garbage in prop::collection::vec(any::<u8>(), 0..600), after in message()) {
            let mut messages = Messages::default();
            received(&mut messages, &garbage);
            prop_assert!(messages.bytes.len() < HEADER + LONGEST_BODY);
            prop_assert!(messages.skipped() <= garbage.len() as u64);
            received(&mut messages, &[0; HEADER + LONGEST_BODY]);
            prop_assert_eq!(received(&mut messages, &after.encode()), [after]);
        }
    }

    #[test]
    fn an_answer_proves_one_challenge_one_state_one_key() {
        let key = Key::new([7; 32]);
        let challenge = Challenge {
            sequence: 9,
            nonce: [1; 32],
            silence_seconds: 60,
            enforce: true,
            consumer: None,
        };
        let answer = Answer::to(&challenge, Changes::NONE, &key);
        assert!(answer.proves(&challenge, &key));
        assert!(!answer.proves(&challenge, &Key::new([8; 32])));
        let later = Challenge {
            sequence: 10,
            ..challenge
        };
        assert!(!answer.proves(&later, &key));
        let renewed = Challenge {
            nonce: [2; 32],
            ..challenge
        };
        assert!(!answer.proves(&renewed, &key));
        let moved = Challenge {
            consumer: "192.0.2.1:51820".parse().ok(),
            ..challenge
        };
        assert!(!answer.proves(&moved, &key));
        let mut altered = answer;
        altered.changes = Changes::FIREWALL;
        assert!(!altered.proves(&challenge, &key));
    }

    #[test]
    fn unknown_kinds_versions_and_lengths_are_skipped() {
        let whole = Message::Hello(Hello {
            key: Key::new([1; 32]),
            program: [2; 32],
        })
        .encode();
        for (at, value) in [(2, 1), (3, 9), (4, 63), (5, 1)] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            let mut messages = Messages::default();
            assert_eq!(received(&mut messages, &bytes), [], "byte {at}");
            assert!(messages.skipped() > 0, "byte {at}");
        }
    }

    #[test]
    fn half_an_endpoint_is_no_challenge() {
        let challenge = Challenge {
            sequence: 1,
            nonce: [1; 32],
            silence_seconds: 0,
            enforce: false,
            consumer: "192.0.2.1:51820".parse().ok(),
        };
        let whole = Message::Challenge(challenge).encode();
        assert_eq!(
            received(&mut Messages::default(), &whole),
            [Message::Challenge(challenge)]
        );
        let [address, port] = [
            whole.len() - 6..whole.len() - 2,
            whole.len() - 2..whole.len(),
        ];
        for part in [address, port] {
            let mut bytes = whole.clone();
            bytes[part].fill(0);
            assert_eq!(received(&mut Messages::default(), &bytes), []);
        }
    }

    #[test]
    fn a_key_is_not_printed() {
        assert_eq!(format!("{:?}", Key::new([7; 32])), "Key");
    }
}
