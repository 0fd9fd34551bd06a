//! Whether a guest's consumer is still there, by what the guest's guard lets in.
//!
//! What comes in comes from the consumer's endpoint, and WireGuard answers nobody who lacks its keys: a tunnel that is up
//! brings a frame every two minutes at least, since the guest's keepalive has both sides make new session keys.

use std::time::Duration;

use omerta_dataplane::{CounterReader, Guard, GuardError};
use omerta_engine::{GuestEvent, OnSilence};
use omerta_tunnel::{Health, Silence, Turn};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use crate::clock;
use crate::host_tunnel::Tunnel;

/// How often is looked. Health counts a gap of ten seconds as ten, and a longer one as ten as well.
const LOOK: Duration = Duration::from_secs(5);

/// What is expected of guests' tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TunnelSettings {
    pub(crate) silence: Silence,
    pub(crate) on_silence: OnSilence,
}

/// The look at one guest's tunnel.
pub(crate) struct TunnelHealth {
    settings: TunnelSettings,
    health: Health,
    source: Source,
    ticks: Interval,
}

/// By what is seen whether anything comes.
enum Source {
    Guard(CounterReader),
    /// A tunnel that omertad keeps: keepalives come no further than that.
    Tunnel(Tunnel),
}

impl Source {
    fn received(&self) -> Option<u64> {
        match self {
            // Counters that cannot be read are those of a guard that is gone, which its watch tells.
            Self::Guard(counters) => Some(counters.read().ok()?.ingress.allowed.bytes),
            Self::Tunnel(tunnel) => Some(tunnel.consumer()?.received_bytes),
        }
    }
}

impl std::fmt::Debug for TunnelHealth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.health.fmt(f)
    }
}

impl TunnelHealth {
    /// Begins to look, where anything is expected. `known` is whether something has come before.
    pub(crate) fn begin(
        settings: TunnelSettings,
        guard: &Guard,
        tunnel: Option<Tunnel>,
        known: bool,
    ) -> Result<Option<Self>, GuardError> {
        if settings.silence == Silence::NONE {
            return Ok(None);
        }
        let source = match tunnel {
            Some(tunnel) => Source::Tunnel(tunnel),
            None => Source::Guard(guard.counter_reader()?),
        };
        let received = source.received().unwrap_or(0);
        let health = Health::new(settings.silence, now(), received);
        let mut ticks = interval_at(Instant::now() + LOOK, LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Some(Self {
            settings,
            health: if known { health.known() } else { health },
            source,
            ticks,
        }))
    }

    /// Forgets how long nothing has come: the guest stood still.
    pub(crate) fn begin_anew(&mut self) {
        self.health = Health::new(self.settings.silence, now(), self.health.received()).known();
    }

    /// The next thing that has become of the tunnel. Safe to cancel.
    pub(crate) async fn next(&mut self) -> GuestEvent {
        loop {
            self.ticks.tick().await;
            // A tunnel of omertad's that does not answer brings nothing, which shows as silence.
            let received = match (self.source.received(), &self.source) {
                (Some(received), _) => received,
                (None, Source::Tunnel(_)) => self.health.received(),
                (None, Source::Guard(_)) => continue,
            };
            let action = self.settings.on_silence;
            match self.health.look(now(), received) {
                None => {}
                // Nothing that it has done can have reached anybody.
                Some(Turn::NeverCame(since)) => return silent(since, true, OnSilence::End),
                Some(Turn::Died(since)) => return silent(since, false, action),
                Some(Turn::Revived) => return GuestEvent::TunnelBack,
            }
        }
    }
}

/// The next thing of a tunnel that is looked at, and nothing ever of one that is not.
pub(crate) async fn next_of(health: &mut Option<TunnelHealth>) -> GuestEvent {
    match health {
        Some(health) => health.next().await,
        None => std::future::pending().await,
    }
}

fn silent(since: Duration, never: bool, action: OnSilence) -> GuestEvent {
    GuestEvent::TunnelSilent {
        seconds: since.as_secs(),
        never,
        action,
    }
}

fn now() -> Duration {
    Duration::from_nanos(clock::now().0)
}
