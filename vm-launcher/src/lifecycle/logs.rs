//! A running guest's logs, held to their length. QEMU appends to them itself.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tokio::task::{JoinHandle, spawn_blocking};

use crate::console_log::ConsoleLog;
use crate::jail::MAX_LOG_BYTES;
use crate::run_dir::RunFiles;

/// What is printed on the console, and what QEMU itself prints.
#[derive(Debug)]
pub(super) struct Logs {
    console: ConsoleLog,
    qemu: PathBuf,
    /// The disk may keep it waiting, and nothing else of the guest.
    holding: Option<JoinHandle<()>>,
    looks: u32,
}

/// How many looks there are to one at QEMU's own log.
const SELDOM: u32 = 64;

impl Logs {
    pub(super) fn of(files: &RunFiles) -> Self {
        Self {
            console: ConsoleLog::at(&files.console_log),
            qemu: files.qemu_log.clone(),
            holding: None,
            looks: 0,
        }
    }

    /// Begins to shorten what is long. QEMU itself says little, so its log is looked at seldom.
    pub(super) fn hold(&mut self) {
        self.looks = self.looks.wrapping_add(1);
        let is_busy = |task: &JoinHandle<()>| !task.is_finished();
        if self.holding.as_ref().is_some_and(is_busy) || !self.any_is_long() {
            return;
        }
        let (console, qemu) = (self.console.clone(), self.qemu.clone());
        self.holding = Some(spawn_blocking(move || {
            let console = if console.is_long() {
                console.rotate()
            } else {
                Ok(())
            };
            if let Err(error) = console.and(cut(&qemu)) {
                tracing::warn!(path = %qemu.display(), %error, "cannot hold a guest's logs to their length");
            }
        }));
    }

    fn any_is_long(&self) -> bool {
        let qemu_is_long = || {
            let log = self.qemu.symlink_metadata();
            log.is_ok_and(|log| log.len() > MAX_LOG_BYTES)
        };
        self.console.is_long() || (self.looks.is_multiple_of(SELDOM) && qemu_is_long())
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
