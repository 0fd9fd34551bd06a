//! `iperf`: what iperf3 gets from a guest's namespace to a consumer's through the host's stack, by TCP
//! and by UDP, for one second a round.
//!
//! The guest's interface is a veth, so that the guest has a stack; UDP is what arrived.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use omerta_dataplane::Guard;
use omerta_kernel_tests::{CONSUMER, GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, config};
use omerta_test_support::{Namespace, Veth};
use omerta_verdict::Mode;
use serde_json::Value;

use crate::report::Bench;
use crate::rounds::{Case, Rounds};

/// Where iperf3's server listens.
pub const PORT: u16 = 5201;
const UPLINK: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Payload of a datagram, so that none is a fragment.
const DATAGRAM: &str = "1400";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Filter {
    None,
    Guard,
    /// A guard, and what it allows passes the stack by.
    GuardRedirect,
    Nft,
}

impl Filter {
    const fn guards(self) -> bool {
        matches!(self, Self::Guard | Self::GuardRedirect)
    }
}

/// A guest, its host and its consumer.
struct Line {
    guest: Namespace,
    host: Namespace,
    _consumer: Namespace,
    server: Child,
    filter: Filter,
}

impl Line {
    fn new(filter: Filter) -> Result<Self> {
        let [guest, host, consumer] = [
            Namespace::new("omerta-bench")?,
            Namespace::new("omerta-bench")?,
            Namespace::new("omerta-bench")?,
        ];
        for namespace in [&guest, &host, &consumer] {
            namespace.disable_ipv6()?;
        }
        host.enable_forwarding()?;
        Veth::across((&host, "tap"), (&guest, "eth0"))?;
        Veth::across((&host, "uplink"), (&consumer, "eth0"))?;
        guest.ip(&format!("link set eth0 address {GUEST_MAC} up"))?;
        host.ip(&format!("link set tap address {GATEWAY_MAC}"))?;
        if filter.guards() {
            let mut config = config(Mode::Filtered);
            config.allow = vec![
                format!("tcp:{CONSUMER}:{PORT}").parse()?,
                format!("udp:{CONSUMER}:{PORT}").parse()?,
            ];
            let guard = host.enter(|| Guard::attach("tap", &config))??;
            if filter == Filter::GuardRedirect {
                host.enter(|| guard.redirect(&[]))??;
            }
        }
        for (namespace, steps) in [
            (
                &host,
                vec![
                    format!("addr add {GATEWAY}/32 dev tap"),
                    "link set tap up".to_owned(),
                    format!("route add {GUEST}/32 dev tap"),
                    format!("addr add {UPLINK}/24 dev uplink"),
                    "link set uplink up".to_owned(),
                    // The guard lets the host ask the guest nothing.
                    format!("neigh replace {GUEST} lladdr {GUEST_MAC} dev tap nud permanent"),
                ],
            ),
            (
                &guest,
                vec![
                    format!("addr add {GUEST}/24 dev eth0"),
                    format!("route add default via {GATEWAY}"),
                ],
            ),
            (
                &consumer,
                vec![
                    format!("addr add {CONSUMER}/24 dev eth0"),
                    "link set eth0 up".to_owned(),
                    format!("route add default via {UPLINK}"),
                ],
            ),
        ] {
            for step in steps {
                namespace.ip(&step)?;
            }
        }
        if filter == Filter::Nft {
            let rules = format!(
                "table ip bench {{
                    set peers {{
                        type ipv4_addr . inet_service
                        elements = {{ {CONSUMER} . {PORT} }}
                    }}
                    chain guest {{
                        type filter hook forward priority 0; policy drop;
                        ct state established,related accept
                        iifname \"tap\" ether saddr {GUEST_MAC} ip saddr {GUEST} meta l4proto {{ tcp, udp }} ip daddr . th dport @peers accept
                    }}
                }}"
            );
            let status = host.command("nft").arg(rules).status().context("nft")?;
            if !status.success() {
                bail!("nft refused the rules");
            }
        }
        let server = serve(&consumer)?;
        let line = Self {
            guest,
            host,
            _consumer: consumer,
            server,
            filter,
        };
        await_server(&line.guest, CONSUMER, 50)?;
        Ok(line)
    }

    /// Mbit/s that arrived.
    fn run(&self, udp: bool) -> Result<f64> {
        let udp_options = ["--udp", "--bitrate", "0", "--length", DATAGRAM];
        let options = if udp { &udp_options[..] } else { &[] };
        let report = report(&self.guest, CONSUMER, options)?;
        let end = &report["end"];
        let bits = if udp {
            let sum = &end["sum"];
            let sent = number(sum, "packets")?;
            number(sum, "bits_per_second")? * (sent - number(sum, "lost_packets")?) / sent
        } else {
            number(&end["sum_received"], "bits_per_second")?
        };
        Ok(bits / 1e6)
    }
}

/// Starts a server that listens in a namespace.
pub fn serve(consumer: &Namespace) -> Result<Child> {
    let mut server = consumer.command("iperf3");
    server
        .args(["--server", "--port", &PORT.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot run iperf3 (make bench installs it)")
}

/// Waits, for so many tries, until the server answers `guest` there, by way of whatever leads there. It takes a while
/// to listen, and a first answer proves the way.
pub fn await_server(guest: &Namespace, at: Ipv4Addr, tries: u32) -> Result<()> {
    for _ in 0..tries {
        let tried = guest.enter(|| {
            let to = SocketAddr::from((at, PORT));
            TcpStream::connect_timeout(&to, Duration::from_millis(500))
        })?;
        if tried.is_ok() {
            // The server takes the connection for a client's that gave up.
            std::thread::sleep(Duration::from_millis(200));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("iperf3's server at {at}:{PORT} cannot be reached")
}

/// What a client in `guest` reports of one second.
pub fn report(guest: &Namespace, at: Ipv4Addr, options: &[&str]) -> Result<Value> {
    let mut command = guest.command("iperf3");
    command
        .args(["--json", "--time", "1", "--port", &PORT.to_string()])
        .args(["--client", &at.to_string()])
        .args(options)
        .stdin(Stdio::null());
    let output = command.output().context("cannot run iperf3")?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    match report["error"].as_str() {
        Some(error) => bail!("iperf3: {error}"),
        None => Ok(report),
    }
}

/// The number of that name in a part of a report.
pub fn number(part: &Value, name: &str) -> Result<f64> {
    part[name]
        .as_f64()
        .with_context(|| format!("{name} in iperf3's report"))
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        if self.filter.guards() {
            // Pins outlive the namespace; a drop cannot report.
            let _ = self
                .host
                .enter(|| Guard::open("tap").and_then(Guard::detach));
        }
    }
}

/// (row, against, by UDP, place in the lines)
const CASES: [(&str, &str, bool, usize); 8] = [
    ("tcp-none", "tcp-none", false, 0),
    ("tcp-guard", "tcp-none", false, 1),
    ("tcp-redirect", "tcp-none", false, 2),
    ("tcp-nft", "tcp-none", false, 3),
    ("udp-none", "udp-none", true, 0),
    ("udp-guard", "udp-none", true, 1),
    ("udp-redirect", "udp-none", true, 2),
    ("udp-nft", "udp-none", true, 3),
];

pub fn measure(rounds: Rounds) -> Result<Bench> {
    let mut missing = Vec::new();
    if std::process::Command::new("iperf3")
        .arg("--version")
        .output()
        .is_err()
    {
        missing.push("all: there is no iperf3 (make bench installs it)".to_owned());
        return Ok(Bench::of("iperf", "Mbit/s", &rounds, &[], missing));
    }
    let lines = [
        Line::new(Filter::None)?,
        Line::new(Filter::Guard)?,
        Line::new(Filter::GuardRedirect)?,
        Line::new(Filter::Nft)?,
    ];
    let cases = CASES.map(|(name, against, udp, place)| {
        let line = &lines[place];
        Case::new(name, against, move || line.run(udp))
    });
    let samples = rounds.run(cases.into())?;
    let status = lines[2].host.enter(|| Guard::open("tap")?.status())??;
    if status
        .redirect
        .is_none_or(|redirect| redirect.to_neighbours == 0)
    {
        bail!("nothing was redirected");
    }
    Ok(Bench::of("iperf", "Mbit/s", &rounds, &samples, missing))
}
