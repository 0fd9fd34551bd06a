//! `tunnel`: what iperf3 gets by TCP from a guarded guest's namespace to a consumer's, without a tunnel, by WireGuard at both
//! ends in the guest, and by a tunnel that the host keeps, for one second a round; `tunnel-cpu`: what all of this machine
//! spends on it meanwhile, so only a quiet machine tells;
//! `tunnel-move`: from the call that commits a consumer's move, and from the request to omertad for it, until a frame from where
//! it is then is allowed: median and 99th percentile of a hundred.
//!
//! The guest's interface is a veth, so that the guest has a stack.

mod moves;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZero;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use omerta_dataplane::Guard;
use omerta_kernel_tests::{CONSUMER, GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, config};
use omerta_test_support::{Namespace, Veth};
use omerta_tunnel::{
    AllowedIp, Device, DeviceError, Kernel, Peer, Peers, PublicKey, Secret, Setup, Userspace,
};
use omerta_verdict::Mode;

use crate::iperf::{self, PORT};
use crate::report::Bench;
use crate::rounds::{Case, Rounds, Samples};

const WIREGUARD: u16 = 51820;
const UPLINK: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The two ends within a tunnel.
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Whom wireguard-go runs as; nobody else does.
const USER: u32 = 1_900_070_000;

/// A guarded guest, its host, and its consumer with iperf3's server.
struct Line {
    guest: Namespace,
    host: Namespace,
    consumer: Namespace,
    server: Child,
    /// Where the socket of a tunnel that the host keeps is, for as long as there is one.
    _outside: Option<Namespace>,
}

impl Line {
    fn new() -> Result<Self> {
        let [guest, host, consumer] = [
            Namespace::new("omerta-bench")?,
            Namespace::new("omerta-bench")?,
            Namespace::new("omerta-bench")?,
        ];
        for namespace in [&guest, &host, &consumer] {
            namespace.disable_ipv6()?;
            namespace.ip("link set lo up")?;
        }
        host.enable_forwarding()?;
        Veth::across((&host, "tap"), (&guest, "eth0"))?;
        Veth::across((&host, "uplink"), (&consumer, "eth0"))?;
        guest.ip(&format!("link set eth0 address {GUEST_MAC} up"))?;
        host.ip(&format!("link set tap address {GATEWAY_MAC}"))?;
        let mut policy = config(Mode::Filtered);
        policy.allow = vec![
            format!("tcp:{CONSUMER}:{PORT}").parse()?,
            format!("udp:{CONSUMER}:{WIREGUARD}").parse()?,
        ];
        host.enter(|| Guard::attach("tap", &policy))??;
        for (namespace, step) in [
            (&host, format!("addr add {GATEWAY}/32 dev tap")),
            (&host, "link set tap up".to_owned()),
            (&host, format!("route add {GUEST}/32 dev tap")),
            (&host, format!("addr add {UPLINK}/24 dev uplink")),
            (&host, "link set uplink up".to_owned()),
            // The guard lets the host ask the guest nothing.
            (
                &host,
                format!("neigh replace {GUEST} lladdr {GUEST_MAC} dev tap nud permanent"),
            ),
            (&guest, format!("addr add {GUEST}/24 dev eth0")),
            (&guest, format!("route add default via {GATEWAY}")),
            (&consumer, format!("addr add {CONSUMER}/24 dev eth0")),
            (&consumer, "link set eth0 up".to_owned()),
            (&consumer, format!("route add default via {UPLINK}")),
        ] {
            namespace.ip(&step)?;
        }
        let server = iperf::serve(&consumer)?;
        Ok(Self {
            guest,
            host,
            consumer,
            server,
            _outside: None,
        })
    }

    /// The same with a tunnel that the host keeps: tap, guard and the tunnel's interface are in a namespace that has no other
    /// way out, and what the guard allows is in the tunnel.
    fn kept<D: Device>(mut make: impl FnMut(&Namespace) -> Result<D>) -> Result<(Self, [D; 2])> {
        let [guest, host, consumer, outside] = [
            Namespace::new("omerta-bench")?,
            Namespace::new("omerta-bench")?,
            Namespace::new("omerta-bench")?,
            Namespace::new("omerta-bench")?,
        ];
        for namespace in [&guest, &host, &consumer, &outside] {
            namespace.disable_ipv6()?;
            namespace.ip("link set lo up")?;
        }
        host.enable_forwarding()?;
        Veth::across((&host, "tap"), (&guest, "eth0"))?;
        Veth::across((&outside, "uplink"), (&consumer, "eth0"))?;
        guest.ip(&format!("link set eth0 address {GUEST_MAC} up"))?;
        host.ip(&format!("link set tap address {GATEWAY_MAC}"))?;
        let mut policy = config(Mode::Filtered);
        policy.allow = vec![format!("tcp:{FAR}:{PORT}").parse()?];
        host.enter(|| Guard::attach("tap", &policy))??;
        outside.ip(&format!("addr add {UPLINK}/24 dev uplink"))?;
        outside.ip("link set uplink up")?;
        consumer.ip(&format!("addr add {CONSUMER}/24 dev eth0"))?;
        consumer.ip("link set eth0 up")?;
        let mut near = make(&outside)?;
        let inside = host.enter(omerta_tunnel::Namespace::of_this_thread)??;
        near.move_to(&inside)?;
        let mut far = make(&consumer)?;
        let interface = near.interface().to_owned();
        let endpoint = Some(SocketAddr::from((CONSUMER, WIREGUARD)));
        join(&mut near, 1, endpoint, FAR)?;
        join(&mut far, 2, None, GUEST)?;
        for (namespace, step) in [
            (&host, format!("addr add {GATEWAY}/32 dev tap")),
            (&host, "link set tap up".to_owned()),
            (&host, format!("route add {GUEST}/32 dev tap")),
            (&host, format!("link set {interface} mtu 1420 up")),
            (&host, format!("route add {FAR}/32 dev {interface}")),
            (
                &host,
                format!("neigh replace {GUEST} lladdr {GUEST_MAC} dev tap nud permanent"),
            ),
            (&guest, format!("addr add {GUEST}/24 dev eth0")),
            // The path's MTU, so that no segment waits to be told of it.
            (
                &guest,
                format!("route add default via {GATEWAY} mtu lock 1420"),
            ),
            (&consumer, format!("addr add {FAR}/32 dev {interface}")),
            (&consumer, format!("link set {interface} mtu 1420 up")),
            (&consumer, format!("route add {GUEST}/32 dev {interface}")),
        ] {
            namespace.ip(&step)?;
        }
        let server = iperf::serve(&consumer)?;
        let line = Self {
            guest,
            host,
            consumer,
            server,
            _outside: Some(outside),
        };
        line.await_server(FAR)?;
        Ok((line, [near, far]))
    }

    fn await_server(&self, at: Ipv4Addr) -> Result<()> {
        iperf::await_server(&self.guest, at, 100)
    }

    /// Mbit/s that arrived, and what the machine spent on a Gbit, in seconds of a core.
    fn run(&self, at: Ipv4Addr) -> Result<(f64, f64)> {
        // The server may not be done yet with who came before.
        for _ in 0..5 {
            match self.run_once(at) {
                Ok(figures) => return Ok(figures),
                Err(_) => std::thread::sleep(Duration::from_secs(1)),
            }
        }
        self.run_once(at)
    }

    fn run_once(&self, at: Ipv4Addr) -> Result<(f64, f64)> {
        let before = busy_seconds()?;
        let report = iperf::report(&self.guest, at, &[])?;
        let busy = busy_seconds()? - before;
        let received = &report["end"]["sum_received"];
        let gbit = iperf::number(received, "bytes")? * 8.0 / 1e9;
        Ok((
            iperf::number(received, "bits_per_second")? / 1e6,
            busy / gbit,
        ))
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        // Pins outlive the namespace; a drop cannot report.
        let _ = self
            .host
            .enter(|| Guard::open("tap").and_then(Guard::detach));
    }
}

/// What all processors of this machine have worked, in seconds of one.
fn busy_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq: in hundredths on every Linux for x86.
    let of = |place: usize| ticks.get(place).copied().unwrap_or_default();
    Ok((of(0) + of(1) + of(2) + of(5) + of(6)) / 100.0)
}

/// Puts a WireGuard device at each end of the line.
fn tunnel<D: Device>(line: &Line, mut make: impl FnMut(&Namespace) -> Result<D>) -> Result<[D; 2]> {
    let ends = [
        (
            &line.guest,
            NEAR,
            FAR,
            1,
            Some(SocketAddr::from((CONSUMER, WIREGUARD))),
        ),
        (&line.consumer, FAR, NEAR, 2, None),
    ];
    let mut devices = Vec::new();
    for (namespace, own, other, number, endpoint) in ends {
        let mut device = make(namespace)?;
        join(&mut device, number, endpoint, other)?;
        let interface = device.interface().to_owned();
        namespace.ip(&format!("addr add {own}/24 dev {interface}"))?;
        namespace.ip(&format!("link set {interface} mtu 1420 up"))?;
        devices.push(device);
    }
    line.await_server(FAR)?;
    devices.try_into().ok().context("two ends")
}

/// Gives a device the key of that number, 1 or 2, and has the other be its peer, which is `other` in the tunnel.
fn join(
    device: &mut impl Device,
    number: u8,
    endpoint: Option<SocketAddr>,
    other: Ipv4Addr,
) -> Result<()> {
    device.set_up(&Setup {
        private_key: key(number),
        listen_port: NonZero::new(WIREGUARD),
    })?;
    let mut wanted = Peers::new();
    wanted.add(Peer {
        public_key: public_of(&key(3 - number))?,
        preshared_key: None,
        endpoint,
        allowed_ips: BTreeSet::from([AllowedIp::host(other.into())]),
        keepalive: None,
    })?;
    device.sync(&Peers::new(), &wanted)?;
    Ok(())
}

/// A private key that is nobody's, as every one is made (RFC 7748).
fn key(number: u8) -> Secret {
    let mut bytes = [number; 32];
    bytes[0] &= 0xf8;
    bytes[31] = (bytes[31] & 0x7f) | 0x40;
    Secret::from(bytes)
}

/// By WireGuard's own tools.
fn public_of(private: &Secret) -> Result<PublicKey> {
    let mut child = std::process::Command::new("wg")
        .arg("pubkey")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run wg")?;
    let mut stdin = child.stdin.take().context("wg reads nothing")?;
    stdin.write_all(private.base64().as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

pub fn measure(rounds: &Rounds) -> Result<Vec<Bench>> {
    let mut benches = throughput(rounds)?;
    benches.push(moves::measure()?);
    Ok(benches)
}

fn throughput(rounds: &Rounds) -> Result<Vec<Bench>> {
    let mut missing = Vec::new();
    for program in ["iperf3", "wg", "wireguard-go"] {
        if std::process::Command::new(program)
            .arg("--version")
            .output()
            .is_err()
        {
            missing.push(format!(
                "all: there is no {program} (make bench installs it)"
            ));
            return Ok(vec![Bench::of("tunnel", "Mbit/s", rounds, &[], missing)]);
        }
    }
    let directory = tempfile::tempdir()?;
    let bare = Line::new()?;
    bare.await_server(CONSUMER)?;
    let userspace_line = Line::new()?;
    let mut made = 0;
    let _userspace = tunnel(&userspace_line, |namespace| {
        made += 1;
        let socket = directory.path().join(made.to_string());
        Ok(namespace.enter(|| Userspace::create("ombench0", &socket, USER + made, false))??)
    })?;
    let kernel_line = Line::new()?;
    let kernel = tunnel(&kernel_line, |namespace| {
        Ok(namespace.enter(|| Kernel::create("ombench0"))??)
    });
    let kernel = match kernel {
        Ok(devices) => Some(devices),
        Err(error) if matches!(error.downcast_ref(), Some(DeviceError::NoWireGuard)) => {
            missing.push(
                "guest-kernel, host-kernel: this kernel has no WireGuard (the machine with Linux 6.12 has)"
                    .to_owned(),
            );
            None
        }
        Err(error) => return Err(error),
    };
    let (kept_line, _kept) = Line::kept(|namespace| {
        made += 1;
        let socket = directory.path().join(made.to_string());
        Ok(namespace.enter(|| Userspace::create("ombench0", &socket, USER + made, false))??)
    })?;
    let kept_by_kernel = match kernel {
        Some(_) => Some(Line::kept(|namespace| {
            Ok(namespace.enter(|| Kernel::create("ombench0"))??)
        })?),
        None => None,
    };
    let costs: [RefCell<Vec<f64>>; 5] = Default::default();
    let case = |name, line: &'static str, at: Ipv4Addr, place: usize| (name, line, at, place);
    let mut wanted = vec![
        case("bare", "bare", CONSUMER, 0),
        case("guest-userspace", "bare", FAR, 1),
        case("host-userspace", "bare", FAR, 3),
    ];
    if kernel.is_some() {
        wanted.push(case("guest-kernel", "bare", FAR, 2));
    }
    if kept_by_kernel.is_some() {
        wanted.push(case("host-kernel", "bare", FAR, 4));
    }
    let kept_by_kernel = kept_by_kernel.as_ref().map_or(&kept_line, |(line, _)| line);
    let lines = [
        &bare,
        &userspace_line,
        &kernel_line,
        &kept_line,
        kept_by_kernel,
    ];
    let cases = wanted.into_iter().map(|(name, against, at, place)| {
        let (line, costs) = (lines[place], &costs[place]);
        Case::new(name, against, move || {
            let (mbit, cost) = line.run(at)?;
            costs.borrow_mut().push(cost);
            Ok(mbit)
        })
    });
    let samples = rounds.run(cases.collect())?;
    let places = [
        "bare",
        "guest-userspace",
        "guest-kernel",
        "host-userspace",
        "host-kernel",
    ];
    let spent: Vec<Samples> = samples
        .iter()
        .map(|sample| {
            let place = places
                .iter()
                .position(|name| *name == sample.name)
                .unwrap_or(0);
            // The first round does not count.
            let figures = costs[place].borrow().iter().skip(1).copied().collect();
            Samples {
                name: sample.name,
                against: sample.against,
                figures,
            }
        })
        .collect();
    Ok(vec![
        Bench::of("tunnel", "Mbit/s", rounds, &samples, missing),
        Bench::of("tunnel-cpu", "s/Gbit", rounds, &spent, Vec::new()),
    ])
}
