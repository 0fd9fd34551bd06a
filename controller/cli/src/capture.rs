//! `omerta capture`: what crosses a guarded interface, each frame with what became of it.
//!
//! The capture sees copies of frames (AF_PACKET) and judges them by the guard's own policy with the
//! verdict that the kernel runs, so the guard does not know of it. What it cannot know is said with each
//! frame. What the guard dropped on its way to the guest it does not see: counters and events tell of that.

mod confine;
mod files;
mod packets;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use omerta_api::{Guest, route};
use omerta_dataplane::{Basis, Copies, Copy, Guard, GuardError, Judgement, Observer, describe};
use omerta_verdict::Outcome;
use serde::Serialize;

use crate::args::Format;
use crate::args::capture::{CaptureArgs, VerdictWord};
use crate::client::Client;
use crate::exit::Exit;
use crate::guard::exit_of;
use crate::guest_text::visible;
use crate::output::{Output, Style};

pub use packets::{PacketWriter, Seen};

use files::{CaptureFiles, FilesError};

/// How long the guard is taken to be the one that was found.
const LOOK: Duration = Duration::from_secs(1);

/// Captures until interrupted, until the interface or its guard is gone, or as many frames as asked for.
///
/// # Errors
/// See [`CaptureError`].
pub fn run(interface: String, args: &CaptureArgs, out: &mut Output) -> Result<(), CaptureError> {
    let observer = Guard::open(&interface)?.observe()?;
    let copies = Copies::open(&interface, args.snaplen as usize)?;
    let signals = signals().map_err(|errno| CaptureError::Signals {
        source: errno.into(),
    })?;
    let sink = match args.write.as_deref() {
        None => Sink::Lines,
        Some(path) if path == Path::new("-") => {
            Sink::Stream(Box::new(PacketWriter::new(io::stdout(), &interface)?))
        }
        Some(path) => Sink::Files(CaptureFiles::create(path, &interface, args.ring.0)?),
    };
    let directory = match &sink {
        Sink::Files(files) => Some(files.directory()),
        Sink::Lines | Sink::Stream(_) => None,
    };
    if let Err(error) = confine::to(directory) {
        // A capture that is refused for want of a second lock on the door helps nobody.
        say(&format!("not confined: {error}"));
    }
    let mut capture = Capture {
        interface,
        copies,
        observer,
        sink,
        second: Instant::now(),
        in_second: 0,
        told: Told::default(),
    };
    let end = capture.run(args, &signals, out);
    let finished = capture.finish();
    end.and(finished)
}

/// The tap of the guest of that name; where omertad knows none, or does not run, the interface of that
/// name.
pub async fn interface_of(client: &Client, target: &str) -> String {
    let path = route::of_guest(route::GUEST, target);
    match client.get::<Guest>(&path).await {
        Ok(guest) => guest.interface,
        Err(_) => target.to_owned(),
    }
}

/// Interrupts as something to wait for beside frames.
fn signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Where frames go.
enum Sink {
    Lines,
    Stream(Box<PacketWriter<io::Stdout>>),
    Files(CaptureFiles),
}

/// How many frames there were.
#[derive(Default)]
struct Told {
    seen: u64,
    kept: u64,
    beyond_rate: u64,
    lost: u64,
}

struct Capture {
    interface: String,
    copies: Copies,
    observer: Observer,
    sink: Sink,
    second: Instant,
    in_second: u32,
    told: Told,
}

impl Capture {
    fn run(
        &mut self,
        args: &CaptureArgs,
        signals: &SignalFd,
        out: &mut Output,
    ) -> Result<(), CaptureError> {
        say(&format!(
            "capturing on {}; interrupt to end",
            self.interface
        ));
        let mut looked = Instant::now();
        loop {
            let mut waited = [
                PollFd::new(self.copies.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut waited, PollTimeout::from(1000_u16)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(CaptureError::Signals {
                        source: errno.into(),
                    });
                }
            }
            let interrupted = waited[1].any().unwrap_or(true);
            let frames = self.batch(args, out)?;
            if interrupted
                || args
                    .count
                    .is_some_and(|count| self.told.kept >= count.get())
            {
                return Ok(());
            }
            if frames == 0 || looked.elapsed() > LOOK {
                looked = Instant::now();
                if !self.observer.is_current() {
                    say(&format!(
                        "the guard of {} is gone, and the capture ends with it",
                        self.interface
                    ));
                    return Ok(());
                }
            }
        }
    }

    /// Takes what has come; returns how many frames that were.
    fn batch(&mut self, args: &CaptureArgs, out: &mut Output) -> Result<usize, CaptureError> {
        let Self {
            interface: _,
            copies,
            observer,
            sink,
            second,
            in_second,
            told,
        } = self;
        let mut failed = None;
        let frames = copies.read(|frame| {
            if failed.is_some() || args.count.is_some_and(|count| told.kept >= count.get()) {
                return;
            }
            told.seen += 1;
            let judgement = match observer.judge(&frame) {
                Ok(judgement) => judgement,
                Err(error) => {
                    failed = Some(error.into());
                    return;
                }
            };
            if !is_wanted(args, judgement.outcome) {
                return;
            }
            if second.elapsed() >= Duration::from_secs(1) {
                (*second, *in_second) = (Instant::now(), 0);
            }
            if *in_second >= args.rate.get() {
                told.beyond_rate += 1;
                return;
            }
            *in_second += 1;
            told.kept += 1;
            if let Err(error) = keep(sink, args, &frame, judgement, out) {
                failed = Some(error);
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        if frames > 0 {
            match sink {
                // Whoever reads along sees each batch at once.
                Sink::Stream(stream) => stream.flush()?,
                Sink::Files(files) => files.flush()?,
                Sink::Lines => {}
            }
        }
        Ok(frames)
    }

    /// Closes the file, and tells what is not in it.
    fn finish(&mut self) -> Result<(), CaptureError> {
        // Where that cannot be asked the interface is gone, and with it the number.
        self.told.lost = self.copies.lost().unwrap_or(self.told.lost);
        let Told {
            seen,
            kept,
            beyond_rate,
            lost,
        } = self.told;
        say(&format!(
            "{kept} frames kept of {seen} seen; {beyond_rate} beyond the rate left out; {lost} lost for want of room"
        ));
        match &mut self.sink {
            Sink::Lines => Ok(()),
            Sink::Stream(stream) => {
                stream.statistics(seen, lost, beyond_rate)?;
                Ok(stream.flush()?)
            }
            Sink::Files(files) => Ok(files.finish(seen, lost, beyond_rate)?),
        }
    }
}

fn is_wanted(args: &CaptureArgs, outcome: Outcome) -> bool {
    let verdict = match outcome {
        Outcome::Allowed => VerdictWord::Allowed,
        Outcome::Answered => VerdictWord::Answered,
        Outcome::Dropped(_) => VerdictWord::Dropped,
    };
    let of_verdict = args.verdict.is_empty() || args.verdict.contains(&verdict);
    let of_reason = match outcome {
        _ if args.reason.is_empty() => true,
        Outcome::Dropped(reason) => args.reason.contains(&reason),
        Outcome::Allowed | Outcome::Answered => false,
    };
    of_verdict && of_reason
}

fn keep(
    sink: &mut Sink,
    args: &CaptureArgs,
    frame: &Copy<'_>,
    judgement: Judgement,
    out: &mut Output,
) -> Result<(), CaptureError> {
    let comment = comment(judgement);
    let bytes = tagged(frame);
    let kept = bytes.get(..args.snaplen as usize).unwrap_or(&bytes);
    let seen = Seen {
        at: frame.at,
        direction: frame.direction,
        bytes: kept,
        length: frame.length + if frame.tag.is_some() { 4 } else { 0 },
        comment: &comment,
    };
    match sink {
        Sink::Stream(stream) => stream.write(&seen)?,
        Sink::Files(files) => files.write(&seen)?,
        Sink::Lines => {
            let line = Line {
                at: time(frame.at),
                direction: frame.direction.word(),
                verdict: word(judgement.outcome),
                reason: match judgement.outcome {
                    Outcome::Dropped(reason) => Some(reason.word()),
                    Outcome::Allowed | Outcome::Answered => None,
                },
                basis: basis(judgement.basis),
                frame: describe(&bytes),
                length: seen.length,
            };
            line.print(args.shown.format, out)?;
        }
    }
    Ok(())
}

/// The frame as it was on the wire.
fn tagged(frame: &Copy<'_>) -> Vec<u8> {
    let mut bytes = frame.bytes.to_vec();
    if let (Some([protocol, control]), true) = (frame.tag, bytes.len() >= 12) {
        let [a, b] = protocol.to_be_bytes();
        let [c, d] = control.to_be_bytes();
        bytes.splice(12..12, [a, b, c, d]);
    }
    bytes
}

const fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Allowed => "allowed",
        Outcome::Answered => "answered",
        Outcome::Dropped(_) => "dropped",
    }
}

fn basis(basis: Basis) -> String {
    match basis {
        Basis::Passed => "seen behind the guard".to_owned(),
        Basis::OwnAnswer => "the guard's answer in the guest's name".to_owned(),
        Basis::Native {
            epoch,
            unknown: None,
        } => format!("judged natively, epoch {epoch}"),
        Basis::Native {
            epoch,
            unknown: Some(unknown),
        } => format!("judged natively, epoch {epoch}; the kernel alone knows {unknown}"),
    }
}

/// What is written to each packet.
fn comment(judgement: Judgement) -> String {
    let verdict = match judgement.outcome {
        Outcome::Dropped(reason) => format!("dropped: {reason}"),
        other => word(other).to_owned(),
    };
    format!("{verdict} ({})", basis(judgement.basis))
}

/// A frame for people and programs.
#[derive(Serialize)]
struct Line {
    at: String,
    direction: &'static str,
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    basis: String,
    frame: String,
    length: u32,
}

impl Line {
    fn print(&self, format: Format, out: &mut Output) -> io::Result<()> {
        if format == Format::Json {
            return out.line(serde_json::to_string(self)?);
        }
        let style = match self.verdict {
            "dropped" => Style::Bad,
            _ => Style::Good,
        };
        let verdict = format!(
            "{:<8}",
            self.reason.map_or_else(
                || self.verdict.to_owned(),
                |reason| format!("{}: {reason}", self.verdict)
            )
        );
        let line = format!(
            "{}  {:<7}  {}  {}, {} bytes",
            self.at,
            self.direction,
            out.styled(style, &verdict),
            visible(&self.frame),
            self.length
        );
        out.line(line)
    }
}

/// Seconds since 1970 with nanoseconds, as tcpdump's `-tt` has them.
fn time(at: Duration) -> String {
    format!("{}.{:09}", at.as_secs(), at.subsec_nanos())
}

fn say(line: &str) {
    // Where stderr is closed nobody is told.
    let _ = writeln!(io::stderr(), "omerta: {line}");
}

/// Why a capture did not take place, or ended.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// No guard, no interface, no rights.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Signals cannot be waited for.
    #[error("cannot wait for frames and signals")]
    Signals {
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The files cannot be written.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl CaptureError {
    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Guard(error) => exit_of(error),
            Self::Files(_) | Self::Signals { .. } | Self::Output(_) => Exit::Failed,
        }
    }
}
