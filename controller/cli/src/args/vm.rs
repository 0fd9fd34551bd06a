//! Arguments of `omerta vm`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand};
use omerta_api::{OnViolation, RunRequest};
use omerta_tunnel::PeerEndpoint;
use omerta_verdict::Mode;
use serde_json::{Map, Value};

use super::Shown;
use super::guard::{AttachError, check_limits};
use super::limit::{self, Limit};
use crate::spec::{self, SpecError};

/// The most that is read of a public key: a little more than any has.
const MAX_KEY_BYTES: u64 = 16 << 10;

/// The verbs of `omerta vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start a guest whose only reachable endpoint is its consumer's WireGuard
    Run(Box<RunArgs>),

    /// List guests
    List {
        /// List ended guests too
        #[arg(short, long)]
        all: bool,

        #[command(flatten)]
        shown: Shown,
    },

    /// Show a guest
    Show {
        /// The guest
        name: GuestName,

        #[command(flatten)]
        shown: Shown,
    },

    /// Make a running guest stand still, as it is
    Pause {
        /// The guest
        name: GuestName,

        #[command(flatten)]
        shown: Shown,
    },

    /// Let a guest that was paused by request run on, once its guard has been verified
    Resume {
        /// The guest
        name: GuestName,

        #[command(flatten)]
        shown: Shown,
    },

    /// Press a running guest's reset button
    Reset {
        /// The guest
        name: GuestName,

        #[command(flatten)]
        shown: Shown,
    },

    /// Ask a guest to power down, and kill it at the deadline
    Stop {
        /// The guest
        name: GuestName,

        /// How long it has, 1 to 600 seconds [default: 10]
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=600))]
        deadline: Option<u32>,

        #[command(flatten)]
        shown: Shown,
    },

    /// End a guest at once
    Kill {
        /// The guest
        name: GuestName,

        #[command(flatten)]
        shown: Shown,
    },

    /// Connect this terminal to a guest's serial console; Ctrl-] detaches
    ///
    /// On a terminal, what the guest prints is filtered: text, colours and cursor movement pass;
    /// sequences that reach beyond the screen (title, clipboard, reports, modes) are removed.
    /// Where standard output is no terminal, bytes pass unchanged.
    ///
    /// Standard input may be a pipe or a file, as in `echo 'wg show' | omerta vm console NAME`: it is
    /// typed to the guest, and the command ends a moment after it (--linger). A console serves one
    /// session at a time; a second waits until the first has ended.
    Console {
        /// The guest
        name: GuestName,

        /// How long to go on showing what the guest prints once standard input has ended, 0 to
        /// 86400 seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=86_400))]
        linger: u32,

        /// How many of the last lines that it has printed to show first, control characters spelled out,
        /// 0 to 10000
        #[arg(long, value_name = "LINES", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000))]
        scrollback: u32,
    },

    /// Print what a guest wrote to its console, control characters spelled out; of an ended guest
    /// its last 64 KiB
    Logs {
        /// The guest
        name: GuestName,

        #[command(flatten)]
        shown: Shown,
    },
}

/// Arguments of `vm run`, as typed.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Read what to run from a file of TOML or JSON, with the fields of the API's RunRequest
    /// (`-`: standard input); options given beside it stand above it
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,

    /// The guest's name: up to 32 of a-z, 0-9 and -, starting with a letter
    #[arg(long, required_unless_present = "spec")]
    name: Option<GuestName>,

    /// The image: a directory below omertad's image directory
    #[arg(long, required_unless_present = "spec")]
    image: Option<String>,

    /// The consumer's WireGuard: its public key and its only reachable endpoint, by IPv4 address or by a name that is followed
    #[arg(
        long,
        value_name = "PUBKEY@ADDR:PORT",
        required_unless_present = "spec"
    )]
    consumer: Option<Consumer>,

    /// The guest's address inside the tunnel [default: 10.66.0.2/24]
    #[arg(long, value_name = "ADDR/PREFIX")]
    tunnel_address: Option<TunnelAddress>,

    /// The consumer's address inside the tunnel [default: 10.66.0.1]
    #[arg(long, value_name = "ADDR")]
    tunnel_peer: Option<Ipv4Addr>,

    /// Who keeps the provider's end of the tunnel: guest, or host for an image without WireGuard [default: guest]
    #[arg(long, value_name = "WHO", value_parser = ["guest", "host"])]
    tunnel: Option<String>,

    /// What the guest reaches at the consumer's address in a tunnel of the host's: tcp:PORT, udp:PORT or icmp (repeatable)
    #[arg(long, value_name = "WHAT")]
    reach: Vec<String>,

    /// Virtual CPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    cpus: Option<u8>,

    /// Memory in MiB [default: 256]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    memory: Option<u32>,

    /// Its disk in MiB, for an image that has one [default: as large as the image's]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    disk: Option<u32>,

    /// A file with the SSH public key of who may log in as root through the tunnel, for an image with
    /// cloud-init
    #[arg(long, value_name = "FILE")]
    ssh_key: Option<PathBuf>,

    /// How the guest's frames are judged: filtered, conntrack, sampled or direct
    /// [default: filtered]
    #[arg(long)]
    mode: Option<Mode>,

    /// How much may pass: egress-packets=N, egress-bits=N, ingress-packets=N or ingress-bits=N, with
    /// N for each second, such as 500, 20k, 100M, 10G, or `none` (repeatable; where given, none of
    /// omertad's own holds)
    #[arg(long = "limit", value_name = "WHAT=N")]
    limits: Vec<Limit>,

    /// What rogue traffic does to the guest: drop, alert, pause or terminate [default: omertad's]
    #[arg(long, value_name = "POLICY")]
    on_violation: Option<OnViolation>,

    /// Give a shell on the serial console, rather than only a log
    #[arg(long)]
    console_shell: bool,

    /// Do not ask the agent in the guest, where its image has one
    #[arg(long)]
    no_agent: bool,

    /// Kill the guest when it has run so long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    timeout: Option<u32>,

    /// What to call the guest by, shown with it (repeatable, 16 at most)
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<Label>,

    /// Wait this long for the guest to report its WireGuard public key
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub wait: Option<u32>,

    #[command(flatten)]
    pub shown: Shown,
}

impl RunArgs {
    /// What to ask of omertad.
    ///
    /// # Errors
    /// A tunnel whose two ends cannot speak to each other, or a thing that is limited twice.
    pub fn check(&self) -> Result<RunRequest, RunError> {
        if let (Some(address), Some(peer)) = (self.tunnel_address, self.tunnel_peer) {
            if address.address == peer {
                return Err(RunError::SharedTunnelAddress(peer));
            }
            if !address.holds(peer) {
                return Err(RunError::PeerOutsideTunnel { peer, address });
            }
        }
        check_limits(&self.limits).map_err(RunError::Limits)?;
        let given = self.given()?;
        match &self.spec {
            Some(path) => Ok(spec::read(path, given)?),
            None => Ok(serde_json::from_value(Value::Object(given))?),
        }
    }

    /// The fields of the request that options give.
    fn given(&self) -> Result<Map<String, Value>, RunError> {
        let mut labels = BTreeMap::new();
        for Label { name, value } in &self.labels {
            if labels.insert(name, value).is_some() {
                return Err(RunError::LabelTwice(name.clone()));
            }
        }
        let limits = (!self.limits.is_empty()).then(|| limit::requested(&self.limits));
        let fields = serde_json::json!({
            "name": self.name.as_ref().map(GuestName::as_str),
            "image": self.image,
            "consumer": self.consumer.as_ref().map(Consumer::to_string),
            "tunnel_address": self.tunnel_address.map(|address| address.to_string()),
            "tunnel_peer": self.tunnel_peer,
            "tunnel": self.tunnel,
            "reach": (!self.reach.is_empty()).then_some(&self.reach),
            "cpus": self.cpus,
            "memory_mib": self.memory,
            "disk_mib": self.disk,
            "ssh_key": self.ssh_key.as_deref().map(key_of).transpose()?,
            "mode": self.mode.map(|mode| mode.to_string()),
            "on_violation": self.on_violation,
            "limits": limits,
            "console_shell": self.console_shell.then_some(true),
            "agent": self.no_agent.then_some(false),
            "timeout_seconds": self.timeout,
            "labels": (!labels.is_empty()).then_some(labels),
        });
        let mut given = Map::new();
        if let Value::Object(fields) = fields {
            given.extend(fields.into_iter().filter(|(_, value)| !value.is_null()));
        }
        Ok(given)
    }
}

/// The one line of a file of a public key.
fn key_of(path: &Path) -> Result<String, RunError> {
    let read = || {
        let mut text = String::new();
        let bounded = &mut File::open(path)?.take(MAX_KEY_BYTES);
        bounded.read_to_string(&mut text).map(|_| text)
    };
    read().map_err(|source| RunError::SshKey {
        path: path.to_owned(),
        source,
    })
}

/// A label as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    name: String,
    value: String,
}

/// Text that is not a label.
#[derive(Debug, thiserror::Error)]
#[error("write NAME=VALUE, as in plan=small")]
pub struct LabelError;

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(LabelError),
        }
    }
}

/// Why the arguments of `vm run` contradict each other.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// One thing is limited twice.
    #[error(transparent)]
    Limits(AttachError),
    /// The file is no spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The file of the SSH key cannot be read.
    #[error("--ssh-key {}: give a file as ~/.ssh/id_ed25519.pub", path.display())]
    SshKey {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// One label is given twice.
    #[error("--label {0} is given twice: give it once")]
    LabelTwice(String),
    /// The options do not make a request.
    #[error("these options describe no guest: see `omerta vm run --help`")]
    Request(#[from] serde_json::Error),
    /// Both ends of the tunnel have one address.
    #[error("--tunnel-peer {0} is also the guest's --tunnel-address: give the consumer's own")]
    SharedTunnelAddress(Ipv4Addr),
    /// The consumer's end is not in the guest's tunnel network.
    #[error(
        "--tunnel-peer {peer} is not in the network of --tunnel-address {address}: give an address inside it"
    )]
    PeerOutsideTunnel {
        /// The consumer's end.
        peer: Ipv4Addr,
        /// The guest's end.
        address: TunnelAddress,
    },
}

/// A guest's name: 1–32 of `a`–`z`, `0`–`9` and `-`, starting with a letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestName(String);

impl GuestName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text that is not a guest's name.
#[derive(Debug, thiserror::Error)]
#[error("a guest's name is 1 to 32 of a-z, 0-9 and -, starting with a letter")]
pub struct GuestNameError;

impl FromStr for GuestName {
    type Err = GuestNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        if text.len() > 32
            || !text.starts_with(|c: char| c.is_ascii_lowercase())
            || !text.bytes().all(fits)
        {
            return Err(GuestNameError);
        }
        Ok(Self(text.to_owned()))
    }
}

/// A consumer's WireGuard: public key and endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consumer {
    public_key: String,
    endpoint: PeerEndpoint,
}

impl fmt::Display for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.public_key, self.endpoint)
    }
}

/// Why text is not a consumer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConsumerError {
    /// No `@` between the key and the endpoint.
    #[error("write PUBKEY@ADDR:PORT")]
    Shape,
    /// Not 32 bytes in base64.
    #[error("the public key must be 44 characters of base64, as `wg pubkey` prints it")]
    PublicKey,
    /// Neither an IPv4 address nor a name, and a port.
    #[error(
        "the endpoint must be an IPv4 address or a name, and a port from 1 to 65535, as in 192.0.2.10:51820"
    )]
    Endpoint,
    /// An address that no consumer can have.
    #[error(
        "the endpoint's address must be unicast: not loopback, unspecified, multicast or broadcast"
    )]
    Unreachable,
}

impl FromStr for Consumer {
    type Err = ConsumerError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (public_key, endpoint) = text.split_once('@').ok_or(ConsumerError::Shape)?;
        if !is_wireguard_key(public_key) {
            return Err(ConsumerError::PublicKey);
        }
        let endpoint: PeerEndpoint = endpoint.parse().map_err(|_| ConsumerError::Endpoint)?;
        match endpoint {
            PeerEndpoint::Address(SocketAddr::V6(_)) => return Err(ConsumerError::Endpoint),
            PeerEndpoint::Address(SocketAddr::V4(address))
                if !omerta_verdict::Address::from(std::net::IpAddr::V4(*address.ip()))
                    .is_possible_peer() =>
            {
                return Err(ConsumerError::Unreachable);
            }
            PeerEndpoint::Address(_) | PeerEndpoint::Name { .. } => {}
        }
        Ok(Self {
            public_key: public_key.to_owned(),
            endpoint,
        })
    }
}

/// Whether `text` is 32 bytes in base64: 43 digits, of which the last carries 4 bits, and `=`.
fn is_wireguard_key(text: &str) -> bool {
    let digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    match text.as_bytes().split_last() {
        Some((b'=', digits)) => {
            digits.len() == 43
                && digits.iter().all(digit)
                && digits
                    .last()
                    .is_some_and(|last| b"AEIMQUYcgkosw048".contains(last))
        }
        _ => false,
    }
}

/// An address inside the tunnel and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelAddress {
    address: Ipv4Addr,
    prefix: u8,
}

impl TunnelAddress {
    fn holds(self, other: Ipv4Addr) -> bool {
        let mask = u32::MAX
            .checked_shl(u32::from(32 - self.prefix))
            .unwrap_or(0);
        u32::from(self.address) & mask == u32::from(other) & mask
    }
}

impl fmt::Display for TunnelAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Text that is not an address with a prefix.
#[derive(Debug, thiserror::Error)]
#[error("write an IPv4 address and a prefix from 1 to 32, as in 10.66.0.2/24")]
pub struct TunnelAddressError;

impl FromStr for TunnelAddress {
    type Err = TunnelAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, prefix) = text.split_once('/').ok_or(TunnelAddressError)?;
        let address = address.parse().map_err(|_| TunnelAddressError)?;
        let prefix = prefix.parse().map_err(|_| TunnelAddressError)?;
        if !(1..=32).contains(&prefix) {
            return Err(TunnelAddressError);
        }
        Ok(Self { address, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    #[test]
    fn consumer_round_trips() {
        for endpoint in ["192.0.2.10:51820", "consumer.example:51820"] {
            let text = format!("{KEY}@{endpoint}");
            assert_eq!(text.parse::<Consumer>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn malformed_consumer_is_refused_with_its_cause() {
        use ConsumerError::*;
        for (text, cause) in [
            (String::new(), Shape),
            (KEY.to_owned(), Shape),
            ("short@192.0.2.10:51820".to_owned(), PublicKey),
            // 43 digits whose last carries stray bits.
            (format!("{}9=@192.0.2.10:51820", &KEY[..42]), PublicKey),
            (format!("{KEY}@192.0.2.10"), Endpoint),
            (format!("{KEY}@192.0.2.10:0"), Endpoint),
            (format!("{KEY}@[2001:db8::1]:51820"), Endpoint),
            (format!("{KEY}@consumer.example"), Endpoint),
            (format!("{KEY}@127.0.0.1:51820"), Unreachable),
        ] {
            assert_eq!(text.parse::<Consumer>(), Err(cause), "{text}");
        }
    }

    #[test]
    fn guest_names_are_what_the_daemon_takes() {
        for name in ["a", "alpha-1", &"a".repeat(32)] {
            assert!(name.parse::<GuestName>().is_ok(), "{name}");
        }
        for name in ["", "1a", "-a", "A", "a_b", "a/b", "ä", &"a".repeat(33)] {
            assert!(name.parse::<GuestName>().is_err(), "{name}");
        }
    }

    #[test]
    fn tunnel_network_holds_its_own() {
        let address: TunnelAddress = "10.66.0.2/24".parse().unwrap();
        assert!(address.holds(Ipv4Addr::new(10, 66, 0, 1)));
        assert!(!address.holds(Ipv4Addr::new(10, 66, 1, 1)));
        for text in [
            "10.66.0.2",
            "10.66.0.2/0",
            "10.66.0.2/33",
            "10.66.0/24",
            "a/24",
        ] {
            assert!(text.parse::<TunnelAddress>().is_err(), "{text}");
        }
    }
}
