//! What the demo prints, and how many of its checks passed.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::interrupt;

/// From when on a wait is shown.
const SILENT: Duration = Duration::from_secs(1);

/// Prints the story and counts the checks.
pub struct Report {
    began: Instant,
    terminal: bool,
    colour: bool,
    passed: u32,
    failed: Vec<String>,
}

impl Report {
    pub fn new() -> Self {
        let terminal = io::stdout().is_terminal();
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        Self {
            began: Instant::now(),
            terminal: terminal && !dumb,
            colour: terminal && !dumb && !unwanted,
            passed: 0,
            failed: Vec::new(),
        }
    }

    /// Opens a part of the story.
    pub fn act(&self, title: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.line(&format!(
            "\n{}  {}",
            self.paint("1", title),
            self.paint("2", &format!("{seconds:.1} s"))
        ));
    }

    /// Tells something that is not a check.
    pub fn say(&self, text: &str) {
        self.line(&format!("    {text}"));
    }

    /// Tells something of lesser weight.
    pub fn remark(&self, text: &str) {
        self.line(&format!("    {}", self.paint("2", text)));
    }

    /// Counts one check and prints it.
    pub fn check(&mut self, holds: bool, text: &str) {
        self.checks(&[(holds, text)], text);
    }

    /// Counts several checks that share one line; each that fails is named below it.
    pub fn checks(&mut self, checks: &[(bool, &str)], line: &str) {
        let all = checks.iter().all(|(holds, _)| *holds);
        let mark = if all {
            self.paint("32", "✓")
        } else {
            self.paint("31", "✗")
        };
        self.line(&format!("  {mark} {line}"));
        for (holds, text) in checks {
            if *holds {
                self.passed += 1;
            } else {
                if *text != line {
                    self.line(&format!("      {} {text}", self.paint("31", "failed:")));
                }
                self.failed.push((*text).to_owned());
            }
        }
    }

    /// Polls until there is an answer, showing what is waited for once that takes a second.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut poll: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let began = Instant::now();
        let mut shown = false;
        let answer = loop {
            if let Some(answer) = poll()? {
                break Ok(answer);
            }
            let elapsed = began.elapsed();
            if elapsed >= limit {
                break Err(elapsed);
            }
            if elapsed >= SILENT && (self.terminal || !shown) {
                self.progress(what, elapsed);
                shown = true;
            }
            interrupt::sleep(Duration::from_millis(100))?;
        };
        if shown && self.terminal {
            self.raw("\r\x1b[K");
        }
        match answer {
            Ok(answer) => Ok(answer),
            Err(elapsed) => bail!(
                "{what}: nothing came of it in {:.0} s",
                elapsed.as_secs_f64()
            ),
        }
    }

    fn progress(&self, what: &str, elapsed: Duration) {
        if self.terminal {
            self.raw(&format!(
                "\r\x1b[K    … {what} {}",
                self.paint("2", &format!("{:.0} s", elapsed.as_secs_f64()))
            ));
        } else {
            self.line(&format!("    … {what}"));
        }
    }

    /// Prints the summary.
    pub fn finish(&self) -> ExitCode {
        let seconds = self.began.elapsed().as_secs_f64();
        self.line("");
        for text in &self.failed {
            self.line(&format!("failed: {text}"));
        }
        self.remark(&format!("{seconds:.1} s"));
        self.line(&format!(
            "demo: {} checks passed, {} failed",
            self.passed,
            self.failed.len()
        ));
        if self.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// Prints the summary of a story that broke off.
    pub fn abort(&mut self) -> ExitCode {
        self.failed
            .push("the story was not told to its end".to_owned());
        self.finish()
    }

    /// Tells on stderr what went wrong.
    pub fn complain(&self, text: &str) {
        if self.terminal {
            self.raw("\r\x1b[K");
        }
        // Where stderr is closed, the exit code has to do.
        let _ = writeln!(io::stderr(), "demo: {text}");
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn line(&self, text: &str) {
        self.raw(&format!("{text}\n"));
    }

    fn raw(&self, text: &str) {
        let mut out = io::stdout().lock();
        // A reader who has gone away must not keep the stage from being taken down.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}
