//! `tunnel`: what iperf3 gets by TCP from a guarded guest's namespace to a consumer's, without a tunnel and by WireGuard at both
//! ends, for one second a round; `tunnel-cpu`: what all of this machine spends on it meanwhile, so only a quiet machine tells;
//! `tunnel-move`: from the call that commits a consumer's move, and from the request to omertad for it, until a frame from where
//! it is then is allowed: median and 99th percentile of a hundred.
//!
//! The guest's interface is a veth, so that the guest has a stack.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZero;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use omerta_dataplane::Guard;
use omerta_kernel_tests::{
    CONSUMER, GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, config, ethernet, udp,
};
use omerta_test_support::{FrameSender, Namespace, Veth, write_bare_guest};
use omerta_tunnel::{
    AllowedIp, Device, DeviceError, Kernel, Peer, Peers, PublicKey, Secret, Setup, Userspace,
};
use omerta_verdict::{Mac, Mode};

use crate::iperf::{self, PORT};
use crate::launch::{Provider, SPEAKS};
use crate::report::Bench;
use crate::rounds::{Case, Rounds, Samples};

const WIREGUARD: u16 = 51820;
const UPLINK: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The two ends within a tunnel.
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// Whom wireguard-go runs as; nobody else does.
const USER: u32 = 1_900_070_000;
/// A guest's consumer may move twenty times a minute.
const GUESTS: usize = 5;
const MOVES: u16 = 20;
/// Commits without omertad.
const COMMITS: u16 = 101;

/// A guarded guest, its host, and its consumer with iperf3's server.
struct Line {
    guest: Namespace,
    host: Namespace,
    consumer: Namespace,
    server: Child,
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
        })
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
        let interface = device.interface().to_owned();
        namespace.ip(&format!("addr add {own}/24 dev {interface}"))?;
        namespace.ip(&format!("link set {interface} mtu 1420 up"))?;
        devices.push(device);
    }
    line.await_server(FAR)?;
    devices.try_into().ok().context("two ends")
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
    benches.push(moves()?);
    Ok(benches)
}

fn throughput(rounds: &Rounds) -> Result<Vec<Bench>> {
    let mut missing = vec!["host tunnels, which are not built yet".to_owned()];
    for program in ["iperf3", "wg", "wireguard-go"] {
        if std::process::Command::new(program)
            .arg("--version")
            .output()
            .is_err()
        {
            missing.push(format!(
                "all others: there is no {program} (make bench installs it)"
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
                "guest-kernel: this kernel has no WireGuard (the machine with Linux 6.12 has)"
                    .to_owned(),
            );
            None
        }
        Err(error) => return Err(error),
    };
    let costs: [RefCell<Vec<f64>>; 3] = Default::default();
    let case = |name, line: &'static str, at: Ipv4Addr, place: usize| (name, line, at, place);
    let mut wanted = vec![
        case("bare", "bare", CONSUMER, 0),
        case("guest-userspace", "bare", FAR, 1),
    ];
    if kernel.is_some() {
        wanted.push(case("guest-kernel", "bare", FAR, 2));
    }
    let lines = [&bare, &userspace_line, &kernel_line];
    let cases = wanted.into_iter().map(|(name, against, at, place)| {
        let (line, costs) = (lines[place], &costs[place]);
        Case::new(name, against, move || {
            let (mbit, cost) = line.run(at)?;
            costs.borrow_mut().push(cost);
            Ok(mbit)
        })
    });
    let samples = rounds.run(cases.collect())?;
    let places = ["bare", "guest-userspace", "guest-kernel"];
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

/// Microseconds until a frame from the new endpoint is allowed, from the commit's call and from the request's first byte.
fn moves() -> Result<Bench> {
    let directory = tempfile::tempdir().context("cannot make a directory")?;
    let images = directory.path().join("images");
    write_bare_guest(&images.join("tiny"), SPEAKS).context("cannot write the small guest")?;
    let provider = Provider::start(directory.path(), &images)?;
    let socket = directory.path().join("omertad.sock");
    let mut figures = Vec::new();
    for _ in 0..GUESTS {
        let guest = provider.run("tiny", 64)?;
        let shown = guest.show()?;
        let text = |field: &str| {
            let value = shown[field].as_str();
            Ok::<_, anyhow::Error>(
                value
                    .with_context(|| format!("{field} of a guest"))?
                    .to_owned(),
            )
        };
        let (tap, name) = (text("interface")?, text("name")?);
        let (mac, address) = (text("mac")?.parse()?, text("address")?.parse()?);
        let measured = provider.enter(|| -> Result<Vec<f64>> {
            let counters = Guard::open(&tap)?.counter_reader()?;
            let sender = FrameSender::open(&tap)?;
            let allowed = || -> Result<u64> { Ok(counters.read()?.ingress.allowed.packets) };
            // The kernel tells of a frame that the guard drops as of one without room.
            let send = |frame: &[u8]| drop(sender.send(frame));
            let mut figures = Vec::new();
            for port in 1..=MOVES {
                let frame = datagram(mac, address, port);
                let body = format!("{{\"endpoint\":\"198.51.100.7:{port}\"}}");
                let request = format!(
                    "PUT /v1/guests/{name}/peer HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                let mut stream = UnixStream::connect(&socket)?;
                send(&frame);
                let before = allowed()?;
                let began = Instant::now();
                stream.write_all(request.as_bytes())?;
                while allowed()? == before {
                    send(&frame);
                    if began.elapsed() > Duration::from_secs(10) {
                        bail!("the consumer does not move");
                    }
                }
                figures.push(began.elapsed().as_secs_f64() * 1e6);
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                if !answer.contains(" 200 ") {
                    bail!("omertad: {answer}");
                }
            }
            Ok(figures)
        })??;
        figures.extend(measured);
    }
    provider.end()?;
    let row = |name, of: &[f64], percent| Samples {
        name,
        against: "commit-p50",
        figures: percentile(of, percent).into_iter().collect(),
    };
    let committed = commits()?;
    let samples = [
        row("commit-p50", &committed, 50),
        row("commit-p99", &committed, 99),
        row("put-p50", &figures, 50),
        row("put-p99", &figures, 99),
    ];
    let once = Rounds::new("tunnel-move", 1, &[]);
    Ok(Bench::of("tunnel-move", "us", &once, &samples, Vec::new()))
}

/// The same from the call that commits, by the guard alone.
fn commits() -> Result<Vec<f64>> {
    let line = Line::new()?;
    line.host.enter(|| -> Result<_> {
        let guard = Guard::open("tap")?;
        let counters = guard.counter_reader()?;
        let sender = FrameSender::open("tap")?;
        let allowed = || -> Result<u64> { Ok(counters.read()?.ingress.allowed.packets) };
        let mut figures = Vec::new();
        for port in 1..=COMMITS {
            let frame = datagram(GUEST_MAC, GUEST, port);
            let to = format!("udp:198.51.100.7:{port}").parse()?;
            let before = allowed()?;
            let began = Instant::now();
            guard.replace(&[to])?;
            while allowed()? == before {
                drop(sender.send(&frame));
                if began.elapsed() > Duration::from_secs(10) {
                    bail!("the guard does not follow");
                }
            }
            figures.push(began.elapsed().as_secs_f64() * 1e6);
        }
        Ok(figures)
    })?
}

fn percentile(figures: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted
        .get((sorted.len() * percent / 100).min(last))
        .copied()
}

/// A datagram for the guest from where its consumer is after the move.
fn datagram(mac: Mac, guest: Ipv4Addr, port: u16) -> Vec<u8> {
    const UDP: u8 = 17;
    let datagram = udp(port, 40_000, &[0; 8]);
    let packet = Ipv4::new(Ipv4Addr::new(198, 51, 100, 7), guest, UDP).packet(&datagram);
    ethernet(Mac([0x02, 0, 0, 0, 0, 9]), mac, 0x0800, &packet)
}
