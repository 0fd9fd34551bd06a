//! The same guest where rogue traffic ends the guest.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use omerta_test_support::{Capture, Travel, index_of};
use serde_json::Value;

use super::{Scene, TENANT_A, milliseconds};
use crate::guest::Guest;
use crate::packet::{ICMP, Packet};
use crate::report::Report;
use crate::stage::WEB_SERVER;

impl Scene<'_> {
    pub(super) fn terminate(&self, before: &Guest, report: &mut Report) -> Result<()> {
        report.act(&format!("{TENANT_A} again, with --on-violation terminate"));
        let omerta = &self.daemon.omerta;
        omerta.run(&["vm", "stop", &before.name])?;
        report.check(
            self.state_of(TENANT_A)? == "ended",
            "the first one powered down when asked to",
        );
        let earlier = omerta.events(TENANT_A)?.len();
        let guest = Guest::run(omerta, TENANT_A, self.image, &self.consumer_a, "terminate")?;
        guest.introduce(omerta, &self.consumer_a, report)?;
        self.fetch_page(&guest, &self.consumer_a, report, "")?;

        let provider = &self.stage.provider;
        let capture = provider.enter(|| Capture::open(&guest.interface))??;
        let mut console = guest.console()?;
        // Fast, and without end: how long it could go on shows how long it lived.
        let flood = format!("ping -i 0.002 {WEB_SERVER} >/dev/null");
        console.type_line(&format!(
            "nft flush ruleset; ip route replace default via {} dev eth0; {flood}",
            guest.gateway
        ))?;
        let ended = report.wait("the guest is ended", Duration::from_secs(30), || {
            let events = omerta.events(TENANT_A)?;
            let new = events.get(earlier..).unwrap_or_default();
            Ok(kind(new, "ended").map(|ended| {
                (
                    ended.clone(),
                    kind(new, "paused").cloned(),
                    kind(new, "rogue").cloned(),
                )
            }))
        })?;
        let (ended, paused, rogue) = ended;

        let rogue = rogue.unwrap_or_default();
        let frame = rogue
            .get("frame")
            .and_then(Value::as_str)
            .unwrap_or("no frame");
        let reason = rogue
            .get("reason")
            .and_then(Value::as_str)
            .unwrap_or("no reason");
        report.check(
            frame.contains(&WEB_SERVER.to_string()) && reason == "endpoint",
            &format!("the event names the frame and the reason: {frame}, {reason}"),
        );
        let paused = paused
            .as_ref()
            .and_then(|event| milliseconds(event, "frame_to_paused_us"));
        report.check(
            paused.is_some(),
            &timing("from the frame to the paused guest", paused),
        );
        let over = milliseconds(&ended, "frame_to_ended_us");
        report.check(
            over.is_some(),
            &timing("from the frame to the ended guest", over),
        );
        let removed = milliseconds(&ended, "frame_to_tap_removed_us");
        report.check(
            removed.is_some(),
            &timing("from the frame to the removed tap", removed),
        );
        self.check_capture(&capture, paused, report)?;

        let process = PathBuf::from(format!("/proc/{}", guest.pid));
        report.check(
            !process.exists(),
            &format!("its process {} is gone", guest.pid),
        );
        let tap = provider.enter(|| index_of(&guest.interface))?;
        report.check(
            tap.is_err(),
            &format!("its tap {} is gone", guest.interface),
        );
        let guarded = omerta.guarded()?;
        report.check(
            !guarded.contains(&guest.interface),
            "its guard's pins are gone",
        );
        Ok(())
    }

    /// What the guest's own interface saw: the bad frames, from the first to the last.
    fn check_capture(
        &self,
        capture: &Capture,
        paused: Option<f64>,
        report: &mut Report,
    ) -> Result<()> {
        let frames = capture.frames()?;
        let mut bad = frames.iter().filter(|frame| {
            frame.travel == Travel::Incoming
                && Packet::parse(&frame.bytes)
                    .is_some_and(|packet| packet.goes_to(WEB_SERVER, ICMP, None))
        });
        let first = bad.next().context("no bad frame was captured")?;
        let more = bad.clone().count();
        let last = bad.next_back().unwrap_or(first);
        let lived = last
            .at
            .duration_since(first.at)
            .unwrap_or_default()
            .as_secs_f64()
            * 1000.0;
        // What left the guest before the pause may still be on its way through the kernel.
        let agrees = paused.is_some_and(|paused| lived <= paused + 5.0);
        report.check(
            agrees,
            &format!(
                "a capture agrees: {more} more frames after the first, the last {lived:.1} ms later"
            ),
        );
        Ok(())
    }
}

fn kind<'a>(events: &'a [Value], kind: &str) -> Option<&'a Value> {
    events
        .iter()
        .find(|event| event.get("kind").and_then(Value::as_str) == Some(kind))
}

fn timing(what: &str, milliseconds: Option<f64>) -> String {
    match milliseconds {
        Some(milliseconds) => format!("{milliseconds:>8.1} ms {what}"),
        None => format!("no event tells the time {what}"),
    }
}
