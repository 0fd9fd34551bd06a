//! The log, written by a thread of its own: whoever reads standard error may stop reading, and no
//! guest's task may wait for that.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// How many lines wait to be written; more are left out and counted.
const BACKLOG: usize = 1024;
/// How long the last lines may take to be written.
const LAST_DEADLINE: Duration = Duration::from_secs(1);

enum Item {
    Line(Vec<u8>),
    /// Everything before is to be written, then this dropped.
    Flush(SyncSender<()>),
}

/// Hands lines over to the thread that writes them.
#[derive(Clone)]
pub(crate) struct Log {
    items: SyncSender<Item>,
    left_out: Arc<AtomicU64>,
}

impl Log {
    /// A log on standard error.
    pub(crate) fn begin() -> io::Result<Self> {
        let (items, received) = sync_channel(BACKLOG);
        let left_out = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&left_out);
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || write(&received, &counted))?;
        Ok(Self { items, left_out })
    }

    /// Adds a last line and waits until all are written, or for a moment where nobody reads them.
    pub(crate) fn end(mut self, line: Option<&str>) {
        if let Some(line) = line {
            let _ = self.write(format!("{line}\n").as_bytes());
        }
        let (done, written) = sync_channel(0);
        if self.items.try_send(Item::Flush(done)).is_ok() {
            let _ = written.recv_timeout(LAST_DEADLINE);
        }
    }
}

fn write(items: &Receiver<Item>, left_out: &AtomicU64) {
    let mut out = io::stderr();
    for item in items {
        let lost = left_out.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(out, "omertad: {lost} lines of the log are missing here");
        }
        match item {
            // There is nobody to be told that the log cannot be written.
            Item::Line(line) => drop(out.write_all(&line)),
            Item::Flush(done) => drop(done),
        }
    }
}

impl Write for Log {
    /// Takes one whole line, as `tracing-subscriber` hands it over.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.items.try_send(Item::Line(line.to_vec())).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
