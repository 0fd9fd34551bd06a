//! `omerta vm console`: this terminal on a guest's serial console.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use crate::args::vm::GuestName;
use crate::guest_text::TerminalFilter;

/// Ctrl-].
const DETACH: u8 = 0x1d;

/// How many reads of the keyboard may wait for the guest to take them.
const TYPED_AHEAD: usize = 16;

/// How much may wait for a guest that takes nothing, in bytes. Up to there Ctrl-] is still seen;
/// there a pipe's session ends.
const MAX_UNSENT: usize = 64 << 10;

/// How long what was typed before Ctrl-] may take to be sent.
const FAREWELL: Duration = Duration::from_millis(500);

/// Why the session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The operator typed Ctrl-].
    Detached,
    /// The guest's end was closed.
    Closed,
    /// A signal asked this process to end.
    Signalled,
    /// Standard input has ended, or is not taken, and the time after that is over; so many bytes
    /// of it were not taken.
    InputEnded { unsent: usize },
}

/// Connects standard input and output to the console at `socket` until Ctrl-] is typed, the
/// console closes, a signal asks this process to end, or `linger` after standard input has ended.
/// The terminal is given back as it was.
///
/// # Errors
/// Where the console cannot be reached, breaks, takes no input, or standard output cannot be
/// written.
pub async fn attach(
    guest: &GuestName,
    socket: &Path,
    linger: Duration,
) -> Result<(), ConsoleError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ConsoleError::Connect {
            guest: guest.clone(),
            socket: socket.to_owned(),
            source,
        })?;
    // Before the terminal changes: a signal that came between would leave it changed.
    let mut endings = EndingSignals::catch().map_err(|source| ConsoleError::Signals { source })?;
    let raw = RawTerminal::enter().map_err(|source| ConsoleError::Terminal { source })?;
    if raw.is_some() {
        note(format_args!("connected to {guest}; Ctrl-] detaches"));
    }
    let ending = relay(stream, raw.is_some(), linger, &mut endings).await;
    drop(raw);
    match ending {
        Ok(Ending::InputEnded { unsent: left @ 1.. }) => {
            return Err(ConsoleError::Untaken {
                guest: guest.clone(),
                left,
            });
        }
        Ok(Ending::Detached | Ending::Signalled | Ending::InputEnded { .. }) => {
            note(format_args!("detached from {guest}"))
        }
        Ok(Ending::Closed) => note(format_args!("{guest} closed its console")),
        // Whoever read our output, or the guest, went away while being written to.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(source) => {
            return Err(ConsoleError::Relay {
                guest: guest.clone(),
                source,
            });
        }
    }
    Ok(())
}

async fn relay(
    stream: UnixStream,
    detachable: bool,
    linger: Duration,
    endings: &mut EndingSignals,
) -> io::Result<Ending> {
    let (mut guest, mut to_guest) = stream.into_split();
    let mut keyboard = keyboard();
    let mut screen = Screen::new();
    let mut typing = true;
    let mut leave_at = Instant::now();
    let mut unsent = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    // A guest that takes no input must hold up neither its output nor the way out of here.
    loop {
        let stuck = !detachable && unsent.len() >= MAX_UNSENT;
        tokio::select! {
            read = guest.read(&mut buffer) => match read? {
                0 => return Ok(Ending::Closed),
                length => screen.show(&buffer[..length])?,
            },
            typed = keyboard.recv(), if typing && unsent.len() < MAX_UNSENT => match typed {
                Some(typed) => {
                    let typed = typed?;
                    leave_at = Instant::now() + linger;
                    let detach = typed.iter().position(|&key| detachable && key == DETACH);
                    unsent.extend_from_slice(&typed[..detach.unwrap_or(typed.len())]);
                    if detach.is_some() {
                        let _ = timeout(FAREWELL, to_guest.write_all(&unsent)).await;
                        return Ok(Ending::Detached);
                    }
                }
                None => {
                    typing = false;
                    leave_at = Instant::now() + linger;
                }
            },
            sent = to_guest.write(&unsent), if !unsent.is_empty() => {
                unsent.drain(..sent?);
                // The guest's answer to the last of it gets the whole time.
                leave_at = Instant::now() + linger;
            }
            () = sleep_until(leave_at), if !typing || stuck => {
                return Ok(Ending::InputEnded { unsent: unsent.len() });
            }
            () = endings.next() => return Ok(Ending::Signalled),
        }
    }
}

/// The signals that ask this process to end.
struct EndingSignals([Signal; 4]);

impl EndingSignals {
    fn catch() -> io::Result<Self> {
        Ok(Self([
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::quit())?,
        ]))
    }

    /// Waits for any of them.
    async fn next(&mut self) {
        let [terminate, hangup, interrupt, quit] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

/// Standard input, read by a thread of its own: a terminal cannot be read without blocking unless
/// it is made so for every process that shares it. The thread ends with the process.
fn keyboard() -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (typed, keyboard) = mpsc::channel(TYPED_AHEAD);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = [0; 1024];
        loop {
            let read = match stdin.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => Ok(buffer[..length].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = read.is_err();
            if typed.blocking_send(read).is_err() || failed {
                return;
            }
        }
    });
    keyboard
}

/// Standard output, behind a filter where it is a terminal.
struct Screen {
    filter: Option<TerminalFilter>,
    passed: Vec<u8>,
}

impl Screen {
    fn new() -> Self {
        Self {
            filter: io::stdout().is_terminal().then(TerminalFilter::default),
            passed: Vec::new(),
        }
    }

    fn show(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        match &mut self.filter {
            None => stdout.write_all(bytes)?,
            Some(filter) => {
                self.passed.clear();
                filter.pass(bytes, &mut self.passed);
                stdout.write_all(&self.passed)?;
            }
        }
        stdout.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.filter.is_some() {
            // The guest may have left colours on or the cursor off. A drop cannot report.
            let _ = io::stdout().write_all(b"\x1b[0m\x1b[?25h\r\n");
            let _ = io::stdout().flush();
        }
    }
}

/// The terminal at standard input in raw mode; as it was before, once dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Puts standard input in raw mode; `None` where it is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        let terminal = Self { before };
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(terminal))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A drop cannot report; a terminal that is gone needs nothing back.
        let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}

/// A remark to the operator, whatever mode the terminal is in.
fn note(remark: std::fmt::Arguments<'_>) {
    if io::stderr().is_terminal() {
        // A remark that cannot be shown is no reason to fail.
        let _ = write!(io::stderr(), "omerta: {remark}\r\n");
    }
}

/// Why a console session failed.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The console's socket cannot be connected to.
    #[error("cannot connect to the console of guest {guest} at {}: see `omerta vm show {guest}`, and run this as the user that runs omertad", socket.display())]
    Connect {
        /// The guest.
        guest: GuestName,
        /// The console's socket.
        socket: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The terminal cannot be put in raw mode.
    #[error("cannot put the terminal in raw mode")]
    Terminal {
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Signals cannot be caught.
    #[error("cannot catch the signals that would leave the terminal in raw mode")]
    Signals {
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Standard input was not taken to its end.
    #[error(
        "guest {guest} takes no input: {left} bytes or more were not typed; see what it does with `omerta vm logs {guest}`"
    )]
    Untaken {
        /// The guest.
        guest: GuestName,
        /// How much is known not to have been taken.
        left: usize,
    },
    /// The session broke.
    #[error("the console session with guest {guest} broke: attach again")]
    Relay {
        /// The guest.
        guest: GuestName,
        /// What broke.
        #[source]
        source: io::Error,
    },
}
