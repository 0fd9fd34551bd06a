//! QMP's bytes before they are parsed as QMP: bounded lines, and only the events acted on.
//!
//! The QMP library fixes its event vocabulary to one QEMU version and ends the connection at an
//! event it does not know, and it reads lines of any length. Both would let another QEMU, or one
//! that a guest has taken over, blind the launcher or exhaust its memory.

use std::borrow::Cow;
use std::io;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// The longest line of QMP, in bytes. The longest answer asked for is a few hundred.
pub(crate) const MAX_LINE_BYTES: usize = 64 << 10;

/// The events that are passed on.
const EVENTS: &[&str] = &["STOP", "RESUME", "SHUTDOWN", "RESET", "GUEST_PANICKED"];

/// Copies QMP's lines from `from` to `to` until either ends.
pub(crate) async fn copy<R, W>(from: R, mut to: W) -> io::Result<()>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    let mut greeted = false;
    loop {
        line.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let read = (&mut from).take(limit).read_until(b'\n', &mut line).await?;
        if read == 0 {
            return Ok(());
        }
        if line.len() > MAX_LINE_BYTES {
            return Err(invalid("a line longer than any answer"));
        }
        if let Some(passed) = judged(&line, &mut greeted)? {
            to.write_all(&passed).await?;
        }
    }
}

/// The line to pass on in place of `line`, or `None` for an event that nobody waits for.
fn judged<'a>(line: &'a [u8], greeted: &mut bool) -> io::Result<Option<Cow<'a, [u8]>>> {
    let message: Value = serde_json::from_slice(line).map_err(|_| invalid("what is not JSON"))?;
    let object = message
        .as_object()
        .ok_or_else(|| invalid("JSON that is no object"))?;
    if let Some(event) = object.get("event") {
        let wanted = event.as_str().is_some_and(|name| EVENTS.contains(&name));
        return Ok(wanted.then_some(Cow::Borrowed(line)));
    }
    if let Some(greeting) = object.get("QMP") {
        if std::mem::replace(greeted, true) {
            return Err(invalid("a second greeting"));
        }
        return Ok(Some(Cow::Owned(greeting_of(greeting)?)));
    }
    if object.contains_key("return") || object.contains_key("error") {
        return Ok(Some(Cow::Borrowed(line)));
    }
    Err(invalid(
        "an object that is neither greeting, answer nor event",
    ))
}

/// The greeting that the QMP library is given: QEMU's version, and an offer that makes the library
/// number its commands, so that a late answer can never pass for the answer to a later command. It
/// does so where QEMU offers out-of-band execution, which every QEMU since 2.12 does; but qapi 0.15
/// takes only `null` for that offer.
fn greeting_of(greeting: &Value) -> io::Result<Vec<u8>> {
    let number = |part| {
        let number = greeting.pointer(&format!("/version/qemu/{part}"));
        number
            .and_then(Value::as_u64)
            .ok_or_else(|| invalid("a greeting without its version"))
    };
    let qemu =
        json!({"major": number("major")?, "minor": number("minor")?, "micro": number("micro")?});
    let greeting =
        json!({"QMP": {"version": {"qemu": qemu, "package": ""}, "capabilities": [null]}});
    let mut line = serde_json::to_vec(&greeting)?;
    line.push(b'\n');
    Ok(line)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("QEMU sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The most that the one greeting may grow: the text around its numbers.
    const GREETING_GROWTH_BYTES: usize = 64;

    /// Greetings as short as can be, with numbers that would be written out longer than they came.
    const LINES: &[&str] = &[
        "{\"QMP\":{\"version\":{\"qemu\":{\"major\":9,\"minor\":0,\"micro\":0}}}}\n",
        "{\"QMP\":{\"a\":[1e15,1e15,1e15,1e15,1e15,1e15,1e15,1e15,1e15,1e15,1e15,1e15]}}\n",
        "{\"QMP\":{}}\n",
        "{\"return\":1e15}\n",
        "{\"event\":\"STOP\"}\n",
        "{\"event\":\"OTHER\"}\n",
    ];

    async fn copied(input: &[u8]) -> (io::Result<()>, Vec<u8>) {
        let mut output = Vec::new();
        let result = copy(input, &mut output).await;
        (result, output)
    }

    #[tokio::test]
    async fn answers_and_known_events_pass_and_unknown_events_do_not() {
        let passed = "{\"return\": {}, \"id\": 1}\n{\"error\": {}}\n{\"event\": \"STOP\"}\n";
        let input = format!("{passed}{{\"event\": \"FROM_THE_FUTURE\"}}\n");
        let (result, output) = copied(input.as_bytes()).await;
        result.unwrap();
        assert_eq!(String::from_utf8(output).unwrap(), passed);
    }

    #[tokio::test]
    async fn what_is_not_qmp_ends_the_connection() {
        let endless = vec![b'x'; MAX_LINE_BYTES + 10];
        for input in [&b"hello\n"[..], b"[]\n", b"{}\n", b"\xff\n", &endless] {
            let (result, output) = copied(input).await;
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert!(output.is_empty());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived_and_output_does_not_grow(input in any::<Vec<u8>>()) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (_, output) = runtime.block_on(copied(&input));
            prop_assert!(output.len() <= input.len() + GREETING_GROWTH_BYTES);
        }

        /// As above, of what gets further than random bytes do.
        #[test]
        fn output_does_not_grow_by_greetings(
            lines in prop::collection::vec(prop::sample::select(LINES), 0..8),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let input = lines.concat();
            let (result, output) = runtime.block_on(copied(input.as_bytes()));
            prop_assert!(output.len() <= input.len() + GREETING_GROWTH_BYTES, "{output:?}");
            let greetings = lines.iter().filter(|line| line.contains("QMP")).count();
            prop_assert!(greetings < 2 || result.is_err());
        }
    }
}
