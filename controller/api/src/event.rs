//! Events on the wire: `GET /v1/events` answers one JSON object a line.

use omerta_engine::{Cause, Freshness, OnSilence, OnViolation, Witness};
use serde::{Deserialize, Serialize};

/// Query of `GET /v1/events`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Whether the stream stays open for what happens next.
    #[serde(default)]
    pub follow: bool,
    /// Only this guest's events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
}

/// One line of the event stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, RFC 3339 with microseconds, UTC.
    pub at: String,
    /// The guest; absent for `lost`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub what: Occurrence,
}

/// What happened. The variant's name is the line's `kind`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Occurrence {
    /// The guest was asked for and admitted.
    Requested {
        /// Its image's name.
        image: String,
    },
    /// The process exists, paused, on its tap.
    Launched {
        /// The host-side interface.
        interface: String,
    },
    /// The guard is attached, pinned and proven by a canary.
    Guarded {
        /// What the guest may reach.
        allow: Vec<String>,
    },
    /// The guest runs.
    Started {
        /// The hypervisor's process id.
        pid: u32,
    },
    /// Its omertad died, and the one that runs now has taken it over, its guard proven.
    Adopted {
        /// The hypervisor's process id.
        pid: u32,
    },
    /// The guest reported its WireGuard public key.
    PublicKey {
        /// The key, base64.
        public_key: String,
    },
    /// The guest reported a handshake with its consumer.
    Handshake {},
    /// The guest's tunnel is not as it was told last: its handshake is, or is no longer, fresh, or it has another endpoint or
    /// keepalive.
    Tunnel {
        /// Whether there was a handshake, and whether its keys are still used.
        tunnel: Freshness,
        /// Who says so: the host, of a tunnel that it keeps, or the guest.
        witness: Witness,
        /// Seconds since the latest handshake.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        handshake_seconds: Option<u64>,
        /// Where it sends.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
        /// Seconds between packets that only keep the way open.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keepalive_seconds: Option<u16>,
        /// Bytes that it has sent, WireGuard's own among them.
        sent_bytes: u64,
        /// Bytes that it has received.
        received_bytes: u64,
    },
    /// Something new is known of the agent in the guest.
    Agent {
        /// `arrived`, `sound`, `changed`, `missed`, `forged`, `replaced` or `garbled`.
        report: String,
        /// What has changed, or the digest of the program that has arrived.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        what: Option<String>,
    },
    /// The guest's own firewall says on the console that it has blocked something, or the console is flooded. It is
    /// the guest's word, and nothing is done for it.
    Console {
        /// Lines of blocked packets since the guest is watched.
        attempts: u64,
        /// Bytes that the guest printed faster than its console is read, since it is watched.
        unread: u64,
        /// The last of the lines.
        line: String,
    },
    /// The guest's guard drops what it sends, and its own firewall, which its image says is heard on the console, says
    /// nothing. It may be gone, got around or silenced; nothing is done for it.
    ConsoleSilent {},
    /// The host has something towards the guest's address that is not the guest's own. Nothing is done to the guest.
    Outside {
        /// A route, a neighbour entry or a socket.
        found: String,
    },
    /// The guest's consumer has moved. The guest may reach it where it is now, and no longer where it was.
    ConsumerMoved {
        /// Where it was: `ADDRESS:PORT`.
        from: String,
        /// Where it is.
        to: String,
    },
    /// The name of the guest's consumer leads to no other place where it may be: the guest reaches it where it was.
    ConsumerStays {
        /// `NAME:PORT`.
        name: String,
        /// Where the guest may reach it: `ADDRESS:PORT`.
        endpoint: String,
        /// Why the name is not followed.
        message: String,
    },
    /// Nothing has come from the guest's consumer for so long.
    TunnelSilent {
        /// How long.
        seconds: u64,
        /// Whether nothing has come since the guest runs.
        never: bool,
        /// What happens to the guest.
        on_silence: OnSilence,
    },
    /// Something comes from the guest's consumer again.
    TunnelBack {},
    /// The guest sent a frame that its guard dropped.
    Rogue {
        /// The drop reason.
        reason: String,
        /// Always `egress`: what the guest sent.
        direction: String,
        /// The frame in one line.
        frame: String,
        /// The frame's length in bytes.
        length: u32,
        /// What is done about it.
        action: OnViolation,
        /// What the guest seems to have tried.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attempt: Option<String>,
        /// Rogue frames of this guest and reason that were counted but not published since the
        /// last one that was.
        suppressed: u64,
    },
    /// The guest is paused.
    Paused {
        /// Why.
        cause: Cause,
        /// The drop reason of the rogue frame, where that was the cause.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// The rogue frame in one line, where that was the cause.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        frame: Option<String>,
        /// Microseconds from the kernel's timestamp of the frame to the paused guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        frame_to_paused_us: Option<u64>,
    },
    /// What the guest had written to its disk was given back to the file system, and found gone.
    Scrubbed {
        /// How much of the file system that had taken.
        bytes: u64,
    },
    /// The guest could not be paused; it is killed instead where that was for rogue traffic.
    PauseFailed {
        /// What went wrong.
        message: String,
    },
    /// The guest stands still by request.
    Held {},
    /// The guest runs on.
    Released {},
    /// The guest could not be made to run on.
    ReleaseFailed {
        /// What went wrong.
        message: String,
    },
    /// The guest was reset, by itself or by request.
    Reset {},
    /// The guest's kernel panicked; the guest is paused.
    Panicked {},
    /// The guest was asked to power down.
    Stopping {
        /// Seconds it has.
        deadline_seconds: u32,
    },
    /// Nothing of the guest is left but what `leftovers` lists.
    Ended(crate::Ended),
    /// The reader was too slow, or the history too short: this many events are missing here.
    Lost {
        /// How many.
        events: u64,
    },
    /// A kind that this reader does not know.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rogue_line_has_the_documented_fields() {
        let event = Event {
            at: "2026-01-01T00:00:00.000001Z".into(),
            guest: Some("alpha".into()),
            what: Occurrence::Rogue {
                reason: "endpoint".into(),
                direction: "egress".into(),
                frame: "udp 10.77.0.2:1234 → 198.51.100.1:53".into(),
                length: 98,
                action: OnViolation::Terminate,
                attempt: Some("dns".into()),
                suppressed: 0,
            },
        };
        let line = serde_json::to_value(&event).unwrap();
        assert_eq!(line["kind"], "rogue");
        assert_eq!(line["action"], "terminate");
        assert_eq!(line["guest"], "alpha");
        assert_eq!(serde_json::from_value::<Event>(line).unwrap(), event);
    }

    #[test]
    fn ended_line_is_flat_and_omits_what_does_not_apply() {
        let event = Event {
            at: "2026-01-01T00:00:00.000001Z".into(),
            guest: Some("alpha".into()),
            what: Occurrence::Ended(crate::Ended {
                cause: Cause::Killed,
                reason: None,
                frame: None,
                frame_to_paused_us: None,
                frame_to_ended_us: None,
                frame_to_tap_removed_us: None,
                message: None,
                leftovers: Vec::new(),
            }),
        };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"at":"2026-01-01T00:00:00.000001Z","guest":"alpha","kind":"ended","cause":"killed"}"#
        );
    }

    #[test]
    fn later_kinds_are_readable() {
        let line = r#"{"at":"2026-01-01T00:00:00Z","guest":"a","kind":"migrated","to":"b"}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        assert_eq!(event.what, Occurrence::Unknown);
    }
}
