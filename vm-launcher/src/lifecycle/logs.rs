//! A running guest's logs, held to their length and listened to. QEMU appends to them itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::GuestEvent;
use crate::console_log::{ConsoleLog, ConsoleReader};
use crate::jail::MAX_LOG_BYTES;
use crate::run_dir::RunFiles;

/// What is printed on the console, and what QEMU itself prints.
#[derive(Debug)]
pub(super) struct Logs {
    console: ConsoleLog,
    /// Only the task that holds them looks, one after the other.
    reader: Arc<Mutex<ConsoleReader>>,
    /// How much was in the console's log at the last look.
    seen: Arc<AtomicU64>,
    qemu: PathBuf,
    /// The disk may keep it waiting, and nothing else of the guest.
    holding: Option<JoinHandle<()>>,
}

impl Logs {
    pub(super) fn of(files: &RunFiles) -> Self {
        let console = ConsoleLog::at(&files.console_log);
        Self {
            reader: Arc::new(Mutex::new(ConsoleReader::of(console.clone()))),
            seen: Arc::new(AtomicU64::new(console.length())),
            console,
            qemu: files.qemu_log.clone(),
            holding: None,
        }
    }

    /// The console's, and how much of it is read.
    pub(super) fn console(&self) -> (ConsoleLog, Arc<AtomicU64>) {
        (self.console.clone(), Arc::clone(&self.seen))
    }

    /// Begins to shorten what is long, and to read what the guest has printed since; `events` are told what is heard
    /// there.
    pub(super) fn hold(&mut self, events: &mpsc::Sender<GuestEvent>) {
        let is_busy = |task: &JoinHandle<()>| !task.is_finished();
        if self.holding.as_ref().is_some_and(is_busy) {
            return;
        }
        let length = self.console.length();
        if length == self.seen.load(Ordering::Relaxed) && !self.qemu_is_long() {
            return;
        }
        self.seen.store(length, Ordering::Relaxed);
        let (reader, qemu) = (Arc::clone(&self.reader), self.qemu.clone());
        // A disk that keeps this waiting must not keep the end of the events waiting.
        let events = events.downgrade();
        self.holding = Some(spawn_blocking(move || {
            let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
            let looked = reader.look().map(|heard| {
                let (Some(heard), Some(events)) = (heard, events.upgrade()) else {
                    return;
                };
                // Told again once there is twice as much: nothing waits for a slow reader.
                if let Err(error) = events.try_send(GuestEvent::ConsoleHeard(heard)) {
                    tracing::warn!(%error, "guest event dropped");
                }
            });
            if let Err(error) = looked.and(cut(&qemu)) {
                tracing::warn!(path = %qemu.display(), %error, "cannot read a guest's logs, or hold them to their length");
            }
        }));
    }

    fn qemu_is_long(&self) -> bool {
        let log = self.qemu.symlink_metadata();
        log.is_ok_and(|log| log.len() > MAX_LOG_BYTES)
    }
}

/// Cuts a log at its most: its start stays, which says why a QEMU does not do what it should.
fn cut(path: &Path) -> io::Result<()> {
    let log = File::options()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    if log.metadata()?.len() > MAX_LOG_BYTES {
        log.set_len(MAX_LOG_BYTES)?;
    }
    Ok(())
}
