//! Guests on the wire.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::num::NonZero;

use omerta_engine::{GuestState, OnViolation};
use serde::{Deserialize, Serialize};

use crate::{Cause, SecretText};

/// How much may travel in one direction; what is absent has no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Frames a second.
    #[serde(default)]
    pub packets_per_second: Option<NonZero<u64>>,
    /// Bits a second, of whole frames.
    #[serde(default)]
    pub bits_per_second: Option<NonZero<u64>>,
}

/// How much a guest may send and be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestLimits {
    /// From the guest.
    #[serde(default)]
    pub egress: Limits,
    /// To the guest.
    #[serde(default)]
    pub ingress: Limits,
}

/// Body of `POST /v1/guests`. Text fields are validated by the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// The guest's name: 1–32 of `a`–`z`, `0`–`9`, `-`, starting with a letter.
    pub name: String,
    /// The image's name, in the store or in the daemon's image directory.
    pub image: String,
    /// The consumer's WireGuard: `PUBLIC_KEY@ADDRESS:PORT`, or `PUBLIC_KEY@NAME:PORT`, a name that omertad resolves and follows.
    pub consumer: String,
    /// The guest's address inside the tunnel, `ADDRESS/PREFIX`; 10.66.0.2/24 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_address: Option<String>,
    /// The consumer's address inside the tunnel; 10.66.0.1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_peer: Option<Ipv4Addr>,
    /// What the consumer's peer for the guest has as `PresharedKey`, 44 characters of base64; none when absent. It is in no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preshared_key: Option<SecretText>,
    /// Seconds, 1 to 120, between the packets that keep the tunnel's way open; 25 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive_seconds: Option<u16>,
    /// Who keeps the provider's end of the tunnel: `guest`, inside the guest, or `host`, for images without WireGuard;
    /// `guest` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<String>,
    /// What the guest reaches at the consumer's address in a tunnel of the host's: `tcp:PORT`, `udp:PORT` or `icmp`, 1 to 32
    /// of them, each of which the guard judges by; none in a tunnel of the guest's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reach: Vec<String>,
    /// Virtual CPUs; 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u8>,
    /// Memory in MiB; 256 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// The size of the guest's disk in MiB, for an image that has one; the image's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u32>,
    /// Who may log in as root by SSH through the tunnel: a line of `authorized_keys` without options, for an
    /// image that is seeded by cloud-init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_key: Option<String>,
    /// The guard's mode: `filtered`, `conntrack`, `sampled` or `direct`; `filtered` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// What rogue traffic does to the guest; the daemon's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_violation: Option<OnViolation>,
    /// How much may pass; the daemon's default, as a whole, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<GuestLimits>,
    /// Whether the console gives a shell rather than only a log.
    #[serde(default)]
    pub console_shell: bool,
    /// Whether the agent in the guest is asked; where the image has one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<bool>,
    /// Seconds (1 or more) after which the guest is killed, counted from its start; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
    /// What the operator calls it by: up to 16 names with their values, of no meaning to omertad.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Body of `POST /v1/guests/{name}/stop`; may be empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Seconds (1–600) after which a guest that has not powered down is killed; 10 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_seconds: Option<u32>,
}

/// Query of `GET /v1/guests`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestsQuery {
    /// Whether the records of ended guests are listed too.
    #[serde(default)]
    pub ended: bool,
}

/// Answer of `GET /v1/guests`, in order of name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestList {
    /// The guests.
    pub guests: Vec<Guest>,
}

/// One guest: answer of run, show, stop and kill.
///
/// An ended guest keeps its record (`state` is `ended`, `ended` tells why) until its name is used
/// again or many others have ended since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// The number that omertad gave it, which no guest before or after it has: a name may be used again.
    #[serde(default)]
    pub id: u64,
    /// The name.
    pub name: String,
    /// Where it stands in its life.
    pub state: GuestState,
    /// The host-side interface (tap).
    pub interface: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The gateway that it sees.
    pub gateway: Ipv4Addr,
    /// The guest's MAC.
    pub mac: String,
    /// The WireGuard public key that the guest reported; null until then. That of the host's end, from before the guest begins,
    /// where the tunnel is the host's.
    pub public_key: Option<String>,
    /// Whether the guest reported a WireGuard handshake with its consumer.
    pub handshake: bool,
    /// What is known of the agent in it: `awaited`, `arrived`, `sound`, `changed`, `missed`, `forged`, `replaced`
    /// or `garbled`; null where none is asked.
    pub agent: Option<String>,
    /// The consumer: `PUBLIC_KEY@ADDRESS:PORT`.
    pub consumer: String,
    /// Who keeps the provider's end of the tunnel: `guest` or `host`.
    #[serde(default)]
    pub tunnel: String,
    /// What the guest reaches in a tunnel of the host's: endpoints.
    #[serde(default)]
    pub reach: Vec<String>,
    /// The name by which omertad follows the consumer, `NAME:PORT`; null where its address was given.
    #[serde(default)]
    pub consumer_name: Option<String>,
    /// What rogue traffic does to the guest.
    pub on_violation: OnViolation,
    /// The guard's mode.
    pub mode: String,
    /// How much may pass the guard.
    #[serde(default)]
    pub limits: GuestLimits,
    /// The image's name.
    pub image: String,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Seconds that it may run; null where it may run for ever.
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
    /// What the operator calls it by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The hypervisor's process id; null while launching and once ended.
    pub pid: Option<u32>,
    /// Path of the unix socket of the serial console; null while launching and once ended.
    pub console: Option<String>,
    /// Path of the console's log; null while launching and once ended.
    pub log: Option<String>,
    /// Rogue frames that reached the daemon.
    pub rogue_frames: u64,
    /// Since when the guest is in its state, RFC 3339.
    pub since: String,
    /// How it ended; null before.
    pub ended: Option<Ended>,
}

/// How a guest ended. Times are counted from the kernel's timestamp of the rogue frame and are
/// null where rogue traffic was not the cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Why.
    pub cause: Cause,
    /// The drop reason of the rogue frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The rogue frame in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame: Option<String>,
    /// Microseconds from the frame to the paused guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame_to_paused_us: Option<u64>,
    /// Microseconds from the frame to the reaped process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame_to_ended_us: Option<u64>,
    /// Microseconds from the frame to the removed tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frame_to_tap_removed_us: Option<u64>,
    /// What went wrong, where something did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What of the guest could not be removed and why, one line each; absent when all went well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leftovers: Vec<String>,
}
