//! What fails in the programs that judge, as they tell it by aya-log.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bpffs::failed;
use crate::failure_line::line;
use crate::object::program_name;
use crate::pins::Pins;
use crate::{GuardError, link};
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use omerta_verdict::Direction;

/// The map that aya-log makes.
pub(crate) const RING: &str = "AYA_LOGS";

/// Lines that were told, each with the place of the guard that it is about.
type Told = Arc<Mutex<Vec<(Option<u32>, String)>>>;

/// A failure that programs told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The name that the interface had when it was guarded; `None` where its guard is gone.
    pub interface: Option<String>,
    /// What failed, in one line.
    pub line: String,
}

/// Reads what the programs that judge say of their own failures, whichever guard they judged for.
/// Readiness of its descriptor says that there may be something.
pub struct DiagnosticStream {
    logger: EbpfLogger<Lines>,
    told: Told,
    /// Where the programs are pinned.
    directory: PathBuf,
}

impl DiagnosticStream {
    /// That of the programs that are pinned in `directory`.
    pub(crate) fn of(directory: PathBuf) -> Result<Self, GuardError> {
        let path = directory.join(program_name(Direction::Egress));
        let program = link::program_id(&path).map_err(failed("read the program", &path))?;
        let told = Told::default();
        let logger = EbpfLogger::init_from_id_with_logger(program, Lines(Arc::clone(&told)))
            .map_err(|source| {
                failed("open the log of the program", &path)(io::Error::other(source))
            })?;
        Ok(Self {
            logger,
            told,
            directory,
        })
    }

    /// What was said since the last time.
    pub fn read(&mut self) -> Vec<Diagnostic> {
        self.logger.flush();
        let told = std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        told.into_iter()
            .map(|(place, line)| Diagnostic {
                interface: place.and_then(|place| Pins::at_place(&self.directory, place)),
                line,
            })
            .collect()
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
struct Lines(Told);

impl Log for Lines {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.push(line(record.args().to_string()));
    }

    fn flush(&self) {}
}
