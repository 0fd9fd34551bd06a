//! `omerta`: the command line of Omerta.
//!
//! `omerta guard` works on the kernel's guards directly; `omerta vm` and `omerta events` speak to
//! omertad. Whatever fails is told in one line on stderr that names the thing and the remedy, and
//! in the exit code.
#![forbid(unsafe_code)]

mod allowlist;
mod args;
mod capture;
mod client;
mod console;
mod doctor;
mod events;
mod exit;
mod guard;
mod guest_text;
mod image;
mod incident;
mod manual;
mod output;
mod peer;
mod spec;
mod translation;
mod version;
mod vm;

use std::future::Future;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::{Command, CommandLine};
use crate::client::Client;
use crate::exit::{Exit, explain, one_line};
use crate::output::Output;

fn main() -> ExitCode {
    let line = match CommandLine::try_parse() {
        Ok(line) => line,
        Err(error) => return not_understood(&error).into(),
    };
    match carry_out(line) {
        Ok(()) => Exit::Done.into(),
        // The reader of our output has seen enough.
        Err(failure) if failure.is_broken_pipe() => Exit::Done.into(),
        Err(failure) => {
            complain(&explain(&failure));
            failure.exit().into()
        }
    }
}

fn carry_out(line: CommandLine) -> Result<(), Failure> {
    let client = Client::new(line.socket);
    let mut out = Output::stdout();
    match line.command {
        Command::Guard(command) => guard::run(command, &mut out)?,
        Command::Image(command) => image::run(command, &mut out)?,
        Command::Vm(command) => wait_for(vm::run(&client, command, &mut out))??,
        Command::Peer(command) => wait_for(peer::run(&client, command, &mut out))??,
        Command::Events(args) => wait_for(events::run(&client, &args, &mut out))??,
        Command::Capture(args) => {
            let interface = wait_for(capture::interface_of(&client, &args.target))?;
            capture::run(interface, &args, &mut out)?;
        }
        Command::Incident(command) => incident::run(command, &mut out)?,
        Command::Doctor(shown) => wait_for(doctor::run(&client, shown.format, &mut out))??,
        Command::Version(shown) => wait_for(version::run(&client, shown.format, &mut out))??,
        Command::Completions { shell } => manual::completions(shell, &mut out)?,
        Command::Man { dir } => manual::pages(&dir)?,
    }
    Ok(())
}

fn wait_for<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::Runtime { source })?;
    let result = runtime.block_on(work);
    // A thread that still waits for the keyboard must not hold the process back.
    runtime.shutdown_background();
    Ok(result)
}

/// Tells what is wrong with the command line in one line; or prints the help that was asked for.
fn not_understood(error: &clap::Error) -> Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Whoever reads the help may stop reading.
            let _ = error.print();
            return Exit::Done;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return Exit::Usage;
        }
        _ => {}
    }
    let text = error.render().to_string();
    let (problem, usage) = text.split_once("\nUsage: ").unwrap_or((&text, ""));
    let problem = problem
        .split("\nFor more information")
        .next()
        .unwrap_or_default();
    let problem = one_line(problem);
    let problem = problem.strip_prefix("error: ").unwrap_or(&problem);
    // The words of the usage up to the first option or argument are the command.
    let command: Vec<&str> = usage
        .split_whitespace()
        .take_while(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect();
    if command.is_empty() {
        complain(problem);
    } else {
        complain(&format!("{problem}; see `{} --help`", command.join(" ")));
    }
    Exit::Usage
}

fn complain(line: &str) {
    // Where stderr is closed the exit code has to do.
    let _ = writeln!(io::stderr(), "omerta: {line}");
}

/// Whatever made a command fail.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// `omerta guard`.
    #[error(transparent)]
    Guard(#[from] guard::GuardCommandError),
    /// `omerta image`.
    #[error(transparent)]
    Image(#[from] image::ImageError),
    /// `omerta vm`.
    #[error(transparent)]
    Vm(#[from] vm::VmError),
    /// `omerta peer`.
    #[error(transparent)]
    Peer(#[from] peer::PeerError),
    /// `omerta events`.
    #[error(transparent)]
    Events(#[from] events::EventsError),
    /// `omerta capture`.
    #[error(transparent)]
    Capture(#[from] capture::CaptureError),
    /// `omerta incident`.
    #[error(transparent)]
    Incident(#[from] incident::IncidentError),
    /// `omerta doctor`.
    #[error(transparent)]
    Doctor(#[from] doctor::DoctorError),
    /// `omerta version`.
    #[error(transparent)]
    Version(#[from] version::VersionError),
    /// `omerta completions`, `omerta man`.
    #[error(transparent)]
    Manual(#[from] manual::ManualError),
    /// No event loop.
    #[error("cannot start the event loop")]
    Runtime {
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl Failure {
    fn exit(&self) -> Exit {
        match self {
            Self::Guard(error) => error.exit(),
            Self::Image(error) => error.exit(),
            Self::Vm(error) => error.exit(),
            Self::Peer(error) => error.exit(),
            Self::Events(error) => error.exit(),
            Self::Capture(error) => error.exit(),
            Self::Incident(error) => error.exit(),
            Self::Doctor(_) | Self::Version(_) | Self::Manual(_) | Self::Runtime { .. } => {
                Exit::Failed
            }
        }
    }

    /// Whether standard output was closed by its reader.
    fn is_broken_pipe(&self) -> bool {
        let output = match self {
            Self::Guard(guard::GuardCommandError::Output(error))
            | Self::Image(image::ImageError::Output(error))
            | Self::Vm(vm::VmError::Output(error))
            | Self::Peer(peer::PeerError::Output(error))
            | Self::Events(events::EventsError::Output(error))
            | Self::Capture(capture::CaptureError::Output(error))
            | Self::Incident(incident::IncidentError::Output(error))
            | Self::Doctor(doctor::DoctorError::Output(error))
            | Self::Version(version::VersionError::Output(error))
            | Self::Manual(manual::ManualError::Output(error)) => error,
            _ => return false,
        };
        output.kind() == io::ErrorKind::BrokenPipe
    }
}
