//! The canary: one frame with a forged source, sent into the tap as the guest would send it. The
//! guard is proven only if it counts exactly one more dropped forgery.

use std::time::Duration;

use omerta_dataplane::{Guard, GuardError};
use omerta_verdict::{Mac, Reason};
use tokio::time::{Instant, sleep};

use crate::TapError;
use crate::tap::Tap;

/// How long the guard may take to count a frame that was sent in the same moment.
const DEADLINE: Duration = Duration::from_secs(1);

/// IEEE 802's first EtherType for local experiments: should the guard fail, no host stack and no
/// switch does anything with the frame.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Why the canary did not prove the guard.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// The frame could not be sent.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The guard's counters or events could not be read.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The guard did not see the frame, or did not drop it for its source.
    #[error(
        "the guard of {interface} is not working: of one frame with a forged source it dropped {dropped}; the guest stays stopped"
    )]
    NotDropped {
        /// The tap.
        interface: String,
        /// By how much the counter of forged sources rose; 1 is right.
        dropped: u64,
    },
}

/// Sends the canary and waits until the guard has dropped it.
pub(crate) async fn prove(
    tap: &Tap,
    guard: &Guard,
    guest: Mac,
    gateway: Mac,
) -> Result<(), CanaryError> {
    let before = forged_sources_dropped(guard)?;
    let frame = frame(guest, gateway);
    tap.send_as_guest(&frame)?;
    let deadline = Instant::now() + DEADLINE;
    let dropped = loop {
        // The guest has not run, so nobody else can raise this counter.
        let dropped = forged_sources_dropped(guard)?.wrapping_sub(before);
        if dropped != 0 || Instant::now() >= deadline {
            break dropped;
        }
        sleep(Duration::from_millis(2)).await;
    };
    if dropped != 1 {
        return Err(CanaryError::NotDropped {
            interface: guard.interface().to_owned(),
            dropped,
        });
    }
    swallow_event(guard, &frame)?;
    Ok(())
}

/// Takes the canary's own event, so that whoever reads the guard's events next sees only the
/// guest's.
fn swallow_event(guard: &Guard, frame: &[u8]) -> Result<(), GuardError> {
    let mut events = guard.events()?;
    while let Some(event) = events.next() {
        if !frame.starts_with(&event.head) {
            tracing::warn!(frame = event.describe(), "a frame before the guest has run");
        }
    }
    Ok(())
}

fn forged_sources_dropped(guard: &Guard) -> Result<u64, GuardError> {
    Ok(guard
        .counters()?
        .egress
        .dropped_for(Reason::SourceMac)
        .packets)
}

/// The smallest Ethernet frame, from a neighbour of the guest's MAC to the gateway.
fn frame(guest: Mac, gateway: Mac) -> Vec<u8> {
    let Mac([a, b, c, d, e, last]) = guest;
    let mut frame = Vec::with_capacity(60);
    frame.extend_from_slice(&gateway.0);
    frame.extend_from_slice(&[a, b, c, d, e, last ^ 0x01]);
    frame.extend_from_slice(&ETHERTYPE);
    frame.extend_from_slice(b"omerta canary");
    frame.resize(60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canary_is_forged_in_its_source_alone() {
        let guest = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        let gateway = Mac([0x56, 0x54, 0, 0x12, 0x34, 0x56]);
        let frame = frame(guest, gateway);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], gateway.0);
        let source = Mac(frame[6..12].try_into().unwrap());
        assert!(source.is_unicast());
        assert_ne!(source, guest);
        assert_ne!(source, gateway);
    }
}
