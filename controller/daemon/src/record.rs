//! The engine's records as the API's events.

use std::num::NonZero;

use omerta_api::{Ended, Occurrence};
use omerta_engine::{Cause, Ending, Monotonic, Record, TunnelReport};
use omerta_vm_launcher::Spec;

use crate::clock;

/// What a record is told as. `None` of the facts is read by a guest.
pub(crate) fn occurrence(
    record: Record,
    at: Monotonic,
    spec: &Spec,
    image: &str,
    pid: u32,
) -> Occurrence {
    match record {
        Record::Requested => Occurrence::Requested {
            image: image.to_owned(),
        },
        Record::Launched => Occurrence::Launched {
            interface: spec.tap.clone(),
        },
        Record::Guarded => Occurrence::Guarded {
            allow: spec.allowlist().iter().map(ToString::to_string).collect(),
        },
        Record::Started => Occurrence::Started { pid },
        Record::Adopted => Occurrence::Adopted { pid },
        Record::PublicKey(public_key) => Occurrence::PublicKey { public_key },
        Record::Handshake => Occurrence::Handshake {},
        Record::Tunnel(report) => tunnel(&report, at),
        Record::Agent(report) => Occurrence::Agent {
            report: report.word().to_owned(),
            what: report.what().map(str::to_owned),
        },
        Record::Console(report) => Occurrence::Console {
            attempts: report.attempts,
            unread: report.unread,
            line: report.line,
        },
        Record::ConsoleSilent => Occurrence::ConsoleSilent {},
        Record::Outside(found) => Occurrence::Outside { found },
        Record::Rogue {
            frame,
            action,
            suppressed,
            inference,
            ..
        } => Occurrence::Rogue {
            attempt: Some(inference.attempt.word().to_owned()),
            reason: frame.reason.word().to_owned(),
            direction: frame.direction.word().to_owned(),
            frame: frame.description,
            length: frame.length,
            action,
            suppressed,
        },
        Record::Paused(incident) => Occurrence::Paused {
            cause: Cause::Rogue,
            reason: Some(incident.frame.reason.word().to_owned()),
            frame_to_paused_us: incident.frame_to_paused_us(),
            frame: Some(incident.frame.description),
        },
        Record::PauseFailed { message } => Occurrence::PauseFailed { message },
        Record::TunnelSilent {
            seconds,
            never,
            action,
        } => Occurrence::TunnelSilent {
            seconds,
            never,
            on_silence: action,
        },
        Record::TunnelBack => Occurrence::TunnelBack {},
        Record::ConsumerMoved { from, to } => Occurrence::ConsumerMoved {
            from: from.to_string(),
            to: to.to_string(),
        },
        Record::ConsumerStays { name, at, message } => Occurrence::ConsumerStays {
            name,
            endpoint: at.to_string(),
            message,
        },
        Record::Held => Occurrence::Held {},
        Record::Released => Occurrence::Released {},
        Record::ReleaseFailed { message } => Occurrence::ReleaseFailed { message },
        Record::Reset => Occurrence::Reset {},
        Record::Panicked => Occurrence::Panicked {},
        Record::Stopping { deadline_seconds } => Occurrence::Stopping { deadline_seconds },
        Record::Scrubbed { bytes } => Occurrence::Scrubbed { bytes },
        Record::Ended(ending) => Occurrence::Ended(ended(&ending)),
    }
}

fn tunnel(report: &TunnelReport, at: Monotonic) -> Occurrence {
    Occurrence::Tunnel {
        tunnel: report.freshness(at),
        witness: report.witness,
        handshake_seconds: report
            .handshake
            .map(|handshake| clock::seconds_between(handshake, at)),
        endpoint: report.endpoint.map(|endpoint| endpoint.to_string()),
        keepalive_seconds: report.keepalive.map(NonZero::get),
        sent_bytes: report.sent_bytes,
        received_bytes: report.received_bytes,
    }
}

/// How a guest ended, on the wire.
pub(crate) fn ended(ending: &Ending) -> Ended {
    let incident = ending.incident.as_ref();
    Ended {
        cause: ending.cause,
        reason: incident.map(|incident| incident.frame.reason.word().to_owned()),
        frame: incident.map(|incident| incident.frame.description.clone()),
        frame_to_paused_us: incident.and_then(|incident| incident.frame_to_paused_us()),
        frame_to_ended_us: incident.and_then(|incident| incident.frame_to_ended_us()),
        frame_to_tap_removed_us: incident.and_then(|incident| incident.frame_to_tap_removed_us()),
        message: ending.message.clone(),
        leftovers: ending.leftovers.clone(),
    }
}
