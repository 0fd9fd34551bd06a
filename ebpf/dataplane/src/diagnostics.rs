//! What fails in a guard's programs, as they tell it by aya-log.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::GuardError;
use crate::failure_line::line;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};

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
