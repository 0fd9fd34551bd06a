//! Tells at once when it is time to look at a guard.

use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The occasions to look at one guard.
#[derive(Debug)]
pub(crate) struct GuardAlarm(AsyncFd<OwnedFd>);

impl GuardAlarm {
    /// Listens to what `GuardWatch::occasions` of the dataplane gave.
    pub(crate) fn of(occasions: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd keeps one descriptor open until it is dropped, which here is with the
        // AsyncFd, and always gives the same number.
        let registered = unsafe { AsyncFd::register_with_interest(occasions, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Waits until it is time to look. Safe to cancel.
    pub(crate) async fn rung(&mut self) -> io::Result<()> {
        let mut heard = [0u8; 4096];
        loop {
            let mut ready = self.0.readable().await?;
            match nix::unistd::read(ready.get_inner(), &mut heard) {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
