//! Programs that are run to their end, within a limit.

use std::io::{Read, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use omerta_test_support::Process;

use crate::interrupt;

/// What a program that has ended wrote.
pub struct Answer {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program that is given `input`; a signal or the limit kills it.
pub fn run(mut command: Command, input: &str, limit: Duration) -> Result<Answer> {
    let what = describe(&command);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut process = Process::spawn(command)?;
    let child = process.child();
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input has its own reasons.
        let _ = stdin.write_all(input.as_bytes());
    }
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = process.wait(Duration::from_millis(20))? {
            break status;
        }
        interrupt::check()?;
        if Instant::now() >= deadline {
            bail!("`{what}` did not end in {:.0} s", limit.as_secs_f64());
        }
    };
    Ok(Answer {
        status,
        stdout: text_of(stdout),
        stderr: text_of(stderr),
    })
}

/// Runs a program that must succeed, and gives back its stdout.
pub fn expect(command: Command, input: &str, limit: Duration) -> Result<String> {
    let what = describe(&command);
    let answer = run(command, input, limit)?;
    if !answer.status.success() {
        bail!(
            "`{what}` failed ({}): {}",
            answer.status,
            answer.stderr.trim()
        );
    }
    Ok(answer.stdout)
}

fn describe(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let program = program.rsplit('/').next().unwrap_or_default().to_owned();
    command.get_args().fold(program, |text, argument| {
        format!("{text} {}", argument.to_string_lossy())
    })
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn text_of(reader: JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
}

/// Writes what `text` holds to a line of its own, cut to fit.
pub fn one_line(text: &str, limit: usize) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.chars().count() <= limit {
        return text;
    }
    text.chars()
        .take(limit.saturating_sub(1))
        .chain(['…'])
        .collect()
}

/// Parses JSON that a program wrote.
pub fn json(text: &str, from: &str) -> Result<serde_json::Value> {
    serde_json::from_str(text)
        .with_context(|| format!("{from} wrote no JSON: {}", one_line(text, 200)))
}
