//! What a request says in words, understood.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::num::NonZero;

use omerta_api::{ApiError, GuestLimits, RunRequest, SecretText};
use omerta_dataplane::{DirectionLimits, Limits};
use omerta_tunnel::Secret;
use omerta_verdict::{Endpoint, Protocol};
use omerta_vm_launcher::{Consumer, GuestName, Spec, SshPublicKey, Tunnel, WgPublicKey};

use crate::failure::usage;

const DEFAULT_TUNNEL: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 66, 0, 2), 24);
const DEFAULT_PEER: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);
const MAX_LABELS: usize = 16;
const MAX_LABEL_BYTES: usize = 63;

pub(crate) fn checked_ssh_key(text: Option<&str>) -> Result<Option<SshPublicKey>, ApiError> {
    text.map(str::parse)
        .transpose()
        .map_err(|error| usage(format!("ssh_key: {error}")))
}

pub(crate) fn parse_name(name: &str) -> Result<GuestName, ApiError> {
    name.parse().map_err(|error| usage(format!("{error}")))
}

pub(crate) fn checked_timeout(seconds: Option<u32>) -> Result<Option<NonZero<u32>>, ApiError> {
    let checked = |seconds| {
        NonZero::new(seconds)
            .ok_or_else(|| usage("timeout_seconds is 0: give 1 or more, or leave it out".into()))
    };
    seconds.map(checked).transpose()
}

pub(crate) fn checked_labels(
    labels: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, ApiError> {
    if labels.len() > MAX_LABELS {
        let count = labels.len();
        return Err(usage(format!(
            "{count} labels are too many: give {MAX_LABELS} at most"
        )));
    }
    let in_name = |c: u8| c.is_ascii_alphanumeric() || b"._-/".contains(&c);
    for (name, value) in &labels {
        let named = (1..=MAX_LABEL_BYTES).contains(&name.len()) && name.bytes().all(in_name);
        let printable = value.bytes().all(|c| (b' '..=b'~').contains(&c));
        if !named || !printable || value.len() > MAX_LABEL_BYTES {
            let label = format!("{name}={value}");
            let label: String = label
                .chars()
                .take(64)
                .flat_map(char::escape_default)
                .collect();
            return Err(usage(format!(
                "label `{label}`: a name is 1 to {MAX_LABEL_BYTES} of letters, digits and . _ - /, a value up to {MAX_LABEL_BYTES} printable ASCII characters"
            )));
        }
    }
    Ok(labels)
}

pub(crate) fn direction_limits(limits: GuestLimits) -> DirectionLimits {
    let of = |limits: omerta_api::Limits| Limits {
        packets_per_second: limits.packets_per_second,
        bits_per_second: limits.bits_per_second,
    };
    DirectionLimits {
        egress: of(limits.egress),
        ingress: of(limits.ingress),
    }
}

/// The limits as they are told on the wire.
pub(crate) fn guest_limits(limits: DirectionLimits) -> GuestLimits {
    let of = |limits: Limits| omerta_api::Limits {
        packets_per_second: limits.packets_per_second,
        bits_per_second: limits.bits_per_second,
    };
    GuestLimits {
        egress: of(limits.egress),
        ingress: of(limits.ingress),
    }
}

pub(crate) fn parse_consumer(text: &str) -> Result<Consumer, ApiError> {
    let shown = || text.escape_default().to_string();
    let (key, endpoint) = text.split_once('@').ok_or_else(|| {
        usage(format!(
            "consumer `{}` is not one: write PUBLIC_KEY@ADDRESS:PORT",
            shown()
        ))
    })?;
    let public_key: WgPublicKey = key
        .parse()
        .map_err(|error| usage(format!("consumer `{}`: {error}", shown())))?;
    let endpoint = endpoint.parse().map_err(|_| {
        usage(format!(
            "consumer `{}`: write its IPv4 endpoint as ADDRESS:PORT after the @",
            shown()
        ))
    })?;
    Ok(Consumer {
        public_key,
        endpoint,
    })
}

pub(crate) fn parse_tunnel(
    address: Option<&str>,
    peer: Option<Ipv4Addr>,
) -> Result<Tunnel, ApiError> {
    let (address, prefix) = match address {
        None => DEFAULT_TUNNEL,
        Some(text) => text
            .split_once('/')
            .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)))
            .ok_or_else(|| {
                let text = text.escape_default();
                usage(format!(
                    "tunnel address `{text}` is not one: write ADDRESS/PREFIX as in 10.66.0.2/24"
                ))
            })?,
    };
    Ok(Tunnel {
        address,
        prefix,
        peer: peer.unwrap_or(DEFAULT_PEER),
    })
}

/// A refusal says nothing of the text.
pub(crate) fn parse_preshared_key(text: Option<&SecretText>) -> Result<Option<Secret>, ApiError> {
    let parsed = text.map(|text| text.expose().parse()).transpose();
    parsed.map_err(|_| {
        usage("preshared_key is no key: write 44 characters, as `wg genpsk` prints them".into())
    })
}

/// The most is the launcher's to say.
pub(crate) fn parse_keepalive(seconds: Option<u16>) -> Result<NonZero<u16>, ApiError> {
    let Some(seconds) = seconds else {
        return Ok(Spec::KEEPALIVE);
    };
    NonZero::new(seconds).ok_or_else(|| {
        let max = Spec::MAX_KEEPALIVE;
        usage(format!(
            "keepalive_seconds is 0: give 1 to {max}, by which a tunnel that is up is told from one that is dead"
        ))
    })
}

/// A tunnel that omertad keeps, by the word on the wire; that of the guest's own is `guest`.
pub(crate) const HOST: &str = "host";
const MAX_REACH: usize = 32;

pub(crate) fn is_host_tunnel(request: &RunRequest) -> bool {
    request.tunnel.as_deref() == Some(HOST)
}

/// Which end of the tunnel keeps a guest's keys.
pub(crate) const fn tunnel_word(spec: &Spec) -> &'static str {
    if spec.reach.is_empty() { "guest" } else { HOST }
}

/// What a guest reaches in a tunnel that omertad keeps, at the consumer's address there; nothing by name for a tunnel of its own.
pub(crate) fn parse_reach(
    tunnel: Option<&str>,
    reach: &[String],
    peer: Ipv4Addr,
) -> Result<Vec<Endpoint>, ApiError> {
    match tunnel {
        None | Some("guest") if reach.is_empty() => return Ok(Vec::new()),
        None | Some("guest") => {
            return Err(usage(
                "reach is given and the tunnel is the guest's, which reaches what its consumer lets it: leave it out".into(),
            ));
        }
        Some(HOST) => {}
        Some(other) => {
            let other = other.escape_default();
            return Err(usage(format!(
                "tunnel `{other}` is not one: write guest or host"
            )));
        }
    }
    if !(1..=MAX_REACH).contains(&reach.len()) {
        return Err(usage(format!(
            "{} things to reach in the host's tunnel: give 1 to {MAX_REACH}, as in tcp:80",
            reach.len()
        )));
    }
    let mut endpoints: Vec<Endpoint> = Vec::with_capacity(reach.len());
    for text in reach {
        let at_peer = match text.split_once(':') {
            Some((protocol, port)) => format!("{protocol}:{peer}:{port}"),
            None => format!("{text}:{peer}"),
        };
        let endpoint = at_peer.parse().map_err(|_| {
            let text = text.escape_default();
            usage(format!(
                "reach `{text}` is nothing to reach: write tcp:PORT, udp:PORT or icmp"
            ))
        })?;
        if endpoints.contains(&endpoint) {
            return Err(usage(format!("reach {text} is given twice: give it once")));
        }
        endpoints.push(endpoint);
    }
    Ok(endpoints)
}

/// The same as it is asked for.
pub(crate) fn reach_text(endpoint: &Endpoint) -> String {
    match endpoint.protocol {
        Protocol::Icmp => "icmp".to_owned(),
        Protocol::Tcp => format!("tcp:{}", endpoint.port),
        Protocol::Udp => format!("udp:{}", endpoint.port),
    }
}

/// The consumer as it is written on the wire.
pub(crate) fn consumer_text(consumer: &Consumer) -> String {
    format!("{}@{}", consumer.public_key, consumer.endpoint)
}
