//! `omerta peer`: guests' consumers.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZero;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use omerta_api::{Guest, Peer, PeerList, PeerRequest, SecretText, route};
use omerta_tunnel::{Conf, ConfError, ConfPeer, PeerEndpoint};
use serde::Serialize;

use crate::args::Format;
use crate::args::peer::PeerCommand;
use crate::client::{Client, ClientError};
use crate::exit::Exit;
use crate::output::{Cell, Output, Side, Style, Table, bytes};

/// Carries out one command.
///
/// # Errors
/// See [`PeerError`].
pub async fn run(client: &Client, command: PeerCommand, out: &mut Output) -> Result<(), PeerError> {
    match command {
        PeerCommand::List { shown } => {
            let list: PeerList = client.get(route::PEERS).await?;
            match shown.format {
                Format::Json => Ok(out.json(&list.peers)?),
                Format::Text => Ok(out.table(&table(&list.peers))?),
            }
        }
        PeerCommand::Set {
            guest,
            endpoint,
            shown,
        } => {
            let path = route::of_guest(route::GUEST_PEER, guest.as_str());
            let request = PeerRequest {
                endpoint: endpoint.to_string(),
            };
            let guest: Guest = client.put(&path, &request).await?;
            match shown.format {
                Format::Json => Ok(out.json(&guest)?),
                Format::Text => Ok(out.line(format_args!("{} {}", guest.name, guest.consumer))?),
            }
        }
        PeerCommand::Import { file, write, shown } => {
            import(&file, write.as_deref(), shown.format, out)
        }
    }
}

fn table(peers: &[Peer]) -> Table {
    let mut table = Table::headed(&[
        (Side::Left, "GUEST"),
        (Side::Left, "STATE"),
        (Side::Left, "ENDPOINT"),
        (Side::Left, "HANDSHAKE"),
        (Side::Right, "SENT"),
        (Side::Right, "RECEIVED"),
        (Side::Right, "QUIET"),
        (Side::Right, "KEEPALIVE"),
        (Side::Left, "BY"),
        (Side::Left, "PUBLIC KEY"),
    ]);
    let counted = |count: Option<u64>| Cell::new(count.map_or("-".to_owned(), bytes));
    for peer in peers {
        table.row(vec![
            Cell::styled(Style::Heading, &peer.guest),
            Cell::new(peer.state),
            Cell::new(match &peer.name {
                Some(name) => format!("{} ({name})", peer.endpoint),
                None => peer.endpoint.clone(),
            }),
            handshake(peer),
            counted(peer.sent_bytes),
            counted(peer.received_bytes),
            Cell::new(
                peer.received_quiet_seconds
                    .map_or("-".to_owned(), |quiet| format!("{quiet} s")),
            ),
            Cell::new(keepalive(peer)),
            Cell::new(
                peer.tunnel
                    .as_ref()
                    .map_or("-", |tunnel| tunnel.witness.word()),
            ),
            Cell::new(&peer.public_key),
        ]);
    }
    table
}

/// How long ago the latest was, where that is known.
fn handshake(peer: &Peer) -> Cell {
    let age = peer
        .tunnel
        .as_ref()
        .and_then(|tunnel| tunnel.handshake_seconds);
    match (age, peer.handshake) {
        (Some(age), _) => Cell::styled(Style::Good, format!("{age} s ago")),
        (None, true) => Cell::styled(Style::Good, "yes"),
        (None, false) => Cell::new("no"),
    }
}

fn keepalive(peer: &Peer) -> String {
    match &peer.tunnel {
        None => "-".to_owned(),
        Some(tunnel) => tunnel
            .keepalive_seconds
            .map_or("off".to_owned(), |seconds| format!("{seconds} s")),
    }
}

/// What `vm run` needs of a consumer, with the names of the API's request.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Imported {
    consumer: String,
    tunnel_address: String,
    tunnel_peer: Ipv4Addr,
    #[serde(skip_serializing_if = "Option::is_none")]
    keepalive_seconds: Option<NonZero<u16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    preshared_key: Option<SecretText>,
}

/// The longest that is kept, as omertad has it: a tunnel that is up is heard that often.
const MAX_KEEPALIVE: NonZero<u16> = NonZero::new(120).unwrap();

fn import(
    file: &Path,
    write: Option<&Path>,
    format: Format,
    out: &mut Output,
) -> Result<(), PeerError> {
    let conf = Conf::parse(&read(file)?).map_err(|problem| PeerError::Conf {
        file: file.to_owned(),
        problem,
    })?;
    let imported = Imported::of(&conf).map_err(|why| PeerError::Unfit {
        file: file.to_owned(),
        why,
    })?;
    if imported.preshared_key.is_some() && write.is_none() {
        return Err(PeerError::Unfit {
            file: file.to_owned(),
            why: Unfit::PresharedKey,
        });
    }
    let text = || toml::to_string(&imported).map_err(PeerError::Encode);
    let written = match (write, format) {
        (Some(path), Format::Text) => write_private(path, text()?.as_bytes()),
        (Some(path), Format::Json) => {
            let json = serde_json::to_vec_pretty(&imported).map_err(|error| PeerError::Write {
                file: path.to_owned(),
                source: error.into(),
            })?;
            write_private(path, &json)
        }
        (None, Format::Json) => Ok(out.json(&imported)?),
        (None, Format::Text) => Ok(out.bytes(text()?.as_bytes())?),
    };
    written?;
    for line in remarks(&conf, &imported) {
        // A remark that cannot be shown is no reason to fail.
        let _ = writeln!(io::stderr(), "omerta: {}: {line}", file.display());
    }
    Ok(())
}

/// Makes a file that nobody else can read, and puts it in nobody's place.
fn write_private(path: &Path, bytes: &[u8]) -> Result<(), PeerError> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(bytes));
    written.map_err(|source| PeerError::Write {
        file: path.to_owned(),
        source,
    })
}

impl Imported {
    fn of(conf: &Conf) -> Result<Self, Unfit> {
        let peer = only_peer(conf)?;
        let endpoint = match &peer.endpoint {
            Some(PeerEndpoint::Address(SocketAddr::V6(_))) => return Err(Unfit::Ipv6),
            Some(endpoint) => endpoint,
            None => return Err(Unfit::NoEndpoint),
        };
        let (address, prefix) = conf
            .interface
            .addresses
            .iter()
            .find_map(|(address, prefix)| match address {
                IpAddr::V4(v4) => Some((*v4, *prefix)),
                IpAddr::V6(_) => None,
            })
            .ok_or(Unfit::NoAddress)?;
        let tunnel_peer = tunnel_peer(peer, address, prefix).ok_or(Unfit::NoPeerAddress)?;
        Ok(Self {
            consumer: format!("{}@{endpoint}", peer.public_key),
            tunnel_address: format!("{address}/{prefix}"),
            tunnel_peer,
            keepalive_seconds: peer.keepalive.filter(|seconds| *seconds <= MAX_KEEPALIVE),
            preshared_key: peer
                .preshared_key
                .as_ref()
                .map(|key| SecretText::from(key.base64().to_string())),
        })
    }
}

fn only_peer(conf: &Conf) -> Result<&ConfPeer, Unfit> {
    match &conf.peers[..] {
        [peer] => Ok(peer),
        [] => Err(Unfit::NoPeer),
        _ => Err(Unfit::Peers(conf.peers.len())),
    }
}

/// The consumer's own address in the tunnel: a single one that is allowed, or the first of the guest's network.
fn tunnel_peer(peer: &ConfPeer, own: Ipv4Addr, prefix: u8) -> Option<Ipv4Addr> {
    let single = peer
        .allowed_ips
        .iter()
        .find_map(|allowed| match allowed.address() {
            IpAddr::V4(v4) if allowed.is_host() && v4 != own => Some(v4),
            _ => None,
        });
    let network = own.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    let first = Ipv4Addr::from_bits(network.checked_add(1)?);
    single.or_else(|| (prefix <= 30 && first != own).then_some(first))
}

/// What of a file is not taken over.
fn remarks(conf: &Conf, imported: &Imported) -> Vec<String> {
    let mut remarks: Vec<String> = conf
        .ignored
        .iter()
        .map(|ignored| format!("line {}: {} is not used", ignored.line, ignored.key))
        .collect();
    let mut not_used = |what: &str, why: &str| remarks.push(format!("{what} is not used: {why}"));
    let interface = &conf.interface;
    if interface.listen_port.is_some() {
        not_used("ListenPort", "one that is free is taken");
    }
    if interface.mtu.is_some() {
        not_used("MTU", "the tunnel's is 1420");
    }
    for (address, prefix) in &interface.addresses {
        let address = format!("{address}/{prefix}");
        if address != imported.tunnel_address {
            let why = "a guest has one address in the tunnel, the first of IPv4";
            not_used(&format!("Address {address}"), why);
        }
    }
    if let [peer] = &conf.peers[..] {
        match peer.keepalive {
            None => not_used("PersistentKeepalive, which is off,", "25 s is"),
            Some(seconds) if seconds > MAX_KEEPALIVE => {
                let why = format!("25 s is, and {MAX_KEEPALIVE} s is the most");
                not_used(&format!("PersistentKeepalive of {seconds} s"), &why);
            }
            Some(_) => {}
        }
    }
    if conf.interface.private_key.is_some() {
        remarks.push("PrivateKey is not used: the guest makes its own, and `omerta vm show` prints its public half for the consumer".to_owned());
    }
    remarks
}

fn read(file: &Path) -> Result<Vec<u8>, PeerError> {
    let mut bytes = Vec::new();
    let most = Conf::MAX_BYTES as u64 + 1;
    let read = if file == Path::new("-") {
        io::stdin().lock().take(most).read_to_end(&mut bytes)
    } else {
        File::open(file).and_then(|file| file.take(most).read_to_end(&mut bytes))
    };
    match read {
        Ok(_) => Ok(bytes),
        Err(source) => Err(PeerError::Read {
            file: file.to_owned(),
            source,
        }),
    }
}

/// Why a file that can be read says nothing that a guest can be run with.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// There is nobody to reach.
    #[error("it has no [Peer]: give the file that a client of the consumer's WireGuard uses")]
    NoPeer,
    /// It is a server's.
    #[error(
        "it has {0} of [Peer], and a guest has one consumer: give the file that a client of it uses"
    )]
    Peers(usize),
    /// It is a server's.
    #[error(
        "its [Peer] has no Endpoint: give the file that a client of the consumer's WireGuard uses"
    )]
    NoEndpoint,
    /// Guests have no IPv6.
    #[error("its Endpoint is IPv6, which guests do not have: give an IPv4 one")]
    Ipv6,
    /// What is printed is seen.
    #[error("it has a PresharedKey: give --write FILE, which nobody else can read")]
    PresharedKey,
    /// The guest's address is not known.
    #[error("[Interface] has no IPv4 Address: write the guest's own in the tunnel")]
    NoAddress,
    /// The consumer's address is not known.
    #[error(
        "the consumer's address in the tunnel is not known: add it to AllowedIPs, as in 10.66.0.1/32"
    )]
    NoPeerAddress,
}

/// Why a command about consumers failed.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// omertad did not do it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The file cannot be read.
    #[error("cannot read {}: give a .conf of wg or wg-quick, or -", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The file cannot be made.
    #[error("cannot write {}: give a name that is free", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The file is none of WireGuard's.
    #[error("{}, {problem}", file.display())]
    Conf {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: ConfError,
    },
    /// The file is one of WireGuard's, and of no use.
    #[error("{}: {why}", file.display())]
    Unfit {
        /// The file.
        file: PathBuf,
        /// What it lacks.
        why: Unfit,
    },
    /// What was read cannot be written.
    #[error("cannot write what the file says as TOML")]
    Encode(#[source] toml::ser::Error),
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl PeerError {
    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Client(error) => error.exit(),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Exit::NotFound,
            Self::Conf { .. } | Self::Unfit { .. } => Exit::Usage,
            Self::Read { .. } | Self::Write { .. } | Self::Encode(_) | Self::Output(_) => {
                Exit::Failed
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=";

    fn imported(interface: &str, peer: &str) -> Result<Imported, Unfit> {
        let text = format!("[Interface]\n{interface}\n[Peer]\nPublicKey = {KEY}\n{peer}\n");
        Imported::of(&Conf::parse(text.as_bytes()).unwrap())
    }

    #[test]
    fn a_clients_file_says_what_a_guest_needs() {
        let endpoint = "Endpoint = 192.0.2.10:51820\nAllowedIPs = 0.0.0.0/0";
        let found = imported("Address = fd00::2/64, 10.9.0.7/24", endpoint).unwrap();
        assert_eq!(found.consumer, format!("{KEY}@192.0.2.10:51820"));
        assert_eq!(found.tunnel_address, "10.9.0.7/24");
        assert_eq!(found.tunnel_peer.to_string(), "10.9.0.1");
        let named = format!("{endpoint}, 10.9.0.254/32");
        let found = imported("Address = 10.9.0.7/24", &named).unwrap();
        assert_eq!(found.tunnel_peer.to_string(), "10.9.0.254");
        assert_eq!((found.keepalive_seconds, found.preshared_key), (None, None));
        let kept = format!("{endpoint}\nPresharedKey = {KEY}\nPersistentKeepalive = 120");
        let found = imported("Address = 10.9.0.7/24", &kept).unwrap();
        assert_eq!(found.keepalive_seconds, NonZero::new(120));
        assert_eq!(found.preshared_key, Some(KEY.to_owned().into()));
        let rare = kept.replace("120", "121");
        let found = imported("Address = 10.9.0.7/24", &rare).unwrap();
        assert_eq!(found.keepalive_seconds, None);
        let by_name = "Endpoint = vpn.example.org:1";
        let found = imported("Address = 10.9.0.7/24", by_name).unwrap();
        assert_eq!(found.consumer, format!("{KEY}@vpn.example.org:1"));
    }

    #[test]
    fn what_a_guest_cannot_be_given_is_refused_and_not_left_out() {
        let address = "Address = 10.9.0.7/24";
        let endpoint = "Endpoint = 192.0.2.10:51820";
        for (interface, peer, why) in [
            (address, "", Unfit::NoEndpoint),
            (address, "Endpoint = [2001:db8::1]:1", Unfit::Ipv6),
            ("Address = fd00::2/64", endpoint, Unfit::NoAddress),
            ("Address = 10.9.0.7/32", endpoint, Unfit::NoPeerAddress),
            ("Address = 10.9.0.1/24", endpoint, Unfit::NoPeerAddress),
            (
                address,
                &format!(
                    "{endpoint}\n[Peer]\nPublicKey = QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="
                ),
                Unfit::Peers(2),
            ),
        ] {
            assert_eq!(imported(interface, peer), Err(why), "{interface} {peer}");
        }
    }
}
