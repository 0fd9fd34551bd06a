//! The same guest where rogue traffic ends the guest.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use omerta_test_support::{Capture, CapturedFrame, Travel};
use serde_json::Value;

use super::{Scene, TENANT_A, ending, milliseconds};
use crate::guest::Guest;
use crate::packet::{ICMP, Packet};
use crate::report::Report;
use crate::stage::WEB_SERVER;
use crate::traces::Traces;

/// How many frames the other guest, which is only reported, sends in its flood.
const FLOOD: usize = 50;

/// What captures saw of the guests' floods, in frames.
#[derive(Clone, Copy)]
pub(super) struct Floods {
    /// Of the guest that is only reported.
    pub reported: usize,
    /// Of the guest that is ended for it.
    pub ended: usize,
}

impl Scene<'_> {
    pub(super) fn terminate(
        &self,
        before: &Guest,
        other: &Guest,
        report: &mut Report,
    ) -> Result<Floods> {
        report.act(&format!("{TENANT_A} again, with --on-violation terminate"));
        let omerta = &self.daemon.omerta;
        let stopped = omerta.json(&["vm", "stop", &before.name])?;
        report.check(
            ending(&stopped) == "stopped",
            &format!(
                "the first one powered down when asked to: omertad has it from QEMU as `{}`",
                ending(&stopped)
            ),
        );
        let earlier = omerta.events(TENANT_A)?.len();
        let guest = Guest::run(omerta, TENANT_A, self.image, &self.consumer_a, "terminate")?;
        guest.introduce(omerta, &self.consumer_a, report)?;
        self.fetch_page(&guest, &self.consumer_a, report, "")?;

        // What the same flood comes to where nothing ends it.
        let reported = self.flood_of(other)?;
        let (first, last) = ends(&reported)?;
        let lasted = between(first, last);
        report.check(
            reported.len() == FLOOD,
            &format!(
                "{}, which is only reported, sends all {FLOOD} frames of a flood, in {lasted:.0} ms",
                other.name
            ),
        );

        let provider = &self.stage.provider;
        let traces = Traces::find(provider, &guest.interface)?;
        let capture = provider.enter(|| Capture::open(&guest.interface))??;
        let mut console = guest.console()?;
        console.type_line(&flood(&guest, "-c 100000"))?;
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
        let sent = bad_frames(&capture)?;
        let (first, last) = ends(&sent)?;
        let lived = between(first, last);
        // What left the guest before the pause may still be on its way through the kernel.
        let agrees = paused.is_some_and(|paused| lived <= paused + 5.0);
        let silent = removed.map_or(0.0, |removed| removed - lived);
        report.check(
            agrees && sent.len() < FLOOD && silent > 0.0,
            &format!(
                "a capture agrees: of its endless flood {} left it, within {lived:.1} ms; then none, in the {silent:.1} ms until its tap was gone",
                frames(sent.len())
            ),
        );

        let process = PathBuf::from(format!("/proc/{}", guest.pid));
        report.check(
            !process.exists(),
            &format!("its process {} is gone", guest.pid),
        );
        let is_named = |wanted: &str| -> nix::Result<bool> {
            let interfaces = nix::net::if_::if_nameindex()?;
            let mut names = interfaces.iter().map(|interface| interface.name());
            Ok(names.any(|name| name.to_str() == Ok(wanted)))
        };
        let is_there = provider.enter(|| is_named(&guest.interface))??;
        report.check(!is_there, &format!("its tap {} is gone", guest.interface));
        let left = traces.left()?;
        let what = format!(
            "its guard's pins are gone from bpffs, and from the kernel its {}",
            traces.describe()
        );
        if left.is_empty() {
            report.check(true, &what);
        } else {
            report.check(
                false,
                &format!("of its guard there is left: {}", left.join(", ")),
            );
        }
        Ok(Floods {
            reported: reported.len(),
            ended: sent.len(),
        })
    }

    /// Floods the internet from a guest that is only reported, and gives what left it.
    fn flood_of(&self, guest: &Guest) -> Result<Vec<CapturedFrame>> {
        let provider = &self.stage.provider;
        let capture = provider.enter(|| Capture::open(&guest.interface))??;
        let line = flood(guest, &format!("-c {FLOOD} -W 1"));
        guest.console()?.run(&line, Duration::from_secs(20))?;
        bad_frames(&capture)
    }
}

/// What root types: fast frames to the internet, firewall flushed.
fn flood(guest: &Guest, count: &str) -> String {
    format!(
        "nft flush ruleset; ip route replace default via {} dev eth0; ping -i 0.002 {count} {WEB_SERVER} >/dev/null",
        guest.gateway
    )
}

/// What the guest's own interface saw of its flood.
fn bad_frames(capture: &Capture) -> Result<Vec<CapturedFrame>> {
    let mut frames = capture.frames()?;
    if capture.lost()? > 0 {
        bail!("the capture on {} lost frames", capture.interface());
    }
    frames.retain(|frame| {
        frame.travel == Travel::Incoming
            && Packet::parse(&frame.bytes)
                .is_some_and(|packet| packet.goes_to(WEB_SERVER, ICMP, None))
    });
    Ok(frames)
}

fn ends(frames: &[CapturedFrame]) -> Result<(&CapturedFrame, &CapturedFrame)> {
    let ends = frames.first().zip(frames.last());
    ends.context("no bad frame was captured")
}

/// Milliseconds from one frame to another.
fn between(first: &CapturedFrame, last: &CapturedFrame) -> f64 {
    let between = last.at.duration_since(first.at);
    between.unwrap_or_default().as_secs_f64() * 1000.0
}

fn frames(count: usize) -> String {
    match count {
        1 => "1 frame".to_owned(),
        count => format!("{count} frames"),
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
