//! Streams that a guest or QEMU writes, in whatever pieces they arrive.

use std::cell::RefCell;

use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::console_watch::{ConsoleReport, ConsoleWatch};
use crate::control_port::ControlPort;
use crate::guest_text::{TerminalFilter, visible};
use crate::qmp_lines;

thread_local! {
    static RUNTIME: RefCell<Runtime> =
        RefCell::new(Builder::new_current_thread().build().expect("a runtime"));
}

/// What QEMU, or who has taken it over, writes to the monitor.
pub fn qmp_lines(bytes: &[u8]) {
    let mut out = Vec::new();
    let result =
        RUNTIME.with_borrow_mut(|runtime| runtime.block_on(qmp_lines::copy(bytes, &mut out)));
    // The one greeting gains the offer of numbered commands.
    assert!(out.len() <= bytes.len() + 64);
    for line in out
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let message: Value = serde_json::from_slice(line).expect("only JSON passes");
        if let Some(event) = message.get("event") {
            let known = ["STOP", "RESUME", "SHUTDOWN", "RESET", "GUEST_PANICKED"];
            assert!(event.as_str().is_some_and(|name| known.contains(&name)));
        }
    }
    if result.is_ok() {
        assert!(
            bytes
                .split(|b| *b == b'\n')
                .all(|line| line.len() <= qmp_lines::MAX_LINE_BYTES)
        );
    }
}

fn reports(pieces: &[&[u8]]) -> (Vec<String>, u64, String) {
    let (mut port, mut said) = (ControlPort::new(), Vec::new());
    for piece in pieces {
        port.receive(piece, |report| said.push(format!("{report:?}")));
    }
    let tunnel = format!("{:?}", port.take_tunnel());
    (said, port.ignored_lines(), tunnel)
}

/// What a guest writes to its control port.
pub fn control_port(bytes: &[u8]) {
    let whole = reports(&[bytes]);
    let (head, tail) = bytes.split_at(bytes.len() / 3);
    assert_eq!(
        whole,
        reports(&[head, tail]),
        "pieces say what the whole says"
    );
    // Keys are limited, and the handshake is told once.
    assert!(whole.0.len() as u32 <= ControlPort::MAX_KEYS_PER_BOOT + 1);
    assert!(whole.1 <= bytes.iter().filter(|byte| **byte == b'\n').count() as u64);
}

fn heard(pieces: &[&[u8]]) -> ConsoleReport {
    let mut watch = ConsoleWatch::default();
    for piece in pieces {
        watch.receive(piece);
    }
    watch.take().unwrap_or_default()
}

/// What a guest writes to its console, where its firewall is listened to.
pub fn console_watch(bytes: &[u8]) {
    let whole = heard(&[bytes]);
    let (head, tail) = bytes.split_at(bytes.len() / 3);
    assert_eq!(
        whole,
        heard(&[head, tail]),
        "pieces say what the whole says"
    );
    let ends = bytes.iter().filter(|b| matches!(b, b'\n' | b'\r'));
    assert!(whole.attempts <= ends.count() as u64);
    assert!(whole.line.len() <= 200 && whole.line.bytes().all(|b| matches!(b, b' '..=b'~')));
}

fn filtered(pieces: &[&[u8]]) -> Vec<u8> {
    let (mut filter, mut out) = (TerminalFilter::default(), Vec::new());
    for piece in pieces {
        filter.pass(piece, &mut out);
    }
    out
}

/// What a guest writes to its console, on its way to a terminal.
pub fn console_filter(bytes: &[u8]) {
    let out = filtered(&[bytes]);
    let (head, tail) = bytes.split_at(bytes.len() / 2);
    assert_eq!(
        out,
        filtered(&[head, tail]),
        "pieces show what the whole shows"
    );
    // 8-bit terminals take lone bytes from 0x80 to 0x9f for controls: what passes is UTF-8.
    let text = str::from_utf8(&out).expect("only text passes");
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\x1b' => {
                assert_eq!(characters.next(), Some('['), "only CSI passes");
                let end = characters
                    .find(|c| !matches!(c, '0'..='9' | ';' | ':' | ' '..='/' | '<'..='?'));
                let end = end.expect("a sequence that passes is whole");
                assert!(
                    "ABCDEFGHJKLMPSTXZ@`abcdefghlmrsu".contains(end),
                    "CSI {end} passes"
                );
            }
            '\x07'..='\n' | '\r' => {}
            c => assert!(!c.is_control(), "{c:?} passes"),
        }
    }
    let shown = visible(text);
    assert!(
        shown.chars().all(|c| c == '\t' || !c.is_control()),
        "{shown:?}"
    );
}
