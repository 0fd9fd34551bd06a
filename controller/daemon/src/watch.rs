//! Watching one guard's events.

use std::io;

use omerta_dataplane::{EventStream, FrameEvent, Guard, GuardError};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::coop::consume_budget;

/// The events of one guard, as they come.
pub(crate) struct Watch(AsyncFd<EventStream>);

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
    /// Begins to watch.
    #[allow(unsafe_code)]
    pub(crate) fn open(guard: &Guard) -> Result<Self, WatchError> {
        let events = guard.events().map_err(WatchError::Open)?;
        // SAFETY: the stream owns its ring buffer's descriptor, which stays open and the same
        // until the stream is dropped; the `AsyncFd` owns the stream.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }
            .map_err(|error| WatchError::Wait(error.into()))?;
        Ok(Self(events))
    }

    /// The next dropped frame. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Result<FrameEvent, WatchError> {
        loop {
            // A guest that never lets its ring run empty must not keep a thread for itself.
            consume_budget().await;
            let mut ready = self.0.readable_mut().await.map_err(WatchError::Wait)?;
            // Readiness is kept until the ring is found empty: the kernel signals only a ring
            // that was.
            match ready.get_inner_mut().next() {
                Some(frame) => return Ok(frame),
                None => ready.clear_ready(),
            }
        }
    }
}
