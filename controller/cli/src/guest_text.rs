//! Text that a guest had a hand in, made fit for the operator's terminal.
//!
//! A guest is hostile. What it prints may rewrite lines that stand above it, set the window title,
//! fill the clipboard, or make the terminal type an answer. Two ways out:
//!
//! * [`visible`]: nothing but text. Every control character is spelled out (`^[`, `\u{9b}`). Used
//!   for logs, events and errors.
//! * [`TerminalFilter`]: for the live console, where an interactive shell needs some control. It
//!   passes text, line discipline, and the escape sequences that only move the cursor, erase or
//!   colour; it removes everything else, in particular OSC, DCS, APC, PM, SOS, C1 controls, device
//!   queries and mode changes.

use std::borrow::Cow;
use std::fmt::Write as _;

/// `text` with every control character, and every character that reorders or hides text, spelled
/// out. Tabs stay.
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_treacherous) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            c if !is_treacherous(c) => out.push(c),
            c @ '\0'..='\x1f' => {
                out.push('^');
                out.push(char::from(c as u8 ^ 0x40));
            }
            '\x7f' => out.push_str("^?"),
            c => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
        }
    }
    Cow::Owned(out)
}

/// Controls other than tab, and the bidirectional and invisible format characters with which text
/// can be made to read as something else.
fn is_treacherous(c: char) -> bool {
    (c.is_control() && c != '\t')
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The longest CSI sequence that is passed on, in bytes after `ESC [`. Real ones are short; the
/// bound keeps a guest from making this process buffer without end.
const MAX_SEQUENCE: usize = 32;

/// Passes a guest's console output on, minus what could harm the terminal it is shown on.
///
/// Sequences and UTF-8 characters may be split over any number of calls.
#[derive(Debug, Default)]
pub struct TerminalFilter {
    state: State,
    /// The bytes after `ESC [`, or of a UTF-8 character that is not complete yet.
    held: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    /// In a UTF-8 character of this many bytes.
    Character(usize),
    /// After ESC.
    Escape,
    /// After ESC and an intermediate byte: one final byte is to be swallowed.
    EscapeIntermediate,
    /// After ESC [.
    Csi,
    /// In a CSI sequence that has grown too long to be honest.
    CsiOverlong,
    /// In a string (OSC, DCS, APC, PM, SOS), which ends with ST or BEL.
    String,
    /// In a string, after ESC.
    StringEscape,
}

impl TerminalFilter {
    /// Appends the harmless part of `bytes` to `out`.
    pub fn pass(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        for &byte in bytes {
            self.pass_byte(byte, out);
        }
    }

    fn pass_byte(&mut self, byte: u8, out: &mut Vec<u8>) {
        match self.state {
            State::Text => self.text(byte, out),
            State::Character(length) => self.character(byte, length, out),
            State::Escape => self.escape(byte, out),
            State::EscapeIntermediate => match byte {
                0x20..=0x2f => {}
                0x30..=0x7e => self.state = State::Text,
                _ => self.restart(byte, out),
            },
            State::Csi => self.csi(byte, out),
            State::CsiOverlong => match byte {
                0x20..=0x3f => {}
                0x40..=0x7e => self.state = State::Text,
                _ => self.restart(byte, out),
            },
            // CAN and SUB abort a string on every terminal. Here a line's end does too, so that an
            // unfinished string does not silence the console for good.
            State::String => match byte {
                0x07 | 0x18 | 0x1a => self.state = State::Text,
                b'\n' | b'\r' => self.restart(byte, out),
                0x1b => self.state = State::StringEscape,
                _ => {}
            },
            State::StringEscape => match byte {
                b'\\' => self.state = State::Text,
                _ => {
                    self.state = State::Escape;
                    self.escape(byte, out);
                }
            },
        }
    }

    fn text(&mut self, byte: u8, out: &mut Vec<u8>) {
        match byte {
            0x07..=0x0a | 0x0d | 0x20..=0x7e => out.push(byte),
            0x1b => self.state = State::Escape,
            0xc2..=0xf4 => {
                self.held.clear();
                self.held.push(byte);
                self.state = State::Character(match byte {
                    0xc2..=0xdf => 2,
                    0xe0..=0xef => 3,
                    _ => 4,
                });
            }
            // Stray bytes above 0x7f are C1 controls to an 8-bit terminal.
            _ => {}
        }
    }

    fn character(&mut self, byte: u8, length: usize, out: &mut Vec<u8>) {
        if !(0x80..=0xbf).contains(&byte) {
            return self.restart(byte, out);
        }
        self.held.push(byte);
        if self.held.len() == length {
            if let Ok(character) = str::from_utf8(&self.held)
                && !character.chars().any(is_treacherous)
            {
                out.extend_from_slice(&self.held);
            }
            self.state = State::Text;
        }
    }

    fn escape(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.state = match byte {
            b'[' => {
                self.held.clear();
                State::Csi
            }
            b']' | b'P' | b'_' | b'^' | b'X' => State::String,
            0x20..=0x2f => State::EscapeIntermediate,
            0x30..=0x7e => State::Text,
            _ => return self.restart(byte, out),
        };
    }

    fn csi(&mut self, byte: u8, out: &mut Vec<u8>) {
        match byte {
            0x20..=0x3f if self.held.len() < MAX_SEQUENCE => self.held.push(byte),
            0x20..=0x3f => self.state = State::CsiOverlong,
            0x40..=0x7e => {
                if is_harmless(&self.held, byte) {
                    out.extend_from_slice(b"\x1b[");
                    out.extend_from_slice(&self.held);
                    out.push(byte);
                }
                self.state = State::Text;
            }
            _ => self.restart(byte, out),
        }
    }

    /// Gives up what was begun and takes `byte` as the first of something new.
    fn restart(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.state = State::Text;
        self.text(byte, out);
    }
}

/// Whether a CSI sequence only moves the cursor, erases, edits the screen or colours. Numbers and
/// separators alone are allowed as parameters: a private marker or an intermediate byte makes
/// another command of the same final byte.
fn is_harmless(parameters: &[u8], command: u8) -> bool {
    let cursor_visibility = parameters == b"?25" && matches!(command, b'h' | b'l');
    let plain = parameters
        .iter()
        .all(|byte| matches!(byte, b'0'..=b'9' | b';' | b':'));
    cursor_visibility
        || plain
            && matches!(
                command,
                b'A'..=b'H' | b'J'..=b'M' | b'P' | b'S' | b'T' | b'X' | b'@' | b'd' | b'f' | b'm' | b's' | b'u'
            )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        TerminalFilter::default().pass(bytes, &mut out);
        out
    }

    #[test]
    fn text_colour_and_cursor_movement_pass() {
        for text in [
            "plain\r\n",
            "tab\tbell\x07back\x08",
            "\x1b[1;31mred\x1b[0m",
            "\x1b[H\x1b[2J\x1b[K\x1b[10;20H\x1b[A",
            "\x1b[?25l\x1b[?25h",
            "grüße → 日本 🦀",
        ] {
            assert_eq!(filtered(text.as_bytes()), text.as_bytes(), "{text:?}");
        }
    }

    #[test]
    fn what_reaches_beyond_the_screen_is_removed() {
        for (sequence, what) in [
            (&b"\x1b]0;title\x07"[..], "title by BEL"),
            (b"\x1b]52;c;cm0gLXJmCg==\x1b\\", "clipboard by ST"),
            (b"\x1bP$q\"p\x1b\\", "DECRQSS"),
            (b"\x1b_payload\x1b\\", "APC"),
            (b"\x1b^payload\x1b\\", "PM"),
            (b"\x1b[6n", "cursor report"),
            (b"\x1b[c", "device attributes"),
            (b"\x1b[>c", "secondary device attributes"),
            (b"\x1b[21t", "title report"),
            (b"\x1b[?1049h", "alternate screen"),
            (b"\x1b[?1000h", "mouse"),
            (b"\x1b[>4;2m", "modifyOtherKeys"),
            (b"\x1bc", "reset"),
            (b"\x1b(0", "character set"),
            (b"\x1b#8", "alignment test"),
            (b"\x9b6n", "8-bit CSI"),
            ("\u{9b}6n".as_bytes(), "CSI as UTF-8"),
            ("\u{202e}".as_bytes(), "right-to-left override"),
            (b"\x05", "enquiry"),
            (b"\x0e\x0f", "shift in and out"),
        ] {
            let mut wrapped = b"a".to_vec();
            wrapped.extend_from_slice(sequence);
            wrapped.push(b'b');
            let shown = filtered(&wrapped);
            let expected: &[u8] = match what {
                // Without their introducer the rest is text.
                "8-bit CSI" | "CSI as UTF-8" => b"a6nb",
                _ => b"ab",
            };
            assert_eq!(shown, expected, "{what}");
        }
    }

    #[test]
    fn splitting_the_stream_changes_nothing() {
        let stream = "x\x1b[1;31mred\x1b]0;t\x1b\\y→\x1b[6nz\x1b[0m".as_bytes();
        for cut in 0..stream.len() {
            let mut filter = TerminalFilter::default();
            let mut out = Vec::new();
            filter.pass(&stream[..cut], &mut out);
            filter.pass(&stream[cut..], &mut out);
            assert_eq!(out, filtered(stream), "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_sequence_is_neither_buffered_nor_passed() {
        let mut filter = TerminalFilter::default();
        let mut out = Vec::new();
        filter.pass(b"\x1b[", &mut out);
        for _ in 0..100_000 {
            filter.pass(b"1;", &mut out);
        }
        filter.pass(b"mok", &mut out);
        assert_eq!(out, b"ok");
        assert!(filter.held.capacity() < 1024);
    }

    #[test]
    fn an_unfinished_string_ends_with_its_line() {
        assert_eq!(filtered(b"\x1b]0;t\r\nnext"), b"\r\nnext");
    }

    #[test]
    fn escape_inside_an_unfinished_sequence_cannot_smuggle_another() {
        assert_eq!(filtered(b"\x1b[1\x1b]0;t\x07a"), b"a");
        assert_eq!(filtered(b"\x1b]0;t\x1b[6na"), b"a");
        assert_eq!(filtered(b"\xe2\x1b[31ma"), b"\x1b[31ma");
    }

    #[test]
    fn controls_are_spelled_out() {
        assert_eq!(
            visible("a\x1b[31mb\r\x7f\u{9b}\u{202e}\tc"),
            "a^[[31mb^M^?\\u{9b}\\u{202e}\tc"
        );
        assert!(matches!(visible("plain → text"), Cow::Borrowed(_)));
    }
}
