//! The record of incidents, written by a thread of its own: no guest's pause or end waits for a disk, and
//! a disk that is full or does not answer stops neither.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use omerta_engine::Monotonic;
use omerta_incidents::{Book, BookError, Bounds, Fault, What, read};

use crate::cases::Cases;
use crate::clock;
use crate::failure::report;

/// How many entries wait to be written; more are left out and counted.
const BACKLOG: usize = 512;
/// How long the last entries may take to be written.
const LAST_DEADLINE: Duration = Duration::from_secs(2);
/// Where the record is, in the state directory.
pub(crate) const DIRECTORY: &str = "incidents";

/// Why the record is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("the record of incidents")]
    Book(#[from] BookError),
    #[error("the record of incidents")]
    Read(#[from] Fault),
}

enum Item {
    Entry(Monotonic, What),
    /// Everything before is to be written, then this dropped.
    Flush(SyncSender<()>),
}

/// Hands entries over to the thread that writes them.
#[derive(Clone, Debug)]
pub(crate) struct Incidents {
    items: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

impl Incidents {
    /// Opens the record below `state_dir`, and tells what it says of guests so far.
    ///
    /// # Errors
    /// Where it cannot be made or read: an omertad that cannot record begins no work.
    pub(crate) fn open(state_dir: &Path, bounds: Bounds) -> Result<(Self, Cases), RecordError> {
        let directory = state_dir.join(DIRECTORY);
        let program = concat!("omertad ", env!("CARGO_PKG_VERSION"));
        let book = Book::open(&directory, bounds, program, &clock::rfc3339(clock::now()))?;
        let mut cases = Cases::default();
        read(&directory, |entry| cases.read(entry))?;
        let (items, received) = sync_channel(BACKLOG);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        std::thread::Builder::new()
            .name("incidents".into())
            .spawn(move || write(book, &received, &counted))
            .map_err(|source| BookError::Io {
                action: "start the thread that writes",
                path: directory,
                source,
            })?;
        Ok((Self { items, lost }, cases))
    }

    /// Has `what` recorded, as written at `at`. Never waits.
    pub(crate) fn record(&self, at: Monotonic, what: What) {
        if self.items.try_send(Item::Entry(at, what)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
            tracing::error!("an incident is not recorded: its disk does not keep up");
        }
    }

    /// Entries that could not be recorded.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until all is written, or for a moment where the disk does not answer.
    pub(crate) fn finish(&self) {
        let (done, written) = sync_channel(0);
        if self.items.try_send(Item::Flush(done)).is_ok() {
            let _ = written.recv_timeout(LAST_DEADLINE);
        }
    }
}

fn write(mut book: Book, items: &Receiver<Item>, lost: &AtomicU64) {
    let mut told = 0;
    for item in items {
        let (at, what) = match item {
            Item::Entry(at, what) => (clock::rfc3339(at), what),
            Item::Flush(done) => {
                drop(done);
                continue;
            }
        };
        // How many are missing is said before what follows.
        let entries = lost.load(Ordering::Relaxed) - told;
        if entries > 0 && book.append(&at, What::Lost { entries }).is_ok() {
            told += entries;
        }
        if let Err(error) = book.append(&at, what) {
            lost.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                error = report(&error),
                "an incident is not recorded; guests are paused and ended all the same"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use omerta_incidents::verify;

    use super::*;

    fn entry() -> What {
        What::Damaged {
            problem: "anything".into(),
        }
    }

    #[test]
    fn a_disk_that_takes_nothing_is_counted_and_told_in_the_record_once_it_does() {
        let state = tempfile::tempdir().unwrap();
        let directory = state.path().join(DIRECTORY);
        // Each entry needs a file of its own, whose place is taken.
        let bounds = Bounds {
            segment_bytes: 1,
            segments: 100,
        };
        let (incidents, _) = Incidents::open(state.path(), bounds).unwrap();
        incidents.record(clock::now(), entry());
        incidents.finish();
        let place = directory.join(format!("{:020}.ndjson", 2));
        fs::create_dir(&place).unwrap();
        for _ in 0..3 {
            incidents.record(clock::now(), entry());
        }
        incidents.finish();
        assert_eq!(incidents.lost(), 3);
        fs::remove_dir(&place).unwrap();
        incidents.record(clock::now(), entry());
        incidents.finish();
        let found = verify(&directory).unwrap();
        assert_eq!((found.last, found.lost), (3, 3));
    }
}
