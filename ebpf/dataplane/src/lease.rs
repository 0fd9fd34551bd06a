//! Until when a guard lets anything pass at all: one word that programs compare with the clock.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::GuardError;
use crate::pins::Pins;
use crate::store::state_of;

/// What is left of a guard's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Lease {
    /// Whether it has ended: everything is dropped until it is renewed.
    pub expired: bool,
    /// How long it lasts yet, in whole seconds, rounded up.
    pub remaining_seconds: u64,
}

/// The word that says when a lease ends that begins now; 0 is for ever.
pub fn word(interface: &str, lease: Option<Duration>) -> Result<u64, GuardError> {
    let Some(lease) = lease else { return Ok(0) };
    let length = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
    Ok(now_ns(interface)?.saturating_add(length))
}

/// Has the lease of the guard of `pins` end at `word`.
pub fn write(interface: &str, pins: &Pins, word: u64) -> Result<(), GuardError> {
    state_of(interface, pins)?.set_lease_until_ns(word);
    Ok(())
}

/// The lease of the guard of `pins`.
pub fn read(interface: &str, pins: &Pins) -> Result<Option<Lease>, GuardError> {
    let until = state_of(interface, pins)?.lease_until_ns();
    if until == 0 {
        return Ok(None);
    }
    let left = until.saturating_sub(now_ns(interface)?);
    Ok(Some(Lease {
        expired: left == 0,
        remaining_seconds: left.div_ceil(1_000_000_000),
    }))
}

/// The programs' clock.
fn now_ns(interface: &str) -> Result<u64, GuardError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|errno| GuardError::System {
        action: "read the clock",
        interface: interface.to_owned(),
        source: errno.into(),
    })?;
    Ok(u64::try_from(Duration::from(now).as_nanos()).unwrap_or(u64::MAX))
}
