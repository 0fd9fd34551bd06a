//! A consumer that moves while its guest downloads from it, and an omertad that dies meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Scene, TENANT_B};
use crate::consumer::PORT;
use crate::guest::Guest;
use crate::interrupt;
use crate::omerta::{Omerta, text};
use crate::page::THE_END;
use crate::report::Report;

const MOVES: u16 = 10;
const STAY: Duration = Duration::from_millis(500);

impl Scene<'_> {
    /// Nothing but the endpoint changes: the tunnel's session, and the connection in it, live on. What omertad does not keep is
    /// its events, so they are counted before it dies.
    pub(super) fn roam(&mut self, guest: &Guest, report: &mut Report) -> Result<()> {
        report.act("Consumer B moves ten times while its guest downloads from it, and omertad is killed meanwhile");
        let over = Arc::new(AtomicBool::new(false));
        let (_page, url) = self.consumer_b.serve_download(Arc::clone(&over))?;
        let began = Instant::now();
        let mut last = self.consumer_b.endpoint;
        let (daemon, consumer) = (&mut self.daemon, &self.consumer_b);
        let (mut told_of, mut away) = (0, Duration::ZERO);
        let (told, moved) = thread::scope(|threads| {
            let download = threads.spawn(|| {
                let line = format!("timeout 120 wget -q -O - {url} | tail -n 1");
                guest.console()?.run(&line, Duration::from_secs(130))
            });
            let mut roam = || -> Result<()> {
                for port in PORT + 1..=PORT + MOVES {
                    interrupt::sleep(STAY)?;
                    last = consumer.move_to(port)?;
                    let endpoint = last.to_string();
                    daemon
                        .omerta
                        .run(&["peer", "set", TENANT_B, "--endpoint", &endpoint])?;
                    if port == PORT + MOVES / 2 {
                        told_of = moves_of(&daemon.omerta)?;
                        away = daemon.kill_and_restart()?;
                    }
                }
                interrupt::sleep(STAY)
            };
            let moved = roam();
            over.store(true, Ordering::Relaxed);
            (download.join(), moved)
        });
        moved?;
        let told = told.ok().context("the download's thread broke off")??;
        // The guest says on its console where its consumer is, too.
        let end = told.output.lines().last().unwrap_or_default();
        report.check(
            end == THE_END,
            &format!(
                "{TENANT_B} downloads {url} to its end (\"{end}\") in {:.1} s, its consumer at {MOVES} ports one after the other",
                began.elapsed().as_secs_f64()
            ),
        );
        let shown = self.daemon.omerta.json(&["vm", "show", TENANT_B])?;
        let state = text(&shown, "state")?;
        report.check(
            state == "running" && shown.get("pid").and_then(Value::as_u64) == Some(guest.pid.into()),
            &format!(
                "the next omertad took over {TENANT_B}, which is {state}, {:.1} s after the other was killed",
                away.as_secs_f64()
            ),
        );
        let moves = told_of + moves_of(&self.daemon.omerta)?;
        report.check(
            moves == usize::from(MOVES),
            &format!("{moves} events of both tell of it"),
        );
        let shown = self
            .daemon
            .omerta
            .json(&["guard", "show", &guest.interface])?;
        let allow = shown.get("allow").map(Value::to_string).unwrap_or_default();
        report.check(
            allow == format!("[\"udp:{last}\"]"),
            &format!("its guard allows {allow} and nothing else"),
        );
        self.fetch_page(guest, &self.consumer_b, report, " from where it is now")
    }
}

/// How many moves omertad tells of.
fn moves_of(omerta: &Omerta) -> Result<usize> {
    let events = omerta.events(TENANT_B)?;
    let kinds = events
        .iter()
        .map(|event| event.get("kind").and_then(Value::as_str));
    Ok(kinds.filter(|kind| *kind == Some("consumer_moved")).count())
}
