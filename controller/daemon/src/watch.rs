//! Watching one guard: its events, and what its programs say of their own failures.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use omerta_dataplane::{
    AtUplink, DiagnosticStream, EventStream, FrameEvent, Guard, GuardError, Uplink,
};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::coop::consume_budget;

use crate::failure::report;

/// The events of one guard, as they come.
pub(crate) struct Watch {
    guest: String,
    events: AsyncFd<EventStream>,
    diagnostics: AsyncFd<DiagnosticStream>,
    /// Until it is dropped, what is for none of the guest's endpoints ends at the uplink.
    _at_uplink: Option<AtUplink>,
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
    /// Begins to watch the guard of `guest`, and has what it would drop for its endpoint dropped at
    /// `uplink` already.
    pub(crate) fn open(
        guest: &str,
        guard: &Guard,
        uplink: Option<&Arc<Uplink>>,
    ) -> Result<Self, WatchError> {
        let at_uplink = uplink.and_then(|uplink| {
            let entered = uplink.enter(guard);
            entered
                .inspect_err(|error| {
                    let error = report(error);
                    tracing::warn!(
                        guest,
                        "all that is for it comes as far as its guard: {error}"
                    );
                })
                .ok()
        });
        Ok(Self {
            guest: guest.to_owned(),
            events: awaited(guard.events().map_err(WatchError::Open)?)?,
            diagnostics: awaited(guard.diagnostics().map_err(WatchError::Open)?)?,
            _at_uplink: at_uplink,
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
