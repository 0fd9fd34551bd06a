//! Watching one guard: its events, and what its programs say of their own failures.

use std::io;
use std::os::fd::AsFd;

use omerta_dataplane::{DiagnosticStream, EventStream, FrameEvent, Guard, GuardError};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::coop::consume_budget;

/// The events of one guard, as they come.
pub(crate) struct Watch {
    guest: String,
    events: AsyncFd<EventStream>,
    diagnostics: AsyncFd<DiagnosticStream>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

/// Why a guard cannot be watched.
#[derive(Debug, Error)]
pub(crate) enum WatchError {
    #[error("cannot open the guard's events")]
    Open(#[source] GuardError),
    #[error("cannot wait for the guard's events")]
    Wait(#[source] io::Error),
}

impl Watch {
    /// Begins to watch the guard of `guest`.
    pub(crate) fn open(guest: &str, guard: &Guard) -> Result<Self, WatchError> {
        Ok(Self {
            guest: guest.to_owned(),
            events: awaited(guard.events().map_err(WatchError::Open)?)?,
            diagnostics: awaited(guard.diagnostics().map_err(WatchError::Open)?)?,
        })
    }

    /// The next dropped frame; logs what the programs say meanwhile. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Result<FrameEvent, WatchError> {
        loop {
            // A guest that never lets its ring run empty must not keep a thread for itself.
            consume_budget().await;
            // Either is read without waiting, so none is lost where this is cancelled.
            tokio::select! {
                // The programs tell little, by a rate of their own; frames never run out.
                biased;
                ready = self.diagnostics.readable_mut() => {
                    let mut ready = ready.map_err(WatchError::Wait)?;
                    // Cleared first: what comes while it is read makes it ready again.
                    ready.clear_ready();
                    for line in ready.get_inner_mut().read() {
                        tracing::warn!(guest = self.guest, "the guard's program says: {line}");
                    }
                }
                ready = self.events.readable_mut() => {
                    let mut ready = ready.map_err(WatchError::Wait)?;
                    // Readiness is kept until the ring is found empty: the kernel signals only a
                    // ring that was.
                    match ready.get_inner_mut().next() {
                        Some(frame) => return Ok(frame),
                        None => ready.clear_ready(),
                    }
                }
            }
        }
    }
}

/// A ring of a guard's, to be waited for.
#[allow(unsafe_code)]
fn awaited<R: AsFd + std::os::fd::AsRawFd>(ring: R) -> Result<AsyncFd<R>, WatchError> {
    // SAFETY: a stream owns its ring buffer's descriptor, which stays open and the same until the
    // stream is dropped; the `AsyncFd` owns the stream.
    unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
        .map_err(|error| WatchError::Wait(error.into()))
}
