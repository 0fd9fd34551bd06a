//! Ctrl-C, SIGTERM and SIGHUP: noted when they come, acted on at the next wait, so that everything
//! set up so far is taken down in order.

use std::fmt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// How long a wait may overlook a signal.
const SLICE: Duration = Duration::from_millis(20);

/// The program was asked to end.
#[derive(Debug)]
pub struct Interrupted(Signal);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted by {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

extern "C" fn note(signal: nix::libc::c_int) {
    RECEIVED.store(signal, Ordering::Relaxed);
}

/// From here on, signals are noted instead of ending the program.
pub fn install() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }
            .with_context(|| format!("cannot watch for {signal}"))?;
    }
    Ok(())
}

/// Fails once a signal has come.
pub fn check() -> Result<()> {
    match Signal::try_from(RECEIVED.load(Ordering::Relaxed)) {
        Ok(signal) => Err(Interrupted(signal).into()),
        Err(_) => Ok(()),
    }
}

/// Sleeps, unless a signal comes.
pub fn sleep(duration: Duration) -> Result<()> {
    let deadline = Instant::now() + duration;
    loop {
        check()?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(SLICE));
    }
}
