//! Arguments of `omerta guard`.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use omerta_dataplane::{DirectionLimits, GuardConfig, LeaseTime};
use omerta_verdict::{Address, Endpoint, MAX_ADDRESSES, Mac, Mode};

use super::Shown;
use super::limit::{self, Limit};
use super::watch::{Tap, WatchFileError};

/// The verbs of `omerta guard`.
#[derive(Debug, Subcommand)]
pub enum GuardCommand {
    /// Guard an interface; it keeps its guard until `detach`, whatever becomes of this process
    Attach(AttachArgs),

    /// Add endpoints to an interface's allowlist
    Allow(EndpointsArgs),

    /// Take endpoints off an interface's allowlist
    Revoke(EndpointsArgs),

    /// Replace an interface's allowlist, all or nothing
    Replace {
        /// The guarded interface
        interface: InterfaceName,

        /// The new allowlist: one endpoint a line, the last one too (a line that may be cut off is
        /// refused); blank lines and what follows `#` are ignored; `-` reads standard input
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },

    /// Change how frames are judged
    Mode {
        /// The guarded interface
        interface: InterfaceName,

        /// filtered, sampled or direct; conntrack too where the guard was attached in that mode
        mode: Mode,
    },

    /// Limit how much may pass; what is not named stays as it is
    Limit {
        /// The guarded interface
        interface: InterfaceName,

        /// egress-packets=N, egress-bits=N, ingress-packets=N or ingress-bits=N, with N for each
        /// second (500, 20k, 100M, 10G), or `none`
        #[arg(required = true, value_name = "WHAT=N")]
        limits: Vec<Limit>,
    },

    /// Have a guard drop everything when some time has passed, unless it is renewed by then
    #[command(after_help = "Each call begins a new lease, so it also renews one that has ended.")]
    Lease {
        /// The guarded interface
        interface: InterfaceName,

        /// How long the lease lasts from now on: 90s, 15m, 12h, 7d; `off` for ever
        #[arg(value_name = "TIME")]
        lease: LeaseTime,
    },

    /// Show an interface's policy and counters
    Show {
        /// The guarded interface
        interface: InterfaceName,

        #[command(flatten)]
        shown: Shown,
    },

    /// Print what an interface's guard programs said of their own failures, once
    #[command(
        after_help = "Of each kind of failure one line is kept in ten seconds, and some fifteen lines in all until \
they are printed. Those of omertad's guests are in its log."
    )]
    Log {
        /// The guarded interface
        interface: InterfaceName,

        /// Go on as they come, until interrupted
        #[arg(short, long)]
        follow: bool,
    },

    /// List the guarded interfaces of this network namespace
    List(Shown),

    /// Put this version's programs into guards that others have made, while they judge
    #[command(
        after_help = "Policy, flows, rates and counters are kept, and each frame is judged by the programs before or those \
after. omertad upgrades the guards of its guests itself when it starts."
    )]
    Upgrade {
        /// The guarded interfaces
        #[arg(required_unless_present = "all", value_name = "IFNAME")]
        interfaces: Vec<InterfaceName>,

        /// Every guard of this network namespace that is nobody's own
        #[arg(long, conflicts_with = "interfaces")]
        all: bool,

        #[command(flatten)]
        shown: Shown,
    },

    /// Keep declared interfaces guarded, whenever they appear, until interrupted
    #[command(
        after_help = "An interface without a guard is set down, guarded, and set up again if it was up; where it cannot be \
guarded it stays down. A guard in force is left as it is; one that lost its pins is replaced by one that enforces the same. \
A declared lease begins when the guard is attached, and is not renewed by this command: use `guard lease`. Guards outlive \
this command, and so does the fence that a [fence] declares: interfaces of its names reach nothing, and nothing reaches them, \
until this command has guarded them."
    )]
    Watch {
        /// TOML with a [[tap]] for each interface: name, and what `guard attach` takes; and a [fence] if wanted
        #[arg(long, value_name = "FILE")]
        config: PathBuf,

        /// Look once and end: with 1 where an interface could not be guarded
        #[arg(long)]
        once: bool,
    },

    /// Show what the fence of `guard watch` has kept from whom, or remove it
    #[command(
        after_help = "The fence is the table omerta_fence of nftables, in the families inet, arp and bridge. An interface \
that it names and that is guarded by other means is let through with `ip link set dev IFNAME group 28525`, or what the \
file's [fence] says for `group`."
    )]
    Fence {
        /// Remove it: interfaces that are not guarded are open then
        #[arg(long)]
        remove: bool,

        #[command(flatten)]
        shown: Shown,
    },

    /// Remove an interface's guard: everything passes again
    Detach {
        /// The guarded interface
        interface: InterfaceName,
    },

    /// List the reasons for which frames are dropped, and what they mean
    Reasons {
        /// The form of what is printed
        #[arg(
            short = 'o',
            long = "output",
            value_enum,
            value_name = "FORMAT",
            default_value = "text"
        )]
        format: ReasonsFormat,
    },
}

/// How the table of reasons is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReasonsFormat {
    /// For people
    Text,
    /// For programs
    Json,
    /// For documents
    Markdown,
}

/// Arguments of `guard allow` and `guard revoke`.
#[derive(Debug, Args)]
pub struct EndpointsArgs {
    /// The guarded interface
    pub interface: InterfaceName,

    /// udp:ADDR:PORT, tcp:ADDR:PORT or icmp:ADDR; IPv6 addresses in brackets
    #[arg(required = true, value_name = "PROTO:ADDR:PORT")]
    pub endpoints: Vec<Endpoint>,
}

/// Arguments of `guard attach`, as typed.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The interface to guard: a guest's tap, or a veth
    interface: InterfaceName,

    /// The guest's MAC address
    #[arg(long)]
    mac: Mac,

    /// An address of the guest (repeatable)
    #[arg(long = "ip", value_name = "ADDR", required = true, value_parser = parse_address)]
    addresses: Vec<IpAddr>,

    /// The gateway that the guest may resolve, of the same family as an --ip (repeatable)
    #[arg(long = "gateway", value_name = "ADDR", required = true, value_parser = parse_address)]
    gateways: Vec<IpAddr>,

    /// Where the guest's IP frames must go [default: the interface's own MAC]
    #[arg(long, value_name = "MAC")]
    gateway_mac: Option<Mac>,

    /// An endpoint that the guest may reach: udp:ADDR:PORT, tcp:ADDR:PORT or icmp:ADDR; IPv6
    /// addresses in brackets (repeatable)
    #[arg(long = "allow", value_name = "PROTO:ADDR:PORT")]
    allow: Vec<Endpoint>,

    /// How frames are judged: filtered, conntrack, sampled or direct
    #[arg(long, default_value = "filtered")]
    mode: Mode,

    /// How much may pass: egress-packets=N, egress-bits=N, ingress-packets=N or ingress-bits=N, with
    /// N for each second, such as 500, 20k, 100M, 10G (repeatable)
    #[arg(long = "limit", value_name = "WHAT=N")]
    limits: Vec<Limit>,

    /// Drop everything when this time has passed, unless `omerta guard lease` renews it: 90s, 15m,
    /// 12h, 7d [default: off]
    #[arg(long, value_name = "TIME")]
    lease: Option<LeaseTime>,

    /// Send what is allowed past the host's stack, which is faster: netfilter, so address translation
    /// too, IPsec and captures on the host's other side do not see it. IPv4 only, needs Linux 6.6, and
    /// only where the host routes for the guest
    #[arg(long)]
    redirect: bool,

    /// With --redirect: a veth whose peer, in another network namespace, owns the addresses that are
    /// routed to it: it is handed frames at once (repeatable)
    #[arg(long = "redirect-peer", value_name = "IFNAME", requires = "redirect")]
    redirect_peers: Vec<InterfaceName>,

    /// Where the kernel's verifier refuses the programs, print its last words too
    #[arg(long)]
    verbose: bool,
}

/// Arguments of `guard attach`, checked.
#[derive(Debug)]
pub struct Attachment {
    /// The interface to guard.
    pub interface: InterfaceName,
    /// What to enforce on it.
    pub config: GuardConfig,
    /// The veths whose peers are handed frames, where what is allowed is to pass the stack by.
    pub redirect: Option<Vec<InterfaceName>>,
    /// Whether the verifier's last words are wanted.
    pub verbose: bool,
}

impl AttachArgs {
    /// What a file declares for one interface.
    pub(super) fn of_tap(path: &Path, tap: Tap) -> Result<Self, WatchFileError> {
        let name = tap.name.clone();
        let unfit = |key, value: &str, why: String| WatchFileError::Value {
            path: path.to_owned(),
            tap: name.clone(),
            key,
            value: value.to_owned(),
            why,
        };
        fn each<T>(
            key: &'static str,
            values: &[String],
            parse: impl Fn(&str) -> Result<T, String>,
            unfit: &impl Fn(&'static str, &str, String) -> WatchFileError,
        ) -> Result<Vec<T>, WatchFileError> {
            let parsed = values
                .iter()
                .map(|value| parse(value).map_err(|why| unfit(key, value, why)));
            parsed.collect()
        }
        fn parsed<T: FromStr<Err: fmt::Display>>(text: &str) -> Result<T, String> {
            text.parse().map_err(|error: T::Err| error.to_string())
        }
        if let (false, Some(peer)) = (tap.redirect, tap.redirect_peer.first()) {
            return Err(unfit(
                "redirect_peer",
                peer,
                "say `redirect = true` too".into(),
            ));
        }
        Ok(Self {
            interface: parsed(&tap.name).map_err(|why| unfit("name", &tap.name, why))?,
            mac: parsed(&tap.mac).map_err(|why| unfit("mac", &tap.mac, why))?,
            addresses: each("ip", &tap.ip, parse_address, &unfit)?,
            gateways: each("gateway", &tap.gateway, parse_address, &unfit)?,
            gateway_mac: tap
                .gateway_mac
                .as_deref()
                .map(|mac| parsed(mac).map_err(|why| unfit("gateway_mac", mac, why)))
                .transpose()?,
            allow: each("allow", &tap.allow, parsed, &unfit)?,
            mode: parsed(&tap.mode).map_err(|why| unfit("mode", &tap.mode, why))?,
            limits: each("limit", &tap.limit, parsed, &unfit)?,
            lease: tap
                .lease
                .as_deref()
                .map(|lease| parsed(lease).map_err(|why| unfit("lease", lease, why)))
                .transpose()?,
            redirect: tap.redirect,
            redirect_peers: each("redirect_peer", &tap.redirect_peer, parsed, &unfit)?,
            verbose: false,
        })
    }

    /// Checks what only shows when the values are seen together.
    ///
    /// # Errors
    /// The first contradiction, naming the option and the value.
    pub fn check(self) -> Result<Attachment, AttachError> {
        check_mac("--mac", self.mac)?;
        if let Some(gateway_mac) = self.gateway_mac {
            check_mac("--gateway-mac", gateway_mac)?;
            if gateway_mac == self.mac {
                return Err(AttachError::SharedMac(gateway_mac));
            }
        }
        check_addresses("--ip", &self.addresses)?;
        check_addresses("--gateway", &self.gateways)?;
        if self.addresses.len() > MAX_ADDRESSES {
            return Err(AttachError::TooManyAddresses(self.addresses.len()));
        }
        for (index, gateway) in self.gateways.iter().enumerate() {
            if has_family_of(&self.gateways[..index], *gateway) {
                return Err(AttachError::SecondGateway(*gateway));
            }
        }
        if let Some(&address) = self.gateways.iter().find(|a| self.addresses.contains(a)) {
            return Err(AttachError::SharedAddress(address));
        }
        for &address in &self.addresses {
            if !has_family_of(&self.gateways, address) {
                return Err(AttachError::AddressWithoutGateway(address));
            }
        }
        for &gateway in &self.gateways {
            if !has_family_of(&self.addresses, gateway) {
                return Err(AttachError::GatewayWithoutAddress(gateway));
            }
        }
        for &endpoint in &self.allow {
            let reached = |a: &IpAddr| a.is_ipv4() == endpoint.address.is_v4();
            if !self.addresses.iter().any(reached) {
                return Err(AttachError::EndpointWithoutAddress(endpoint));
            }
            if self
                .addresses
                .iter()
                .any(|a| Address::from(*a) == endpoint.address)
            {
                return Err(AttachError::OwnEndpoint(endpoint));
            }
        }
        check_limits(&self.limits)?;
        let mut limits = DirectionLimits::default();
        limit::put(&self.limits, &mut limits);
        Ok(Attachment {
            verbose: self.verbose,
            redirect: self.redirect.then_some(self.redirect_peers),
            interface: self.interface,
            config: GuardConfig {
                mac: self.mac,
                addresses: self.addresses,
                gateways: self.gateways,
                gateway_mac: self.gateway_mac,
                mode: self.mode,
                allow: self.allow,
                egress: limits.egress,
                ingress: limits.ingress,
                lease: self.lease.and_then(|lease| lease.0),
                owner: None,
            },
        })
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    match text.split_once('/') {
        Some((address, _)) if address.parse::<IpAddr>().is_ok() => Err(format!(
            "this is a network: give the one address, {address}"
        )),
        _ => text
            .parse()
            .map_err(|_| "this is no IPv4 or IPv6 address".to_owned()),
    }
}

/// Fails where one thing is limited twice.
///
/// # Errors
/// [`AttachError::LimitedTwice`].
pub fn check_limits(limits: &[Limit]) -> Result<(), AttachError> {
    match limit::limited_twice(limits) {
        Some(what) => Err(AttachError::LimitedTwice(what)),
        None => Ok(()),
    }
}

fn check_mac(option: &'static str, mac: Mac) -> Result<(), AttachError> {
    if mac.is_unicast() {
        Ok(())
    } else {
        Err(AttachError::NotUnicastMac { option, mac })
    }
}

fn check_addresses(option: &'static str, addresses: &[IpAddr]) -> Result<(), AttachError> {
    for (index, &address) in addresses.iter().enumerate() {
        if !Address::from(address).is_unicast() {
            return Err(AttachError::NotUnicast { option, address });
        }
        if addresses[..index].contains(&address) {
            return Err(AttachError::Repeated { option, address });
        }
    }
    Ok(())
}

fn has_family_of(addresses: &[IpAddr], other: IpAddr) -> bool {
    addresses.iter().any(|a| a.is_ipv4() == other.is_ipv4())
}

const fn family(address: &IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "IPv4",
        IpAddr::V6(_) => "IPv6",
    }
}

/// Why the arguments of `guard attach` contradict each other.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A MAC address that is zero, multicast or broadcast.
    #[error("{option} {mac} is not unicast: give the address of one interface")]
    NotUnicastMac {
        /// The option that carries it.
        option: &'static str,
        /// The address.
        mac: Mac,
    },
    /// The guest and its gateway cannot have one MAC.
    #[error("--gateway-mac {0} is also the guest's --mac: give the gateway's own address")]
    SharedMac(Mac),
    /// An address that no host can have.
    #[error(
        "{option} {address} cannot be a host's: give a unicast address that is not loopback, unspecified, broadcast or IPv4-mapped"
    )]
    NotUnicast {
        /// The option that carries it.
        option: &'static str,
        /// The address.
        address: IpAddr,
    },
    /// An address given twice.
    #[error("{option} {address} is given twice: give each address once")]
    Repeated {
        /// The option that carries it.
        option: &'static str,
        /// The address.
        address: IpAddr,
    },
    /// More addresses than a policy holds.
    #[error("--ip is given {0} times: a guard takes at most {MAX_ADDRESSES} addresses")]
    TooManyAddresses(usize),
    /// More gateways than a policy holds.
    #[error("--gateway {0} is a second {family} gateway: give one for each family", family = family(.0))]
    SecondGateway(IpAddr),
    /// The guest and its gateway cannot have one address.
    #[error("{0} is both --ip and --gateway: give the gateway's own address")]
    SharedAddress(IpAddr),
    /// The guest could not resolve any neighbour in this family.
    #[error("--ip {0} has no --gateway of its family: add --gateway with an {family} address", family = family(.0))]
    AddressWithoutGateway(IpAddr),
    /// The guest has no address to speak to this endpoint from.
    #[error(
        "--allow {0} can never be reached without an --ip of its family: add one, or leave the endpoint out"
    )]
    EndpointWithoutAddress(Endpoint),
    /// What claims to come from the guest itself comes from somebody else.
    #[error("--allow {0} is the guest's own address: leave it out")]
    OwnEndpoint(Endpoint),
    /// Two limits of one thing.
    #[error("{0} is limited twice: give each limit once")]
    LimitedTwice(&'static str),
    /// The guest has no address to speak to this gateway from.
    #[error("--gateway {0} has no --ip of its family: add --ip with an {family} address, or leave the gateway out", family = family(.0))]
    GatewayWithoutAddress(IpAddr),
}

/// A name that can be a network interface's.
///
/// It becomes part of paths, so what could lead out of a directory is refused here. A name that is
/// well formed but longer than the kernel allows is left to be not found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text that no network interface can have as its name.
#[derive(Debug, thiserror::Error)]
#[error("an interface's name has no slash, colon, blank or control character")]
pub struct InterfaceNameError;

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = |c: char| !c.is_whitespace() && !c.is_control() && c != '/' && c != ':';
        if text.is_empty() || text == "." || text == ".." || !text.chars().all(fits) {
            return Err(InterfaceNameError);
        }
        Ok(Self(text.to_owned()))
    }
}
