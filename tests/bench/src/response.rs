//! `response`: a guest's first bad frame, until the guest stands still (`response`) and until its process and
//! its tap are gone (`response-end`), as omertad measures it from the kernel's timestamp of the frame.
//!
//! Each figure is of a guest of its own, whose processor spins: alone, while another guest floods its guard with bad
//! frames as fast as one thread sends them (`response-flood` says how fast that was), and beside a hundred guests
//! that do nothing. `qmp-stop` is the floor: how long such a QEMU by itself takes from `stop` on its monitor until it says that
//! it is paused.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use omerta_dataplane::Guard;
use omerta_test_support::{Injector, write_bare_guest};

use crate::launch::{Bare, Provider, SPEAKS};
use crate::report::Bench;
use crate::rounds::{Rounds, Samples};
use crate::verdict::forged_frame;

/// Jumps to itself.
const SPINS: &[u8] = &[0xeb, 0xfe];
/// Guests in one round: a hundred and more in the fifteen rounds that are usual.
const GUESTS: u32 = 8;
/// Guests that do nothing beside.
const BESIDE: usize = 100;
/// Frames between two looks at whether the flood is over.
const BATCH: usize = 4096;
/// How long a guest may take to end.
const DEADLINE: Duration = Duration::from_secs(60);

/// Of one guest, in milliseconds from its frame.
struct Response {
    paused: f64,
    ended: f64,
    tap_removed: f64,
}

pub fn measure(rounds: Rounds) -> Result<Vec<Bench>> {
    let directory = tempfile::tempdir().context("cannot make a directory")?;
    let images = directory.path().join("images");
    write_bare_guest(&images.join("spins"), SPINS).context("cannot write a guest")?;
    write_bare_guest(&images.join("tiny"), SPEAKS).context("cannot write a guest")?;
    let provider = Provider::start(directory.path(), &images)?;
    let count = rounds.count() * GUESTS;
    let respond = || -> Result<Vec<Response>> { (0..count).map(|_| response(&provider)).collect() };

    // One that does not count.
    response(&provider)?;
    let bare = Bare::like(&provider, "spins", 64)?;
    // In turn with the guests, so that a machine that becomes busy slows both.
    let (mut stopped, mut alone) = (Vec::new(), Vec::new());
    for _ in 0..count {
        stopped.push(stop(&bare)?);
        alone.push(response(&provider)?);
    }
    let (flooded, rate) = beside_a_flood(&provider, respond)?;
    provider.many_at_once(BESIDE, "tiny")?;
    let hundred = respond()?;
    provider.end()?;

    let of = |name, against, responses: &[Response], figure: fn(&Response) -> f64| Samples {
        name,
        against,
        figures: responses.iter().map(figure).collect(),
    };
    let paused: fn(&Response) -> f64 = |response| response.paused;
    let ended: fn(&Response) -> f64 = |response| response.ended;
    let removed: fn(&Response) -> f64 = |response| response.tap_removed;
    let counted = Rounds::new("response", count, &[]);
    let pausing = [
        Samples {
            name: "qmp-stop",
            against: "qmp-stop",
            figures: stopped,
        },
        of("paused", "qmp-stop", &alone, paused),
        of("paused-flood", "qmp-stop", &flooded, paused),
        of("paused-100", "qmp-stop", &hundred, paused),
    ];
    let ending = [
        of("ended", "ended", &alone, ended),
        of("ended-flood", "ended", &flooded, ended),
        of("ended-100", "ended", &hundred, ended),
        of("tap-gone", "ended", &alone, removed),
        of("tap-gone-flood", "ended", &flooded, removed),
        of("tap-gone-100", "ended", &hundred, removed),
    ];
    let flood = [Samples {
        name: "dropped",
        against: "dropped",
        figures: vec![rate / 1000.0],
    }];
    let once = Rounds::new("response-flood", 1, &[]);
    Ok(vec![
        Bench::of("response", "ms", &counted, &pausing, Vec::new()),
        Bench::of("response-end", "ms", &counted, &ending, Vec::new()),
        Bench::of("response-flood", "k frames/s", &once, &flood, Vec::new()),
    ])
}

/// Runs a guest, has it send a frame with a forged source, and waits for its end.
fn response(provider: &Provider) -> Result<Response> {
    let guest = provider.run("spins", 64)?;
    let interface = interface_of(&guest.show()?)?;
    let injector = provider.enter(|| Injector::by("bad", &interface))??;
    injector.inject(&forged_frame())?;
    let ended = loop_until(|| {
        let shown = guest.show()?;
        Ok((shown["state"] == "ended").then(|| shown["ended"].clone()))
    })?;
    provider.enter(|| injector.remove())??;
    let milliseconds = |name: &str| {
        let found = ended[name].as_f64().map(|us| us / 1000.0);
        found.with_context(|| format!("the guest has no {name}: {ended}"))
    };
    Ok(Response {
        paused: milliseconds("frame_to_paused_us")?,
        ended: milliseconds("frame_to_ended_us")?,
        tap_removed: milliseconds("frame_to_tap_removed_us")?,
    })
}

/// Milliseconds that a QEMU by itself takes to stop its guest.
fn stop(bare: &Bare<'_>) -> Result<f64> {
    let guest = bare.start()?;
    let socket = loop_until(|| Ok(UnixStream::connect(guest.qmp()).ok()))?;
    let mut lines = BufReader::new(socket.try_clone()?).lines();
    let mut ask = |command: &str| -> Result<String> {
        writeln!(&socket, r#"{{"execute":"{command}"}}"#)?;
        loop {
            let line = lines.next().context("QEMU has ended")??;
            // Its greeting and its events come between.
            if line.contains(r#""return""#) {
                return Ok(line);
            }
        }
    };
    ask("qmp_capabilities")?;
    let began = Instant::now();
    ask("stop")?;
    let state = ask("query-status")?;
    let took = began.elapsed().as_secs_f64() * 1000.0;
    if !state.contains("paused") {
        bail!("QEMU has not stopped its guest: {state}");
    }
    Ok(took)
}

/// What `work` gives while another guest's guard drops frames without pause, and how many a second those were.
fn beside_a_flood<T: Send>(
    provider: &Provider,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, f64)> {
    let guest = provider.run_with("tiny", 64, &["--on-violation", "alert"])?;
    let interface = interface_of(&guest.show()?)?;
    let injector = provider.enter(|| Injector::by("flood", &interface))??;
    let dropped = || -> Result<u64> {
        let counters = provider.enter(|| Guard::open(&interface)?.counters())??;
        Ok(counters
            .egress
            .dropped
            .iter()
            .map(|(_, count)| count.packets)
            .sum())
    };
    let over = AtomicBool::new(false);
    let frame = forged_frame();
    let (before, began) = (dropped()?, Instant::now());
    let done = std::thread::scope(|scope| -> Result<T> {
        let flood = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                injector.inject_times(&frame, BATCH)?;
            }
            Ok(())
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        flood.join().ok().context("the flood broke off")??;
        done
    })?;
    let rate = (dropped()? - before) as f64 / began.elapsed().as_secs_f64();
    provider.enter(|| injector.remove())??;
    Ok((done, rate))
}

fn interface_of(shown: &serde_json::Value) -> Result<String> {
    let interface = shown["interface"].as_str();
    Ok(interface
        .with_context(|| format!("no interface: {shown}"))?
        .to_owned())
}

fn loop_until<T>(mut found: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = found()? {
            return Ok(found);
        }
        if began.elapsed() > DEADLINE {
            bail!("the guest has not ended in {} s", DEADLINE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
