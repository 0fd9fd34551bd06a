//! What host and agent read of each other.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use omerta_agent::heartbeat::{Finding, Heartbeat, Output, Timing};
use omerta_agent::message::{Key, Message, Messages};

const CONSUMER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 7), 4500);

fn heard(messages: &mut Messages, bytes: &[u8]) -> Vec<Message> {
    let mut heard = Vec::new();
    messages.receive(bytes, |message| heard.push(message));
    heard
}

/// What the other side writes, whole and byte by byte: the same messages, each of which says what was written.
pub fn messages(bytes: &[u8]) {
    let (mut whole, mut pieces) = (Messages::default(), Messages::default());
    let said = heard(&mut whole, bytes);
    let again: Vec<_> = bytes
        .iter()
        .flat_map(|byte| heard(&mut pieces, &[*byte]))
        .collect();
    assert_eq!(said, again);
    assert_eq!(whole.skipped(), pieces.skipped());
    let written: usize = said.iter().map(|message| message.encode().len()).sum();
    assert!(written as u64 + whole.skipped() <= bytes.len() as u64);
    for message in said {
        assert_eq!(
            heard(&mut Messages::default(), &message.encode()),
            [message]
        );
    }
}

/// A guest that writes what it likes, when it likes, and does not have the key: never sound, and what is told of
/// it is bounded.
pub fn heartbeat(bytes: &[u8]) {
    let timing = Timing {
        arrival: Duration::from_secs(60),
        interval: Duration::from_secs(5),
        deadline: Duration::from_secs(10),
        silence_seconds: 60,
        enforce: true,
    };
    let mut heartbeat = Heartbeat::known(timing, Key::new([0xa5; 32]), 7, Duration::ZERO);
    let (mut now, mut asked, mut told) = (Duration::ZERO, 0, 0);
    for (round, piece) in bytes.chunks(24).enumerate() {
        now += Duration::from_millis(u64::from(piece[0]) * 16);
        match piece[0] % 8 {
            0 => heartbeat.stand_still(now),
            1 => heartbeat.go_on(now),
            2 => heartbeat.consumer_moved(CONSUMER, now),
            _ => {}
        }
        let nonce = [round as u8; 32];
        for output in [
            heartbeat.pass(now, nonce),
            heartbeat.receive(now, &piece[1..]),
        ]
        .concat()
        {
            match output {
                Output::Send(_) => asked += 1,
                Output::Found(finding) => {
                    assert_ne!(finding, Finding::Sound);
                    told += 1;
                }
            }
        }
        assert_eq!(heartbeat.key(), Some(&Key::new([0xa5; 32])));
    }
    assert!(told <= 4 * (asked + 1));
}
