//! A bar for what takes longer than a moment, where a person looks at it.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// What takes no longer shows nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// How much of the work is done.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: u64,
    done: u64,
    begun: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing is done yet of `total` bytes.
    pub fn new(what: &'static str, total: u64) -> Self {
        Self {
            what,
            total,
            done: 0,
            begun: Instant::now(),
            bar: None,
        }
    }

    /// So many bytes more are done.
    pub fn saw(&mut self, length: u64) {
        self.done = self.done.saturating_add(length);
        if self.bar.is_none() && self.begun.elapsed() >= PATIENCE {
            // On standard error, and nothing where that is no terminal.
            let bar = ProgressBar::new(self.total).with_message(self.what);
            if let Ok(style) = ProgressStyle::with_template(
                "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}",
            ) {
                bar.set_style(style);
            }
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
