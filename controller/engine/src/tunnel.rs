//! What is known of a guest's tunnel, and which changes of it are told.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZero;

use serde::{Deserialize, Serialize};

use crate::Monotonic;

/// By whose word something is known of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Witness {
    /// The device that the host keeps.
    Host,
    /// The guest, which may say what it likes.
    Guest,
}

impl Witness {
    /// Every one.
    pub const ALL: [Self; 2] = [Self::Host, Self::Guest];

    /// The word used in JSON, metrics and listings.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Guest => "guest",
        }
    }
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What a witness says of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelReport {
    /// Who says so.
    pub witness: Witness,
    /// When the latest handshake was, if there was one.
    pub handshake: Option<Monotonic>,
    /// Where it sends.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between packets that only keep the way open.
    pub keepalive: Option<NonZero<u16>>,
    /// Bytes sent to the consumer, WireGuard's own among them.
    pub sent_bytes: u64,
    /// Bytes received from the consumer.
    pub received_bytes: u64,
}

/// What a tunnel's latest handshake is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Freshness {
    /// There was none yet.
    Awaited,
    /// Its keys are in use.
    Fresh,
    /// Its keys are used no more, and no other handshake has come.
    Stale,
}

impl Freshness {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Awaited, Self::Fresh, Self::Stale];
    /// WireGuard's `REJECT_AFTER_TIME`: for how long keys are used, in nanoseconds.
    const KEYS_LIVE: u64 = 180 * Monotonic::SECOND;

    /// The word used in JSON and listings.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Awaited => "awaited",
            Self::Fresh => "fresh",
            Self::Stale => "stale",
        }
    }
}

impl fmt::Display for Freshness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl TunnelReport {
    /// What its handshake is worth.
    pub fn freshness(&self, now: Monotonic) -> Freshness {
        match self.handshake {
            None => Freshness::Awaited,
            Some(at) if now.is_after(at, Freshness::KEYS_LIVE) => Freshness::Stale,
            Some(_) => Freshness::Fresh,
        }
    }
}

/// The latest report of a guest's tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// What was said.
    pub report: TunnelReport,
    /// When.
    pub at: Monotonic,
    told: Option<(Monotonic, Told)>,
}

/// What a record tells, of what changes seldom.
type Told = (Freshness, Option<SocketAddr>, Option<NonZero<u16>>);

impl Tunnel {
    /// Between two records of one tunnel, in nanoseconds: a guest may say another thing each second.
    const INTERVAL: u64 = 10 * Monotonic::SECOND;

    /// The first of its guest's.
    pub fn first(at: Monotonic, report: TunnelReport) -> Self {
        Self::look(None, at, report).0
    }

    /// Takes in a report, and whether that is to be told. What is too early is told with a later report.
    pub(crate) fn look(before: Option<Self>, now: Monotonic, report: TunnelReport) -> (Self, bool) {
        let told = before.and_then(|before| before.told);
        let facts = (report.freshness(now), report.endpoint, report.keepalive);
        let tells =
            told.is_none_or(|(at, before)| before != facts && now.is_after(at, Self::INTERVAL));
        let tunnel = Self {
            report,
            at: now,
            told: if tells { Some((now, facts)) } else { told },
        };
        (tunnel, tells)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Monotonic {
        Monotonic(seconds * Monotonic::SECOND)
    }

    fn report(handshake: Option<u64>, port: u16) -> TunnelReport {
        TunnelReport {
            witness: Witness::Host,
            handshake: handshake.map(at),
            endpoint: Some(SocketAddr::from(([192, 0, 2, 10], port))),
            keepalive: NonZero::new(25),
            sent_bytes: 1,
            received_bytes: 2,
        }
    }

    #[test]
    fn what_changes_seldom_is_told_and_counters_and_renewed_handshakes_are_not() {
        let mut tunnel = None;
        let mut told = Vec::new();
        for (now, handshake, port) in [
            (1000, None, 1),
            (1005, None, 1),
            (1010, Some(1008), 1),
            (1130, Some(1128), 1),
            // Its keys are used no more after 180 s.
            (1307, Some(1128), 1),
            (1308, Some(1128), 1),
            (1310, Some(1128), 1),
            (1320, Some(1319), 1),
            // Too early, and told later.
            (1325, Some(1319), 2),
            (1328, Some(1319), 3),
            (1330, Some(1319), 3),
            (1340, Some(1319), 3),
        ] {
            let (next, tells) = Tunnel::look(tunnel, at(now), report(handshake, port));
            if tells {
                told.push((now, next.report.freshness(at(now)), port));
            }
            tunnel = Some(next);
        }
        use Freshness::{Awaited, Fresh, Stale};
        assert_eq!(
            told,
            [
                (1000, Awaited, 1),
                (1010, Fresh, 1),
                (1308, Stale, 1),
                (1320, Fresh, 1),
                (1330, Fresh, 3)
            ]
        );
    }
}
