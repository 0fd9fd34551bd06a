//! `tunnel-move`: how long it takes until a consumer that moves is let in where it is.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use omerta_dataplane::Guard;
use omerta_kernel_tests::{GUEST, GUEST_MAC, Ipv4, ethernet, udp};
use omerta_test_support::{FrameSender, write_bare_guest};
use omerta_verdict::Mac;

use super::Line;
use crate::launch::{Provider, SPEAKS};
use crate::report::Bench;
use crate::rounds::{Rounds, Samples};

/// A guest's consumer may move twenty times a minute.
const GUESTS: usize = 5;
const MOVES: u16 = 20;
/// Commits without omertad.
const COMMITS: u16 = 101;

/// Microseconds until a frame from the new endpoint is allowed, from the commit's call and from the request's first byte.
pub(super) fn measure() -> Result<Bench> {
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
