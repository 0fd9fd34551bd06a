//! Who rents a guest: WireGuard in a namespace of its own, and a page behind it.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use omerta_test_support::{Namespace, Process};

use crate::bounded;
use crate::interrupt;
use crate::leftovers::Leftovers;
use crate::page::Page;

pub const PORT: u16 = 51820;

const LIMIT: Duration = Duration::from_secs(5);

/// One consumer.
pub struct Consumer<'a> {
    namespace: &'a Namespace,
    interface: String,
    /// Where the guest reaches it.
    pub endpoint: SocketAddrV4,
    /// Its WireGuard public key.
    pub public_key: String,
    /// The page's address inside the tunnel, which is also the guest's peer.
    pub tunnel_peer: Ipv4Addr,
    /// The guest's address inside the tunnel.
    pub tunnel_guest: Ipv4Addr,
    /// What its page says.
    pub greeting: String,
    /// How its WireGuard is made.
    pub implementation: &'static str,
    _page: Page,
    _wireguard: Wireguard,
}

/// Where a consumer stands.
pub struct Place<'a> {
    pub namespace: &'a Namespace,
    /// Tells the consumers of one demo apart.
    pub letter: char,
    pub address: Ipv4Addr,
    /// The third number of the tunnel's network, 10.N.0.0/24.
    pub tunnel_network: u8,
}

impl<'a> Consumer<'a> {
    /// Sets up a consumer's WireGuard and page.
    pub fn open(place: &Place<'a>, directory: &Path, leftovers: &mut Leftovers) -> Result<Self> {
        let namespace = place.namespace;
        // wireguard-go's control sockets are shared by all namespaces: the name is this process's.
        let interface = format!("omw{}{}", std::process::id(), place.letter);
        let tunnel_peer = Ipv4Addr::new(10, place.tunnel_network, 0, 1);
        let (wireguard, implementation) =
            Wireguard::start(namespace, &interface, directory, leftovers)?;
        let private_key = bounded::expect(namespace_wg(namespace, &["genkey"]), "", LIMIT)?;
        let public_key =
            bounded::expect(namespace_wg(namespace, &["pubkey"]), &private_key, LIMIT)?;
        let port = PORT.to_string();
        let set = [
            "set",
            &interface,
            "private-key",
            "/dev/stdin",
            "listen-port",
            &port,
        ];
        bounded::expect(namespace_wg(namespace, &set), &private_key, LIMIT)?;
        namespace.ip(&format!("address add {tunnel_peer}/24 dev {interface}"))?;
        namespace.ip(&format!("link set {interface} mtu 1420 up"))?;
        let greeting = format!(
            "Greetings from consumer {}",
            place.letter.to_ascii_uppercase()
        );
        let page = Page::serve(
            namespace,
            SocketAddrV4::new(tunnel_peer, 80),
            &format!("{greeting}\n"),
        )?;
        Ok(Self {
            namespace,
            interface,
            endpoint: SocketAddrV4::new(place.address, PORT),
            public_key: public_key.trim().to_owned(),
            tunnel_peer,
            tunnel_guest: Ipv4Addr::new(10, place.tunnel_network, 0, 2),
            greeting,
            implementation,
            _page: page,
            _wireguard: wireguard,
        })
    }

    /// `PUBKEY@ADDR:PORT`, as the command line wants it.
    pub fn spec(&self) -> String {
        format!("{}@{}", self.public_key, self.endpoint)
    }

    /// Lets one guest in, and no other.
    pub fn welcome(&self, guest_key: &str) -> Result<()> {
        for peer in self
            .show("peers")?
            .lines()
            .filter(|peer| *peer != guest_key)
        {
            let remove = ["set", &self.interface, "peer", peer, "remove"];
            bounded::expect(namespace_wg(self.namespace, &remove), "", LIMIT)?;
        }
        let allowed = format!("{}/32", self.tunnel_guest);
        let add = [
            "set",
            &self.interface,
            "peer",
            guest_key,
            "allowed-ips",
            &allowed,
        ];
        bounded::expect(namespace_wg(self.namespace, &add), "", LIMIT)?;
        Ok(())
    }

    /// Has its WireGuard listen on another port; where the guest reaches it then.
    pub fn move_to(&self, port: u16) -> Result<SocketAddrV4> {
        let text = port.to_string();
        let listen = ["set", &self.interface, "listen-port", &text];
        bounded::expect(namespace_wg(self.namespace, &listen), "", LIMIT)?;
        Ok(SocketAddrV4::new(*self.endpoint.ip(), port))
    }

    /// Serves a download within the tunnel that goes on until `over`. Also tells its URL.
    pub fn serve_download(&self, over: Arc<AtomicBool>) -> Result<(Page, String)> {
        let at = SocketAddrV4::new(self.tunnel_peer, 8080);
        let page = Page::download(self.namespace, at, over)?;
        Ok((page, format!("http://{at}/")))
    }

    /// Whether the consumer's own WireGuard has shaken hands with the guest it let in.
    pub fn has_shaken_hands(&self) -> Result<bool> {
        let handshakes = self.show("latest-handshakes")?;
        Ok(handshakes
            .lines()
            .any(|line| line.split('\t').nth(1).is_some_and(|at| at != "0")))
    }

    /// How many bytes its WireGuard has sent to the guest.
    pub fn sent(&self) -> Result<u64> {
        let transfer = self.show("transfer")?;
        let sent = transfer
            .lines()
            .map(|line| line.split('\t').nth(2)?.parse::<u64>().ok());
        sent.sum::<Option<_>>().context("wg show tells no transfer")
    }

    fn show(&self, what: &str) -> Result<String> {
        bounded::expect(
            namespace_wg(self.namespace, &["show", &self.interface, what]),
            "",
            LIMIT,
        )
    }
}

fn namespace_wg(namespace: &Namespace, arguments: &[&str]) -> std::process::Command {
    let mut command = namespace.command("wg");
    command.args(arguments);
    command
}

/// The interface: the kernel's, which goes with its namespace, or a process.
struct Wireguard {
    process: Option<Process>,
    socket: PathBuf,
}

impl Wireguard {
    fn start(
        namespace: &Namespace,
        interface: &str,
        directory: &Path,
        leftovers: &mut Leftovers,
    ) -> Result<(Self, &'static str)> {
        let socket = PathBuf::from(format!("/var/run/wireguard/{interface}.sock"));
        if namespace
            .ip(&format!("link add {interface} type wireguard"))
            .is_ok()
        {
            return Ok((
                Self {
                    process: None,
                    socket,
                },
                "the kernel's WireGuard",
            ));
        }
        leftovers.watch_path(&socket);
        let log = directory.join(format!("{interface}.log"));
        let log = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let errors = log
            .try_clone()
            .context("cannot share the log of wireguard-go")?;
        let mut command = namespace.command("wireguard-go");
        command
            .args(["-f", interface])
            .stdin(std::process::Stdio::null())
            .stdout(log)
            .stderr(errors);
        let process = Process::spawn(command).context(
            "this kernel has no WireGuard and wireguard-go cannot be started either: run `make setup`",
        )?;
        let mut started = Self {
            process: Some(process),
            socket,
        };
        for _ in 0..100 {
            if started.socket.exists() {
                return Ok((started, "wireguard-go"));
            }
            if let Some(status) = started
                .process
                .as_mut()
                .map(Process::ended)
                .transpose()?
                .flatten()
            {
                bail!("wireguard-go ended at once ({status})");
            }
            interrupt::sleep(Duration::from_millis(50))?;
        }
        bail!("wireguard-go made no {} in 5 s", started.socket.display())
    }
}

impl Drop for Wireguard {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // A drop cannot report; the process is killed right after, if need be.
            let _ = process.signal(Signal::SIGTERM);
            let _ = process.wait(Duration::from_secs(2));
        }
        self.process = None;
        let _ = fs::remove_file(&self.socket);
    }
}
