//! The story, act by act.

mod attack;
mod boot;
mod measure;
mod roam;
mod terminate;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::consumer::{Consumer, Place};
use crate::daemon::Daemon;
use crate::guest::Guest;
use crate::leftovers::{self, Leftovers};
use crate::omerta::text;
use crate::report::Report;
use crate::requirements::Requirements;
use crate::stage::{CONSUMER_A, CONSUMER_B, Stage};
use crate::traces::{self, Traces};

/// The guest whose root turns on its provider.
const TENANT_A: &str = "tenant-a";
/// Another tenant's guest on the same provider.
const TENANT_B: &str = "tenant-b";

/// Everything that stands while the story is told.
struct Scene<'a> {
    stage: &'a Stage,
    daemon: Daemon<'a>,
    consumer_a: Consumer<'a>,
    consumer_b: Consumer<'a>,
    image: &'a str,
}

/// Tells the story. Whatever it sets up is taken down when it returns.
pub fn play(
    requirements: &Requirements,
    report: &mut Report,
    leftovers: &mut Leftovers,
) -> Result<()> {
    leftovers.note_machine();
    report.act("A provider, its LAN, the internet, two consumers: namespaces with no way out");
    let directory = tempfile::Builder::new()
        .prefix("omerta-demo-")
        .tempdir()
        .context("cannot make a directory")?;
    leftovers.watch_path(directory.path());
    let stage = Stage::build(leftovers)?;
    // omertad probes the host while the consumers are set up.
    let mut daemon = Daemon::start(requirements, &stage.provider, directory.path())?;
    let place = |namespace, letter, address, tunnel_network| Place {
        namespace,
        letter,
        address,
        tunnel_network,
    };
    let consumer_a = Consumer::open(
        &place(&stage.consumer_a, 'a', CONSUMER_A, 66),
        directory.path(),
        leftovers,
    )?;
    let consumer_b = Consumer::open(
        &place(&stage.consumer_b, 'b', CONSUMER_B, 67),
        directory.path(),
        leftovers,
    )?;
    for (name, consumer) in [("A", &consumer_a), ("B", &consumer_b)] {
        report.say(&format!(
            "consumer {name} listens on udp {}, by {}",
            consumer.endpoint, consumer.implementation
        ));
    }
    let reached = stage.reached_by_neighbour()?;
    let names: Vec<_> = reached
        .iter()
        .map(|(name, address, _)| format!("{name} {address}"))
        .collect();
    let silent: Vec<_> = reached
        .iter()
        .filter(|(.., answered)| !answered)
        .map(|(name, ..)| *name)
        .collect();
    report.check(
        silent.is_empty(),
        &format!("a neighbour without a guard reaches {}", names.join(", ")),
    );
    if !silent.is_empty() {
        report.say(&format!("no answer from: {}", silent.join(", ")));
    }

    report.act("The host");
    daemon.ready(report)?;
    let version = daemon.omerta.json(&["version"])?;
    let served = version.get("omertad").unwrap_or(&version);
    report.say(&format!("omertad {}", text(served, "version")?));
    let mut scene = Scene {
        stage: &stage,
        daemon,
        consumer_a,
        consumer_b,
        image: &requirements.image_name,
    };
    scene.tell(report, leftovers)
}

impl Scene<'_> {
    fn tell(&mut self, report: &mut Report, leftovers: &Leftovers) -> Result<()> {
        let (guest_a, guest_b) = self.boot(report)?;
        self.attack(&guest_a, &guest_b, report)?;
        let floods = self.terminate(&guest_a, &guest_b, report)?;
        self.measure(&guest_b, floods, report)?;
        self.roam(&guest_b, report)?;
        report.act("The guests are ended and the stage is taken down");
        let began = Instant::now();
        let traces = Traces::find(&self.stage.provider, &guest_b.interface)?;
        let shown = self.daemon.omerta.json(&["vm", "kill", TENANT_B])?;
        let took = began.elapsed().as_secs_f64();
        report.check(
            ending(&shown) == "killed" && is_gone(guest_b.pid),
            &format!("{TENANT_B} and its process ended {took:.1} s after `omerta vm kill`"),
        );
        let mut left = traces.left()?;
        for pinned in leftovers.pins_of(&self.stage.provider)? {
            // omertad keeps the programs for guests to come; none has a place among them.
            if !pinned.starts_with(":programs-") {
                left.push(pinned);
                continue;
            }
            let programs = traces::pins_of(&self.stage.provider)?.join(pinned);
            let places = traces::entries(&programs)?.into_iter();
            left.extend(places.filter(|name| name.starts_with("place_")));
        }
        if left.is_empty() {
            report.check(true, "no guard of the provider is in the kernel any more");
        } else {
            report.check(
                false,
                &format!("of guards there is left: {}", leftovers::few(&left)),
            );
        }
        Ok(())
    }

    /// Fetches the consumer's page from inside the guest, through the tunnel.
    fn fetch_page(
        &self,
        guest: &Guest,
        consumer: &Consumer,
        report: &mut Report,
        when: &str,
    ) -> Result<()> {
        let began = Instant::now();
        let sent = consumer.sent()?;
        let url = format!("http://{}/", consumer.tunnel_peer);
        let told = guest.console()?.run(
            &format!("timeout 5 wget -q -O - {url}"),
            Duration::from_secs(20),
        )?;
        let line = format!(
            "{} fetches {url} through its tunnel{when}: \"{}\" in {:.1} s",
            guest.name,
            told.output,
            began.elapsed().as_secs_f64()
        );
        // The tunnel itself tells that the page came through it.
        let tunnelled = consumer.sent()?.saturating_sub(sent);
        let came = told.status == 0 && told.output == consumer.greeting;
        let length = consumer.greeting.len() as u64;
        report.check(came && tunnelled > length, &line);
        Ok(())
    }
}

/// Why a guest ended, as omertad tells it: `stopped` is the guest's own shutdown, by QEMU's word.
fn ending(shown: &Value) -> &str {
    let cause = shown.pointer("/ended/cause").and_then(Value::as_str);
    cause.unwrap_or("not ended")
}

/// Whether a process has ended. One whose parent died first may wait to be reaped by another.
fn is_gone(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z')),
        Err(_) => true,
    }
}

/// A number of microseconds in an event, in milliseconds.
fn milliseconds(event: &Value, field: &str) -> Option<f64> {
    event
        .get(field)
        .and_then(Value::as_u64)
        .map(|us| us as f64 / 1000.0)
}
