//! The guest's serial console, where it is root.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bounded::one_line;
use crate::interrupt;

/// A shell on a guest's console.
pub struct Console {
    guest: String,
    stream: UnixStream,
    commands: u32,
    unread: Vec<u8>,
}

/// What a command in the guest came to.
pub struct Told {
    pub status: u32,
    pub output: String,
}

impl Console {
    /// Connects to a console, where a shell waits.
    pub fn connect(guest: &str, socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| {
            format!(
                "cannot reach the console of {guest} at {}",
                socket.display()
            )
        })?;
        stream
            .set_read_timeout(Some(Duration::from_millis(20)))
            .context("cannot set a timeout on the console")?;
        stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .context("cannot set a timeout on the console")?;
        Ok(Self {
            guest: guest.to_owned(),
            stream,
            commands: 0,
            unread: Vec::new(),
        })
    }

    /// Runs one line of shell in the guest.
    pub fn run(&mut self, line: &str, limit: Duration) -> Result<Told> {
        self.commands += 1;
        let n = self.commands;
        // The terminal echoes what is typed. The quotes keep the echo from looking like the answer.
        let typed = format!("echo @'begin'-{n}@; {{ {line}; }} 2>&1; echo @'end'-{n}-$?@\n");
        self.stream
            .write_all(typed.as_bytes())
            .with_context(|| format!("cannot type on the console of {}", self.guest))?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(told) = self.answer(n) {
                return Ok(told);
            }
            self.read()?;
            interrupt::check()?;
            if Instant::now() >= deadline {
                let seen = String::from_utf8_lossy(&self.unread).into_owned();
                bail!(
                    "the console of {} did not answer `{line}` in {:.0} s; it shows: {}",
                    self.guest,
                    limit.as_secs_f64(),
                    one_line(&seen, 200)
                );
            }
        }
    }

    /// Types a line without waiting for what comes of it.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.stream
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("cannot type on the console of {}", self.guest))
    }

    fn read(&mut self) -> Result<()> {
        let mut piece = [0; 4096];
        match self.stream.read(&mut piece) {
            Ok(0) => bail!("{} closed its console", self.guest),
            Ok(length) => self
                .unread
                .extend_from_slice(piece.get(..length).unwrap_or_default()),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot read the console of {}", self.guest));
            }
        }
        Ok(())
    }

    fn answer(&mut self, n: u32) -> Option<Told> {
        let text = String::from_utf8_lossy(&self.unread).into_owned();
        let (_, after) = text.split_once(&format!("@begin-{n}@"))?;
        let (output, after) = after.split_once(&format!("@end-{n}-"))?;
        let (status, rest) = after.split_once('@')?;
        let told = Told {
            status: status.parse().ok()?,
            output: output.replace('\r', "").trim().to_owned(),
        };
        self.unread = rest.as_bytes().to_vec();
        Some(told)
    }
}
