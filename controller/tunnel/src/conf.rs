//! `.conf` files of `wg` and `wg-quick`.
//!
//! Errors name the line and never quote what stands after a `=`: it may be a key.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZero;
use std::str::FromStr;

use crate::{AllowedIp, PeerEndpoint, PublicKey, Secret};

/// What a `.conf` file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conf {
    /// Its own side.
    pub interface: Interface,
    /// The others, in the file's order.
    pub peers: Vec<ConfPeer>,
    /// What stands in the file and is not used.
    pub ignored: Vec<Ignored>,
}

/// The section `[Interface]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its private key.
    pub private_key: Option<Secret>,
    /// The port that it listens on.
    pub listen_port: Option<NonZero<u16>>,
    /// Its addresses, each with the prefix of its network.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Its MTU.
    pub mtu: Option<u16>,
}

/// A section `[Peer]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfPeer {
    /// Who it is.
    pub public_key: PublicKey,
    /// What both know beside their keys.
    pub preshared_key: Option<Secret>,
    /// Where it is reached.
    pub endpoint: Option<PeerEndpoint>,
    /// Whose packets are its own.
    pub allowed_ips: BTreeSet<AllowedIp>,
    /// Seconds between packets that only keep the way open.
    pub keepalive: Option<NonZero<u16>>,
}

/// A line that is well formed and not used: commands, routes and names are the machine's own affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ignored {
    /// Its number, from 1.
    pub line: usize,
    /// Its key, as WireGuard's manual spells it.
    pub key: &'static str,
}

/// Why a file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct ConfError {
    /// The line's number, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The file is longer than any.
    #[error("the file has more than {max} bytes", max = Conf::MAX_BYTES)]
    TooLong,
    /// It is no text.
    #[error("not UTF-8")]
    NotText,
    /// It is neither a section nor a key with a value.
    #[error("write [Interface], [Peer] or KEY = VALUE")]
    Shape,
    /// A key stands before any section.
    #[error("`{0}` stands before [Interface] or [Peer]")]
    NoSection(&'static str),
    /// The section or key is not WireGuard's, or belongs into the other section.
    #[error("`{name}` is not known in {place}")]
    Unknown {
        /// What it is called, cut short.
        name: String,
        /// Where it stands.
        place: &'static str,
    },
    /// It stands there twice.
    #[error("`{0}` stands here for the second time")]
    Twice(&'static str),
    /// A section lacks what it must have.
    #[error("this [Peer] has no PublicKey")]
    NoPublicKey,
    /// Another peer has the same key.
    #[error("another [Peer] has this PublicKey")]
    SameKey,
    /// Another peer has the same network.
    #[error("another [Peer] has {0} among its AllowedIPs")]
    SameAllowedIp(AllowedIp),
    /// The value is not one of the key's.
    #[error("{key} must be {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
    },
}

/// Keys of `[Interface]` that are another's affair.
const IGNORED: [&str; 8] = [
    "DNS",
    "Table",
    "PreUp",
    "PostUp",
    "PreDown",
    "PostDown",
    "SaveConfig",
    "FwMark",
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Interface,
    Peer,
}

impl Section {
    const fn title(self) -> &'static str {
        match self {
            Self::Interface => "[Interface]",
            Self::Peer => "[Peer]",
        }
    }
}

/// A section `[Peer]` that is being read.
#[derive(Default)]
struct Draft {
    line: usize,
    public_key: Option<PublicKey>,
    preshared_key: Option<Secret>,
    endpoint: Option<PeerEndpoint>,
    allowed_ips: BTreeSet<AllowedIp>,
    keepalive: Option<Option<NonZero<u16>>>,
}

#[derive(Default)]
struct Reading {
    conf: Conf,
    section: Option<Section>,
    has_interface: bool,
    peer: Option<Draft>,
}

impl Conf {
    /// The longest file that is read.
    pub const MAX_BYTES: usize = 1 << 20;

    /// Reads a file.
    ///
    /// # Errors
    /// The first line that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(Problem::TooLong.at(1));
        }
        let mut reading = Reading::default();
        let mut last = 0;
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            last = index + 1;
            let outcome = std::str::from_utf8(line)
                .map_err(|_| Problem::NotText.at(last))
                .and_then(|line| reading.line(last, line));
            outcome?;
        }
        reading.end_peer()?;
        if !reading.has_interface && reading.conf.peers.is_empty() {
            return Err(Problem::Shape.at(last));
        }
        Ok(reading.conf)
    }
}

impl Reading {
    fn line(&mut self, number: usize, line: &str) -> Result<(), ConfError> {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            return Ok(());
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            return self.begin(number, name);
        }
        let (key, value) = line
            .split_once('=')
            .ok_or_else(|| Problem::Shape.at(number))?;
        let (key, value) = (key.trim(), value.trim());
        let outcome = match self.section {
            Some(Section::Interface) => self.of_interface(number, key, value),
            Some(Section::Peer) => self.of_peer(key, value),
            None => match known(key) {
                Some(key) => Err(Problem::NoSection(key)),
                None => Err(unknown(key, "the file's head")),
            },
        };
        outcome.map_err(|problem| problem.at(number))
    }

    fn begin(&mut self, number: usize, name: &str) -> Result<(), ConfError> {
        self.end_peer()?;
        if name.eq_ignore_ascii_case("Interface") {
            if self.has_interface {
                return Err(Problem::Twice("[Interface]").at(number));
            }
            self.has_interface = true;
            self.section = Some(Section::Interface);
        } else if name.eq_ignore_ascii_case("Peer") {
            self.section = Some(Section::Peer);
            self.peer = Some(Draft {
                line: number,
                ..Draft::default()
            });
        } else {
            return Err(unknown(name, "WireGuard's configuration").at(number));
        }
        Ok(())
    }

    fn of_interface(&mut self, line: usize, key: &str, value: &str) -> Result<(), Problem> {
        let interface = &mut self.conf.interface;
        let is = |name: &str| key.eq_ignore_ascii_case(name);
        if is("PrivateKey") {
            once(
                &mut interface.private_key,
                "PrivateKey",
                parsed(KEY, "PrivateKey", value)?,
            )
        } else if is("ListenPort") {
            let port = parsed("a port, 1 to 65535", "ListenPort", value)?;
            once(&mut interface.listen_port, "ListenPort", port)
        } else if is("MTU") {
            let mtu = parsed("a number of bytes, 576 to 65535", "MTU", value)?;
            if mtu < 576 {
                return Err(expected("MTU", "a number of bytes, 576 to 65535"));
            }
            once(&mut interface.mtu, "MTU", mtu)
        } else if is("Address") {
            for part in value.split(',') {
                interface.addresses.push(interface_address(part.trim())?);
            }
            Ok(())
        } else if let Some(key) = IGNORED.into_iter().find(|name| is(name)) {
            self.conf.ignored.push(Ignored { line, key });
            Ok(())
        } else {
            Err(unknown(key, Section::Interface.title()))
        }
    }

    fn of_peer(&mut self, key: &str, value: &str) -> Result<(), Problem> {
        let is = |name: &str| key.eq_ignore_ascii_case(name);
        let Some(peer) = &mut self.peer else {
            return Err(unknown(key, "the file's head"));
        };
        if is("PublicKey") {
            once(
                &mut peer.public_key,
                "PublicKey",
                parsed(KEY, "PublicKey", value)?,
            )
        } else if is("PresharedKey") {
            once(
                &mut peer.preshared_key,
                "PresharedKey",
                parsed(KEY, "PresharedKey", value)?,
            )
        } else if is("Endpoint") {
            let endpoint = parsed(
                "ADDRESS:PORT, [ADDRESS6]:PORT or NAME:PORT",
                "Endpoint",
                value,
            )?;
            once(&mut peer.endpoint, "Endpoint", endpoint)
        } else if is("PersistentKeepalive") {
            let seconds = match value {
                "off" => 0,
                _ => parsed::<u16>("off or seconds, 0 to 65535", "PersistentKeepalive", value)?,
            };
            once(
                &mut peer.keepalive,
                "PersistentKeepalive",
                NonZero::new(seconds),
            )
        } else if is("AllowedIPs") {
            for part in value
                .split(',')
                .map(str::trim)
                .filter(|part| !part.is_empty())
            {
                peer.allowed_ips.insert(parsed(
                    "ADDRESS/PREFIX, separated by commas",
                    "AllowedIPs",
                    part,
                )?);
            }
            Ok(())
        } else {
            Err(unknown(key, Section::Peer.title()))
        }
    }

    fn end_peer(&mut self) -> Result<(), ConfError> {
        let Some(peer) = self.peer.take() else {
            return Ok(());
        };
        let line = peer.line;
        let public_key = peer
            .public_key
            .ok_or_else(|| Problem::NoPublicKey.at(line))?;
        for other in &self.conf.peers {
            if other.public_key == public_key {
                return Err(Problem::SameKey.at(line));
            }
            if let Some(same) = other.allowed_ips.intersection(&peer.allowed_ips).next() {
                return Err(Problem::SameAllowedIp(*same).at(line));
            }
        }
        self.conf.peers.push(ConfPeer {
            public_key,
            preshared_key: peer.preshared_key,
            endpoint: peer.endpoint,
            allowed_ips: peer.allowed_ips,
            keepalive: peer.keepalive.flatten(),
        });
        Ok(())
    }
}

const KEY: &str = "a key of 44 characters, as `wg genkey` and `wg pubkey` print them";

impl Problem {
    const fn at(self, line: usize) -> ConfError {
        ConfError {
            line,
            problem: self,
        }
    }
}

fn expected(key: &'static str, expected: &'static str) -> Problem {
    Problem::Value { key, expected }
}

fn parsed<T: FromStr>(what: &'static str, key: &'static str, value: &str) -> Result<T, Problem> {
    value.parse().map_err(|_| expected(key, what))
}

fn once<T>(place: &mut Option<T>, key: &'static str, value: T) -> Result<(), Problem> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(Problem::Twice(key)),
    }
}

fn interface_address(text: &str) -> Result<(IpAddr, u8), Problem> {
    // Its host bits mean something, so it is read as a network only to be checked.
    let network: AllowedIp = parsed("ADDRESS/PREFIX, separated by commas", "Address", text)?;
    let address = text.split('/').next().unwrap_or_default();
    let address = parsed("ADDRESS/PREFIX, separated by commas", "Address", address)?;
    Ok((address, network.prefix()))
}

/// WireGuard's own keys, for complaints.
fn known(key: &str) -> Option<&'static str> {
    const KEYS: [&str; 9] = [
        "PrivateKey",
        "ListenPort",
        "MTU",
        "Address",
        "PublicKey",
        "PresharedKey",
        "Endpoint",
        "PersistentKeepalive",
        "AllowedIPs",
    ];
    let is = |name: &&str| key.eq_ignore_ascii_case(name);
    KEYS.into_iter().chain(IGNORED).find(is)
}

fn unknown(name: &str, place: &'static str) -> Problem {
    let name = name
        .chars()
        .take(32)
        .flat_map(char::escape_default)
        .collect();
    Problem::Unknown { name, place }
}
