//! Metrics, read from the guards whenever they are asked for.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use omerta_dataplane::{Count, CounterReader, Counters, DirectionCounters, Guard, GuardError};
use omerta_engine::{GuestId, GuestState, Monotonic, Tunnel};
use omerta_verdict::{Direction, Reason};
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::clock;
use crate::fleet::{Fleet, Measure};

/// Answers scrapes. It keeps guards' counters open from one to the next.
pub(crate) struct Scraper {
    fleet: Arc<Fleet>,
    readers: Mutex<HashMap<GuestId, CounterReader>>,
}

impl Scraper {
    pub(crate) fn of(fleet: Arc<Fleet>) -> Self {
        Self {
            fleet,
            readers: Mutex::default(),
        }
    }

    pub(crate) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The text that is answered to a scrape. Blocks for some microseconds a guest.
    pub(crate) fn scrape(&self) -> Result<String, prometheus::Error> {
        let mut measures = self.fleet.measures();
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let judged: HashSet<_> = measures
            .iter()
            .filter(|measure| is_judged(measure))
            .map(|measure| measure.id)
            .collect();
        readers.retain(|id, reader| judged.contains(id) && reader.is_current());
        for measure in measures.iter_mut().filter(|m| judged.contains(&m.id)) {
            // A guard that is gone, or not there yet, leaves what was read last.
            if let Ok(counters) = read(&mut readers, measure) {
                self.fleet.note_counters(measure.id, counters.clone());
                measure.quiet = self.fleet.note_quiet(measure.id, &counters);
                measure.counters = Some(counters);
            }
        }
        drop(readers);
        let at_uplink = self
            .fleet
            .uplink()
            .map_or_else(AtUplink::default, |uplink| {
                let dropped = |measure: &Measure| {
                    let count = uplink.dropped_for(&measure.interface).ok().flatten()?;
                    Some((measure.name.clone(), count))
                };
                AtUplink {
                    interfaces: uplink
                        .interfaces()
                        .map(|(name, hook, runs)| (name.to_owned(), hook.word(), runs))
                        .collect(),
                    dropped: measures.iter().filter_map(dropped).collect(),
                }
            });
        let fleet = &self.fleet;
        let lost = (fleet.journal().lost(), fleet.incidents().lost());
        render(&measures, &at_uplink, lost.0, lost.1, clock::now())
    }
}

/// What metrics tell of early drops.
#[derive(Debug, Default)]
struct AtUplink {
    /// Each uplink, by which hook is dropped there, and whether the program runs.
    interfaces: Vec<(String, &'static str, bool)>,
    /// By guest's name.
    dropped: Vec<(String, Count)>,
}

fn read(
    readers: &mut HashMap<GuestId, CounterReader>,
    measure: &Measure,
) -> Result<Counters, GuardError> {
    let reader = match readers.entry(measure.id) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(at(measure, || {
            Guard::open(&measure.interface)?.counter_reader()
        })?),
    };
    reader.read()
}

/// Whether a guest has a guard whose counters may change.
fn is_judged(measure: &Measure) -> bool {
    use GuestState::{Ended, Ending, Launching, Paused};
    !matches!(measure.state, Launching | Paused | Ending | Ended)
}

/// The counters of a guest's guard, where it has one.
pub(crate) fn read_guard(measure: &Measure) -> Option<Counters> {
    let read = || at(measure, || Guard::open(&measure.interface)?.counters());
    is_judged(measure).then(read)?.ok()
}

/// Does `work` where the guest's tap is.
fn at<T: Send>(
    measure: &Measure,
    work: impl FnOnce() -> Result<T, GuardError> + Send,
) -> Result<T, GuardError> {
    let Some(namespace) = &measure.namespace else {
        return work();
    };
    let gone = |_| GuardError::NoInterface {
        interface: measure.interface.clone(),
    };
    namespace.within(work).map_err(gone)?
}

/// Renders metrics of these guests. The families are made anew each time, so that no series
/// outlives its guest.
fn render(
    measures: &[Measure],
    at_uplink: &AtUplink,
    lost_by_readers: u64,
    not_recorded: u64,
    now: Monotonic,
) -> Result<String, prometheus::Error> {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, labels: &[&str]| {
        let gauge = IntGaugeVec::new(Opts::new(name, help), labels)?;
        registry.register(Box::new(gauge.clone()))?;
        Ok::<_, prometheus::Error>(gauge)
    };
    let counter = |name: &str, help: &str, labels: &[&str]| {
        let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
        registry.register(Box::new(counter.clone()))?;
        Ok::<_, prometheus::Error>(counter)
    };
    let build = gauge(
        "omerta_build_info",
        "Always 1; the label tells which omertad runs.",
        &["version"],
    )?;
    build
        .get_metric_with_label_values(&[env!("CARGO_PKG_VERSION")])?
        .set(1);
    let states = gauge(
        "omerta_guest_state",
        "1 for the state that the guest is in, 0 for the others.",
        &["guest", "state"],
    )?;
    let handshakes = gauge(
        "omerta_guest_handshake_reported",
        "1 where the guest says that it has shaken hands with its consumer: its own word.",
        &["guest"],
    )?;
    let quiet = gauge(
        "omerta_guest_quiet_seconds",
        "For how long at least the guest's guard has let nothing pass, by the looks at its counters.",
        &["guest", "direction"],
    )?;
    let endpoints = gauge(
        "omerta_peer_endpoint_info",
        "Always 1; the label tells where the guest's consumer is.",
        &["guest", "endpoint"],
    )?;
    let tunnels = TunnelFamilies {
        handshake: gauge(
            "omerta_tunnel_handshake_age_seconds",
            "Seconds since the tunnel's latest handshake, by the word of the host's device or of the guest; absent where nothing is known of one.",
            &["guest", "witness"],
        )?,
        keepalive: gauge(
            "omerta_tunnel_keepalive_seconds",
            "Seconds between the tunnel's keepalive packets, 0 where they are off, by the word of the host's device or of the guest.",
            &["guest", "witness"],
        )?,
        seen: gauge(
            "omerta_tunnel_seen_age_seconds",
            "Seconds since the host's device or the guest has said something of the tunnel.",
            &["guest", "witness"],
        )?,
        bytes: counter(
            "omerta_tunnel_bytes_total",
            "Bytes that the tunnel has sent (egress) and received, WireGuard's own among them, by the word of the host's device or of the guest.",
            &["guest", "witness", "direction"],
        )?,
    };
    let labels = ["guest", "direction", "outcome", "reason"];
    let packets = counter(
        "omerta_guest_packets_total",
        "Frames that the guest's guard judged, by outcome, and by reason where dropped.",
        &labels,
    )?;
    let bytes = counter(
        "omerta_guest_bytes_total",
        "Bytes of the frames that the guest's guard judged, by outcome, and by reason where dropped.",
        &labels,
    )?;
    let rogue = counter(
        "omerta_rogue_events_total",
        "Rogue frames of the guest that the daemon was told of.",
        &["guest", "reason"],
    )?;
    let lost = counter(
        "omerta_events_lost_total",
        "Events that did not arrive: kernel, rogue frames that did not fit the guard's ring; reader, events that a slow reader missed; record, entries of the record of incidents that could not be written.",
        &["where"],
    )?;
    let uplinks = gauge(
        "omerta_uplink_in_force",
        "1 where early drops are made at the uplink, 0 where its interface has gone since.",
        &["uplink", "hook"],
    )?;
    for (uplink, hook, runs) in &at_uplink.interfaces {
        uplinks
            .get_metric_with_label_values(&[uplink.as_str(), hook])?
            .set(i64::from(*runs));
    }
    let early = counter(
        "omerta_guest_uplink_dropped_packets_total",
        "Frames for the guest, of none of its endpoints, that were dropped at an uplink. They are not among those that its guard judged.",
        &["guest"],
    )?;
    let early_bytes = counter(
        "omerta_guest_uplink_dropped_bytes_total",
        "Bytes of the frames that were dropped at an uplink.",
        &["guest"],
    )?;
    for (guest, count) in &at_uplink.dropped {
        early
            .get_metric_with_label_values(&[guest])?
            .inc_by(count.packets);
        early_bytes
            .get_metric_with_label_values(&[guest])?
            .inc_by(count.bytes);
    }
    let mut lost_in_kernel = 0;
    for measure in measures {
        for state in GuestState::ALL {
            let value = i64::from(state == measure.state);
            states
                .get_metric_with_label_values(&[&measure.name, state.word()])?
                .set(value);
        }
        // A series that begins at its first count would hide that count from `increase()`.
        for reason in Reason::ALL {
            rogue.get_metric_with_label_values(&[&measure.name, reason.word()])?;
        }
        for (reason, count) in &measure.rogue_frames {
            rogue
                .get_metric_with_label_values(&[&measure.name, reason.word()])?
                .inc_by(*count);
        }
        handshakes
            .get_metric_with_label_values(&[&measure.name])?
            .set(i64::from(measure.handshake));
        if measure.state != GuestState::Ended {
            endpoints
                .get_metric_with_label_values(&[&measure.name, &measure.endpoint.to_string()])?
                .set(1);
            if let Some(tunnel) = &measure.tunnel {
                tunnels.add(&measure.name, tunnel, now)?;
            }
        }
        if let Some(found) = measure.quiet {
            for (direction, since) in [
                (Direction::Egress, found.sent),
                (Direction::Ingress, found.received),
            ] {
                let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
                quiet
                    .get_metric_with_label_values(&[&measure.name, direction.word()])?
                    .set(seconds);
            }
        }
        let Some(counters) = &measure.counters else {
            continue;
        };
        lost_in_kernel += counters.events_lost.packets;
        for (direction, counters) in [
            (Direction::Egress, &counters.egress),
            (Direction::Ingress, &counters.ingress),
        ] {
            for (outcome, reason, count) in outcomes(counters) {
                let values = [measure.name.as_str(), direction.word(), outcome, reason];
                packets
                    .get_metric_with_label_values(&values)?
                    .inc_by(count.packets);
                bytes
                    .get_metric_with_label_values(&values)?
                    .inc_by(count.bytes);
            }
        }
    }
    lost.get_metric_with_label_values(&["kernel"])?
        .inc_by(lost_in_kernel);
    lost.get_metric_with_label_values(&["reader"])?
        .inc_by(lost_by_readers);
    lost.get_metric_with_label_values(&["record"])?
        .inc_by(not_recorded);
    TextEncoder::new().encode_to_string(&registry.gather())
}

/// What is told of tunnels.
struct TunnelFamilies {
    handshake: IntGaugeVec,
    keepalive: IntGaugeVec,
    seen: IntGaugeVec,
    bytes: IntCounterVec,
}

impl TunnelFamilies {
    /// Where a guest says that it sends is no label: it could say another place every second.
    fn add(&self, guest: &str, tunnel: &Tunnel, now: Monotonic) -> Result<(), prometheus::Error> {
        let report = &tunnel.report;
        let witness = report.witness.word();
        let age = |at| i64::try_from(clock::seconds_between(at, now)).unwrap_or(i64::MAX);
        if let Some(at) = report.handshake {
            self.handshake
                .get_metric_with_label_values(&[guest, witness])?
                .set(age(at));
        }
        self.keepalive
            .get_metric_with_label_values(&[guest, witness])?
            .set(report.keepalive.map_or(0, |seconds| seconds.get().into()));
        self.seen
            .get_metric_with_label_values(&[guest, witness])?
            .set(age(tunnel.at));
        for (direction, bytes) in [
            (Direction::Egress, report.sent_bytes),
            (Direction::Ingress, report.received_bytes),
        ] {
            self.bytes
                .get_metric_with_label_values(&[guest, witness, direction.word()])?
                .inc_by(bytes);
        }
        Ok(())
    }
}

fn outcomes(
    counters: &DirectionCounters,
) -> impl Iterator<Item = (&'static str, &'static str, Count)> + '_ {
    let passed = [
        ("allowed", "", counters.allowed),
        ("answered", "", counters.answered),
    ];
    let dropped = counters
        .dropped
        .iter()
        .map(|(reason, count)| ("dropped", reason.word(), *count));
    passed.into_iter().chain(dropped)
}

#[cfg(test)]
mod tests {
    use std::num::NonZero;
    use std::time::Duration;

    use super::*;
    use crate::quiet::QuietFor;
    use omerta_engine::{GuestId, TunnelReport, Witness};

    fn count(packets: u64, bytes: u64) -> Count {
        Count { packets, bytes }
    }

    fn counters() -> Counters {
        let direction = |allowed, dropped| DirectionCounters {
            allowed,
            answered: count(2, 84),
            dropped: Reason::ALL
                .iter()
                .map(|reason| {
                    let hit = *reason == Reason::Endpoint;
                    (*reason, if hit { dropped } else { count(0, 0) })
                })
                .collect(),
            ..DirectionCounters::default()
        };
        Counters {
            egress: direction(count(10, 1480), count(3, 294)),
            ingress: direction(count(9, 1300), count(0, 0)),
            events_lost: count(4, 400),
            ..Counters::default()
        }
    }

    fn measure(counters: Option<Counters>) -> Measure {
        Measure {
            id: GuestId(0),
            name: "alpha".into(),
            interface: "omalpha".into(),
            namespace: None,
            state: GuestState::Running,
            rogue_frames: vec![(Reason::Endpoint, 3)],
            counters,
            handshake: true,
            endpoint: "192.0.2.10:51820".parse().unwrap(),
            tunnel: None,
            quiet: Some(QuietFor {
                sent: Duration::from_millis(7999),
                received: Duration::from_secs(120),
            }),
        }
    }

    #[test]
    fn every_count_is_told_exactly() {
        let at_uplink = AtUplink {
            interfaces: vec![("eth0".into(), "tcx", true), ("eth1".into(), "xdp", false)],
            dropped: vec![("alpha".into(), count(7, 700))],
        };
        let now = Monotonic(1000 * Monotonic::SECOND);
        let text = render(&[measure(Some(counters()))], &at_uplink, 5, 6, now).unwrap();
        for line in [
            r#"omerta_guest_state{guest="alpha",state="running"} 1"#,
            r#"omerta_guest_state{guest="alpha",state="ended"} 0"#,
            r#"omerta_guest_handshake_reported{guest="alpha"} 1"#,
            r#"omerta_peer_endpoint_info{endpoint="192.0.2.10:51820",guest="alpha"} 1"#,
            r#"omerta_guest_quiet_seconds{direction="egress",guest="alpha"} 7"#,
            r#"omerta_guest_quiet_seconds{direction="ingress",guest="alpha"} 120"#,
            r#"omerta_guest_packets_total{direction="egress",guest="alpha",outcome="allowed",reason=""} 10"#,
            r#"omerta_guest_bytes_total{direction="egress",guest="alpha",outcome="allowed",reason=""} 1480"#,
            r#"omerta_guest_packets_total{direction="egress",guest="alpha",outcome="answered",reason=""} 2"#,
            r#"omerta_guest_packets_total{direction="egress",guest="alpha",outcome="dropped",reason="endpoint"} 3"#,
            r#"omerta_guest_bytes_total{direction="egress",guest="alpha",outcome="dropped",reason="endpoint"} 294"#,
            r#"omerta_guest_packets_total{direction="egress",guest="alpha",outcome="dropped",reason="fragment"} 0"#,
            r#"omerta_guest_packets_total{direction="ingress",guest="alpha",outcome="allowed",reason=""} 9"#,
            r#"omerta_rogue_events_total{guest="alpha",reason="endpoint"} 3"#,
            r#"omerta_rogue_events_total{guest="alpha",reason="fragment"} 0"#,
            r#"omerta_uplink_in_force{hook="tcx",uplink="eth0"} 1"#,
            r#"omerta_uplink_in_force{hook="xdp",uplink="eth1"} 0"#,
            r#"omerta_guest_uplink_dropped_packets_total{guest="alpha"} 7"#,
            r#"omerta_guest_uplink_dropped_bytes_total{guest="alpha"} 700"#,
            r#"omerta_events_lost_total{where="kernel"} 4"#,
            r#"omerta_events_lost_total{where="reader"} 5"#,
            r#"omerta_events_lost_total{where="record"} 6"#,
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing from\n{text}"
            );
        }
    }

    #[test]
    fn guest_without_a_guard_yet_has_a_state_and_no_counts() {
        let text = render(&[measure(None)], &AtUplink::default(), 0, 0, Monotonic(0)).unwrap();
        assert!(text.contains(r#"omerta_guest_state{guest="alpha""#));
        assert!(!text.contains("omerta_guest_packets_total{"));
        assert!(!text.contains("omerta_tunnel_"), "{text}");
    }

    #[test]
    fn what_is_said_of_a_tunnel_is_told_with_whose_word_it_is_and_nothing_of_an_ended_guests() {
        let at = |seconds| Monotonic(seconds * Monotonic::SECOND);
        let report = TunnelReport {
            witness: Witness::Guest,
            handshake: Some(at(930)),
            endpoint: Some("192.0.2.66:1".parse().unwrap()),
            keepalive: NonZero::new(25),
            sent_bytes: 1480,
            received_bytes: 92,
        };
        let mut measure = Measure {
            tunnel: Some(Tunnel::first(at(990), report)),
            ..measure(None)
        };
        let text = |measure: &Measure| {
            let measures = std::slice::from_ref(measure);
            render(measures, &AtUplink::default(), 0, 0, at(1000)).unwrap()
        };
        let told = text(&measure);
        for line in [
            r#"omerta_tunnel_handshake_age_seconds{guest="alpha",witness="guest"} 70"#,
            r#"omerta_tunnel_keepalive_seconds{guest="alpha",witness="guest"} 25"#,
            r#"omerta_tunnel_seen_age_seconds{guest="alpha",witness="guest"} 10"#,
            r#"omerta_tunnel_bytes_total{direction="egress",guest="alpha",witness="guest"} 1480"#,
            r#"omerta_tunnel_bytes_total{direction="ingress",guest="alpha",witness="guest"} 92"#,
        ] {
            assert!(told.lines().any(|l| l == line), "{line}: {told}");
        }
        assert!(!told.contains("192.0.2.66"), "a guest chooses labels");
        measure.state = GuestState::Ended;
        assert!(!text(&measure).contains("omerta_tunnel_"));
    }
}
