//! What fails in a guard's programs, as they tell it by aya-log.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use omerta_verdict::Failure;

use crate::GuardError;

/// The map that aya-log makes.
pub(crate) const RING: &str = "AYA_LOGS";

/// Reads what the programs of one guard say of their own failures. Readiness of its descriptor says
/// that there may be something.
pub struct DiagnosticStream {
    logger: EbpfLogger<Lines>,
    lines: Arc<Mutex<Vec<String>>>,
}

impl DiagnosticStream {
    /// That of the guard one of whose programs is `program`.
    pub(crate) fn of(interface: &str, program: u32) -> Result<Self, GuardError> {
        let lines = Arc::default();
        let logger = EbpfLogger::init_from_id_with_logger(program, Lines(Arc::clone(&lines)))
            .map_err(|source| GuardError::System {
                action: "open the log of the programs",
                interface: interface.to_owned(),
                source: io::Error::other(source),
            })?;
        Ok(Self { logger, lines })
    }

    /// What was said since the last time, each failure in one line.
    pub fn read(&mut self) -> Vec<String> {
        self.logger.flush();
        std::mem::take(&mut *self.lines.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for DiagnosticStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.logger.as_fd()
    }
}

impl AsRawFd for DiagnosticStream {
    fn as_raw_fd(&self) -> RawFd {
        self.logger.as_raw_fd()
    }
}

/// Takes lines from aya-log, which hands them to a logger.
struct Lines(Arc<Mutex<Vec<String>>>);

impl Log for Lines {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(line(record.args().to_string()));
    }

    fn flush(&self) {}
}

/// In words what a program told, a failure's number and an error's; as it is where it told anything
/// else.
fn line(told: String) -> String {
    let numbers = told.split_once(' ').and_then(|(failure, error)| {
        let failure: usize = failure.parse().ok()?;
        Some((Failure::ALL.get(failure)?.words(), error.parse().ok()?))
    });
    match numbers {
        Some((words, 0_i64)) => words.to_owned(),
        Some((words, error)) => {
            let error = i32::try_from(error.unsigned_abs()).map(io::Error::from_raw_os_error);
            match error {
                Ok(error) => format!("{words}: {error}"),
                Err(_) => told,
            }
        }
        None => told,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_in_words_with_the_error_of_the_helper() {
        let line = |told: &str| line(told.to_owned());
        assert_eq!(
            line("0 -12"),
            "a frame could not be made readable: Cannot allocate memory (os error 12)"
        );
        assert_eq!(
            line("2 0"),
            "no room for the event of a frame: events are lost"
        );
        assert_eq!(line("3 -12"), "3 -12");
        assert_eq!(line("something else"), "something else");
    }
}
