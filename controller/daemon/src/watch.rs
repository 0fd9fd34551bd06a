//! Watching guards: the events of each, and what the programs that judge for all say of their own failures.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use omerta_dataplane::{AtUplink, EventStream, FrameEvent, Guard, GuardError, Prepared, Uplink};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::coop::consume_budget;

use crate::failure::report;

/// The events of one guard, as they come.
pub(crate) struct Watch {
    events: AsyncFd<EventStream>,
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
    #[error("cannot open the log of the guards' programs")]
    Log(#[source] GuardError),
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
            events: awaited(guard.events().map_err(WatchError::Open)?)?,
            _at_uplink: at_uplink,
        })
    }

    /// The next dropped frame. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Result<FrameEvent, WatchError> {
        loop {
            // A guest that never lets its ring run empty must not keep a thread for itself.
            consume_budget().await;
            // It is read without waiting, so none is lost where this is cancelled.
            let mut ready = self.events.readable_mut().await.map_err(WatchError::Wait)?;
            // Readiness is kept until the ring is found empty: the kernel signals only a ring that was.
            match ready.get_inner_mut().next() {
                Some(frame) => return Ok(frame),
                None => ready.clear_ready(),
            }
        }
    }
}

/// Logs what the programs that judge for the guests say of their own failures, for ever.
pub(crate) async fn log_diagnostics(programs: &Prepared) -> Result<Infallible, WatchError> {
    let mut diagnostics = awaited(programs.diagnostics().map_err(WatchError::Log)?)?;
    loop {
        let mut ready = diagnostics.readable_mut().await.map_err(WatchError::Wait)?;
        // Cleared first: what comes while it is read makes it ready again.
        ready.clear_ready();
        for told in ready.get_inner_mut().read() {
            let tap = told.interface.as_deref().unwrap_or("-");
            tracing::warn!(tap, "the guards' programs say: {}", told.line);
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
