//! `omerta events`: what happened to guests, one line each.

use std::io;

use omerta_api::{Event, Freshness, Occurrence, Witness, route};

use crate::args::{EventsArgs, Format};
use crate::client::{Client, ClientError};
use crate::exit::Exit;
use crate::guest_text::visible;
use crate::output::{Output, Style, bytes, microseconds};
use crate::vm::ending;

/// Prints the events that omertad remembers, and with `--follow` those to come.
///
/// # Errors
/// See [`EventsError`].
pub async fn run(client: &Client, args: &EventsArgs, out: &mut Output) -> Result<(), EventsError> {
    let mut path = route::EVENTS.to_owned();
    let mut query = '?';
    if args.follow {
        path.push_str("?follow=true");
        query = '&';
    }
    if let Some(guest) = &args.guest {
        path.push(query);
        path.push_str("guest=");
        path.push_str(guest.as_str());
    }
    let mut lines = client.lines(&path).await?;
    while let Some(line) = lines.next().await? {
        if line.is_empty() {
            continue;
        }
        let event: Event =
            serde_json::from_slice(&line).map_err(|source| EventsError::Decode { source })?;
        match args.shown.format {
            // The line as it came, so that fields of a newer omertad are kept.
            Format::Json => out.line(String::from_utf8_lossy(&line))?,
            Format::Text => {
                let line = describe(&event, out);
                out.line(line)?;
            }
        }
    }
    if args.follow {
        return Err(EventsError::Ended);
    }
    Ok(())
}

/// An event on one line: time, guest, kind, details.
fn describe(event: &Event, out: &Output) -> String {
    let (style, kind, details) = details(&event.what);
    // Columns are padded before they are coloured.
    let guest = format!("{:<12}", visible(event.guest.as_deref().unwrap_or("-")));
    let kind = format!("{kind:<12}");
    let line = format!(
        "{}  {}  {}  {}",
        visible(&event.at),
        out.styled(Style::Heading, &guest),
        out.styled(style, &kind),
        visible(&details)
    );
    line.trim_end().to_owned()
}

fn details(what: &Occurrence) -> (Style, &'static str, String) {
    match what {
        Occurrence::Requested { image } => (Style::Plain, "requested", format!("image {image}")),
        Occurrence::Launched { interface } => (
            Style::Changing,
            "launched",
            format!("paused on {interface}"),
        ),
        Occurrence::Guarded { allow } => (
            Style::Changing,
            "guarded",
            format!("may reach {}", allow.join(" ")),
        ),
        Occurrence::Started { pid } => (Style::Good, "started", format!("pid {pid}")),
        Occurrence::Adopted { pid } => (Style::Good, "adopted", format!("pid {pid}")),
        Occurrence::PublicKey { public_key } => (Style::Plain, "public_key", public_key.clone()),
        Occurrence::Handshake {} => (Style::Good, "handshake", String::new()),
        Occurrence::Tunnel {
            tunnel,
            witness,
            endpoint,
            ..
        } => {
            let style = match tunnel {
                Freshness::Awaited => Style::Plain,
                Freshness::Fresh => Style::Good,
                Freshness::Stale => Style::Bad,
            };
            let mut text = format!("handshake {tunnel}");
            if let Some(endpoint) = endpoint {
                text = format!("{text}, to {endpoint}");
            }
            if *witness == Witness::Guest {
                text.push_str(", as it says");
            }
            (style, "tunnel", text)
        }
        Occurrence::Agent { report, what } => {
            let style = match report.as_str() {
                "arrived" | "sound" => Style::Good,
                _ => Style::Bad,
            };
            let what = what.as_ref().map(|what| format!(": {what}"));
            (
                style,
                "agent",
                format!("{report}{}", what.unwrap_or_default()),
            )
        }
        Occurrence::Console {
            attempts,
            unread,
            line,
        } => {
            let mut text = format!("{attempts} blocked by its own firewall, as it says");
            if !line.is_empty() {
                text = format!("{text}: {line}");
            }
            if *unread > 0 {
                text = format!("{text}; {unread} bytes printed too fast to be read");
            }
            (Style::Bad, "console", text)
        }
        Occurrence::Outside { found } => (
            Style::Bad,
            "outside",
            format!("this host has {found}, which is not the guest's own"),
        ),
        Occurrence::ConsoleSilent {} => (
            Style::Bad,
            "console_silent",
            "its own firewall says nothing of what its guard drops".to_owned(),
        ),
        Occurrence::TunnelSilent {
            seconds,
            never,
            on_silence,
        } => {
            let since = if *never { " since it runs" } else { "" };
            let text = format!("nothing from its consumer for {seconds} s{since}; {on_silence}");
            (Style::Bad, "tunnel_silent", text)
        }
        Occurrence::TunnelBack {} => (
            Style::Good,
            "tunnel_back",
            "its consumer is heard again".to_owned(),
        ),
        Occurrence::ConsumerMoved { from, to } => {
            (Style::Changing, "consumer_moved", format!("{from} → {to}"))
        }
        Occurrence::ConsumerStays {
            name,
            endpoint,
            message,
        } => (
            Style::Bad,
            "consumer_stays",
            format!("{name}: {message}; still {endpoint}"),
        ),
        Occurrence::Rogue {
            reason,
            direction,
            frame,
            length,
            action,
            attempt,
            suppressed,
        } => {
            let mut text = format!("{frame}, {length} bytes {direction}: {reason}; {action}");
            if let Some(attempt) = attempt {
                text.push_str(&format!("; tried: {attempt}"));
            }
            if *suppressed > 0 {
                text.push_str(&format!("; {suppressed} more like it before"));
            }
            (Style::Bad, "rogue", text)
        }
        Occurrence::Paused {
            cause,
            reason,
            frame,
            frame_to_paused_us,
        } => {
            let mut text = cause.word().to_owned();
            if let Some(reason) = reason {
                text.push_str(&format!(" ({reason})"));
            }
            if let Some(frame) = frame {
                text.push_str(&format!(": {frame}"));
            }
            if let Some(span) = frame_to_paused_us {
                text.push_str(&format!(", {} after the frame", microseconds(*span)));
            }
            (Style::Bad, "paused", text)
        }
        Occurrence::PauseFailed { message } => (Style::Bad, "pause_failed", message.clone()),
        Occurrence::Held {} => (Style::Changing, "held", "paused by request".to_owned()),
        Occurrence::Released {} => (Style::Good, "released", "runs on".to_owned()),
        Occurrence::ReleaseFailed { message } => (Style::Bad, "release_failed", message.clone()),
        Occurrence::Reset {} => (Style::Changing, "reset", String::new()),
        Occurrence::Panicked {} => (Style::Bad, "panicked", String::new()),
        Occurrence::Stopping { deadline_seconds } => (
            Style::Changing,
            "stopping",
            format!("has {deadline_seconds} s"),
        ),
        Occurrence::Scrubbed { bytes: count } => (
            Style::Plain,
            "scrubbed",
            format!("{} of its disk are gone", bytes(*count)),
        ),
        Occurrence::Ended(ended) => {
            let mut text = ending(ended);
            for (label, span) in [
                ("paused", ended.frame_to_paused_us),
                ("ended", ended.frame_to_ended_us),
                ("tap removed", ended.frame_to_tap_removed_us),
            ] {
                if let Some(span) = span {
                    text.push_str(&format!(", {label} after {}", microseconds(span)));
                }
            }
            (Style::Bad, "ended", text)
        }
        Occurrence::Lost { events } => (
            Style::Bad,
            "lost",
            format!("{events} events are missing here"),
        ),
        Occurrence::Unknown => (
            Style::Plain,
            "unknown",
            "an event that this version does not know; see `-o json`".to_owned(),
        ),
    }
}

/// Why events cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// omertad did not give them.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A line is no event.
    #[error(
        "omerta and omertad seem to be of different versions: a line of the stream is no event"
    )]
    Decode {
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The stream that was followed ended.
    #[error("omertad ended the stream of events: see whether it still runs, then follow again")]
    Ended,
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl EventsError {
    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Client(error) => error.exit(),
            Self::Decode { .. } | Self::Ended | Self::Output(_) => Exit::Failed,
        }
    }
}
