//! Tells at once when it is time to look at a guard.

use std::io;

use omerta_dataplane::Occasions;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The occasions to look at one guard.
#[derive(Debug)]
pub(crate) struct GuardAlarm(AsyncFd<Occasions>);

impl GuardAlarm {
    /// Listens to what `GuardWatch::occasions` of the dataplane gave.
    pub(crate) fn of(occasions: Occasions) -> io::Result<Self> {
        // SAFETY: Occasions keep one descriptor open until it is dropped, which here is with the
        // AsyncFd, and always gives the same number.
        let registered = unsafe { AsyncFd::register_with_interest(occasions, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Waits until it is time to look. Safe to cancel.
    pub(crate) async fn rung(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            if ready.get_inner().take()? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }
}
