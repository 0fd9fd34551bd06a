//! A consumer that moves while its guest downloads from it.

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
use crate::page::THE_END;
use crate::report::Report;

const MOVES: u16 = 10;
const STAY: Duration = Duration::from_millis(500);

impl Scene<'_> {
    /// Nothing but the endpoint changes: the tunnel's session, and the connection in it, live on.
    pub(super) fn roam(&self, guest: &Guest, report: &mut Report) -> Result<()> {
        report.act("Consumer B moves ten times while its guest downloads from it");
        let over = Arc::new(AtomicBool::new(false));
        let (_page, url) = self.consumer_b.serve_download(Arc::clone(&over))?;
        let began = Instant::now();
        let mut last = self.consumer_b.endpoint;
        let (told, moved) = thread::scope(|threads| {
            let download = threads.spawn(|| {
                let line = format!("timeout 120 wget -q -O - {url} | tail -n 1");
                guest.console()?.run(&line, Duration::from_secs(130))
            });
            let mut roam = || -> Result<()> {
                for port in PORT + 1..=PORT + MOVES {
                    interrupt::sleep(STAY)?;
                    last = self.consumer_b.move_to(port)?;
                    let endpoint = last.to_string();
                    self.daemon
                        .omerta
                        .run(&["peer", "set", TENANT_B, "--endpoint", &endpoint])?;
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
        let events = self.daemon.omerta.events(TENANT_B)?;
        let is =
            |kind| move |event: &&Value| event.get("kind").and_then(Value::as_str) == Some(kind);
        let moves = events.iter().filter(is("consumer_moved")).count();
        report.check(
            moves == usize::from(MOVES),
            &format!("{moves} events tell of it"),
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
