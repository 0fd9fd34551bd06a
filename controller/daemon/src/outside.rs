//! What the host itself shows of guests, whatever their guards and they themselves say: that guards have judged every frame
//! that taps have received, and that nothing of the host's but its own is towards a guest. One tick for all guests.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use omerta_dataplane::{CounterReader, Guard, GuardError};
use omerta_engine::GuestEvent;
use omerta_vm_launcher::{HostLook, Spec, Whereabouts};
use tokio::time::{MissedTickBehavior, interval};

use crate::failure::report;
use crate::fleet::Fleet;

/// How often is looked.
const LOOK: Duration = Duration::from_secs(15);
/// So many frames may be counted by a tap before its guard has judged them.
const IN_FLIGHT: u64 = 64;

/// Of one guest.
struct Watched {
    counters: CounterReader,
    /// Frames of the tap's that the guard has not counted: those of a life before, where omertad took the guest over and
    /// its counters began anew.
    since: u64,
    /// Whether the last look found more.
    has_missed: bool,
    /// Bounded by what root on this host does.
    told: BTreeSet<String>,
}

/// Looks for as long as omertad runs.
pub(crate) async fn watch(fleet: Arc<Fleet>) {
    let mut watched = HashMap::new();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let guests = fleet.judged();
        watched.retain(|id, _| guests.iter().any(|(judged, _)| judged == id));
        if guests.is_empty() {
            continue;
        }
        let look = match HostLook::take().await {
            Ok(look) => look,
            Err(error) => {
                tracing::error!(
                    error = report(&error),
                    "what the host has towards its guests cannot be seen"
                );
                continue;
            }
        };
        for (id, spec) in guests {
            // A guest without a tap is ending, which its watch tells.
            let Some((tap, received)) = look.tap(&spec.tap) else {
                continue;
            };
            let found = match watched.entry(id) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => match begin(&spec, received) {
                    Ok(begun) => entry.insert(begun),
                    // As is one without a guard.
                    Err(_) => continue,
                },
            };
            let whereabouts = Whereabouts {
                address: spec.address,
                mac: spec.mac,
                tap,
            };
            for event in found.look(received, look.strange(whereabouts)) {
                fleet.found(id, event);
            }
            // Guests are many, and none waits for all of them.
            tokio::task::yield_now().await;
        }
    }
}

fn begin(spec: &Spec, received: u64) -> Result<Watched, GuardError> {
    let counters = Guard::open(&spec.tap)?.counter_reader()?;
    let judged = counters.read()?.egress.rx().packets;
    Ok(Watched {
        counters,
        since: received.saturating_sub(judged),
        has_missed: false,
        told: BTreeSet::new(),
    })
}

impl Watched {
    /// What is to be told of a look that found so many frames received, and this towards the guest. Once each.
    fn look(&mut self, received: u64, mut strange: Vec<String>) -> Vec<GuestEvent> {
        // Counters that cannot be read are those of a guard that is gone.
        if self.counters.is_current()
            && let Ok(counters) = self.counters.read()
        {
            let misses = is_missing(received, counters.egress.rx().packets, self.since);
            // Once may be bad luck.
            if misses && self.has_missed {
                strange
                    .push("a tap that receives frames which its guard does not judge".to_owned());
            }
            self.has_missed = misses;
        }
        strange.retain(|line| self.told.insert(line.clone()));
        strange.into_iter().map(GuestEvent::FoundOutside).collect()
    }
}

/// Whether frames that a tap had received before its guard's counters were read are missing there. A guard that has counted
/// more has judged what came meanwhile.
const fn is_missing(received: u64, judged: u64, since: u64) -> bool {
    received.saturating_sub(judged).saturating_sub(since) > IN_FLIGHT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_a_tap_received_and_its_guard_did_not_judge_are_missed() {
        assert!(!is_missing(1000, 1000, 0));
        // Some came while it was looked.
        assert!(!is_missing(1000, 5000, 0));
        assert!(!is_missing(1000 + IN_FLIGHT, 1000, 0));
        assert!(is_missing(1001 + IN_FLIGHT, 1000, 0));
        // Its counters began anew with another omertad.
        assert!(!is_missing(900_000, 100, 899_900));
        assert!(is_missing(901_000, 100, 899_900));
    }
}
