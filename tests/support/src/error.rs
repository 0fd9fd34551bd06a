//! What can go wrong on the stage.

use std::io;
use std::process::ExitStatus;

/// Why a part of the stage could not be set up or used.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A namespace could not be made, entered or removed.
    #[error("cannot {action} network namespace {name}; this needs root")]
    Namespace {
        /// What was tried.
        action: &'static str,
        /// The namespace's name under /run/netns.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// An interface could not be made, changed, read or written.
    #[error("cannot {action} interface {name}")]
    Interface {
        /// What was tried.
        action: &'static str,
        /// The interface's name.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A setting under /proc/sys could not be written.
    #[error("cannot write {value} to {path}")]
    Setting {
        /// The file.
        path: String,
        /// What should have stood in it.
        value: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program could not be started, signalled or waited for.
    #[error("cannot {action} {program}")]
    Process {
        /// What was tried.
        action: &'static str,
        /// The program's name.
        program: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("`{command}` failed ({status}): {complaint}")]
    Command {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to stderr.
        complaint: String,
    },
}
