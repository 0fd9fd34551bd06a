//! `omerta vm`: guests, as omertad runs them.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use omerta_api::{Ended, Guest, GuestList, GuestState, StopRequest, route};
use serde::Serialize;
use tokio::time::sleep;

use crate::args::vm::{GuestName, RunArgs, RunError, VmCommand};
use crate::args::{Format, limit};
use crate::client::{Client, ClientError};
use crate::console::{self, ConsoleError};
use crate::exit::Exit;
use crate::guest_text::visible;
use crate::output::{Cell, Output, Side, Style, Table, microseconds};

/// How often a guest is looked at while it is being waited for.
const GLANCE: Duration = Duration::from_millis(100);

/// Carries out one command.
///
/// # Errors
/// See [`VmError`].
pub async fn run(client: &Client, command: VmCommand, out: &mut Output) -> Result<(), VmError> {
    match command {
        VmCommand::Run(args) => start(client, &args, out).await,
        VmCommand::List { all, shown } => list(client, all, shown.format, out).await,
        VmCommand::Show { name, shown } => {
            let guest: Guest = client
                .get(&route::of_guest(route::GUEST, name.as_str()))
                .await?;
            show(&guest, shown.format, out)
        }
        VmCommand::Stop {
            name,
            deadline,
            shown,
        } => {
            let path = route::of_guest(route::GUEST_STOP, name.as_str());
            let request = StopRequest {
                deadline_seconds: deadline,
            };
            let guest = client.post(&path, &request).await?;
            ended(client, guest, shown.format, out).await
        }
        VmCommand::Kill { name, shown } => {
            let path = route::of_guest(route::GUEST_KILL, name.as_str());
            let guest = client.post(&path, &serde_json::json!({})).await?;
            ended(client, guest, shown.format, out).await
        }
        VmCommand::Pause { name, shown } => {
            ask(client, route::GUEST_PAUSE, &name, shown.format, out).await
        }
        VmCommand::Resume { name, shown } => {
            ask(client, route::GUEST_RESUME, &name, shown.format, out).await
        }
        VmCommand::Reset { name, shown } => {
            ask(client, route::GUEST_RESET, &name, shown.format, out).await
        }
        VmCommand::Console {
            name,
            linger,
            scrollback,
        } => {
            let guest: Guest = client
                .get(&route::of_guest(route::GUEST, name.as_str()))
                .await?;
            let Some(socket) = &guest.console else {
                return Err(VmError::NoConsole {
                    name: guest.name,
                    state: guest.state,
                });
            };
            if scrollback > 0 {
                let log = console_log(client, &name).await?;
                out.bytes(last_lines(&text_of_log(&log), scrollback).as_bytes())?;
            }
            let linger = Duration::from_secs(linger.into());
            Ok(console::attach(&name, socket.as_ref(), linger).await?)
        }
        VmCommand::Logs { name, shown } => logs(client, &name, shown.format, out).await,
    }
}

/// Asks for a guest and follows it until it runs, and on to its public key where that is wanted.
/// A guest that does not come to run is a failure of this command, with omertad's reason.
async fn start(client: &Client, args: &RunArgs, out: &mut Output) -> Result<(), VmError> {
    let request = args.check()?;
    let mut progress = Progress::new(&request.name);
    let begun = Instant::now();
    let mut guest: Guest = client.post(route::GUESTS, &request).await?;
    let path = route::of_guest(route::GUEST, &request.name);
    loop {
        progress.saw(&guest);
        match guest.state {
            GuestState::Launching | GuestState::Paused | GuestState::Guarded => {}
            GuestState::Running if args.wait.is_none() || guest.public_key.is_some() => break,
            GuestState::Running => {}
            // It stands still until someone wants it otherwise.
            GuestState::Held | GuestState::Suspended if args.wait.is_none() => break,
            GuestState::Held | GuestState::Suspended => {}
            // What is on its way to its end has not come to run: the end says why.
            GuestState::Condemned | GuestState::Stopping | GuestState::Ending => {}
            GuestState::Ended => return Err(VmError::ended(guest)),
        }
        if let Some(seconds) = args.wait
            && begun.elapsed() >= Duration::from_secs(seconds.into())
        {
            return Err(VmError::NoPublicKey {
                name: guest.name,
                state: guest.state,
                seconds,
            });
        }
        sleep(GLANCE).await;
        guest = client.get(&path).await?;
    }
    progress.end();
    show(&guest, args.shown.format, out)
}

/// Asks for something of a guest that lives on, and shows it as it is then.
async fn ask(
    client: &Client,
    verb: &str,
    name: &GuestName,
    format: Format,
    out: &mut Output,
) -> Result<(), VmError> {
    let path = route::of_guest(verb, name.as_str());
    let guest = client.post(&path, &serde_json::json!({})).await?;
    show(&guest, format, out)
}

/// Follows a guest to its end and shows it. Of a guest that is to be gone, whatever is left is a
/// failure.
async fn ended(
    client: &Client,
    mut guest: Guest,
    format: Format,
    out: &mut Output,
) -> Result<(), VmError> {
    let path = route::of_guest(route::GUEST, &guest.name);
    while guest.state != GuestState::Ended {
        sleep(GLANCE).await;
        guest = client.get(&path).await?;
    }
    show(&guest, format, out)?;
    match guest.ended {
        Some(ended) if !ended.leftovers.is_empty() => Err(VmError::LeftBehind {
            name: guest.name,
            leftovers: ended.leftovers.join("; "),
        }),
        _ => Ok(()),
    }
}

/// What `vm run` tells a person while it waits: one line on stderr for each step.
struct Progress {
    name: String,
    shown: bool,
    state: Option<GuestState>,
}

impl Progress {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            shown: io::stderr().is_terminal(),
            state: None,
        }
    }

    fn saw(&mut self, guest: &Guest) {
        if self.state == Some(guest.state) {
            return;
        }
        self.state = Some(guest.state);
        let step = match guest.state {
            GuestState::Launching => "making its tap and process",
            GuestState::Paused => "paused, its guard is being attached and proven",
            GuestState::Guarded => "guarded, about to run",
            GuestState::Running if guest.public_key.is_none() => "running, no public key yet",
            _ => return,
        };
        self.tell(step);
    }

    fn end(&self) {
        // The guest is printed next; a blank line sets it apart from the steps.
        if self.shown && self.state.is_some() {
            let _ = writeln!(io::stderr());
        }
    }

    fn tell(&self, step: &str) {
        if self.shown {
            // Progress that cannot be shown is no reason to fail.
            let _ = writeln!(io::stderr(), "{}: {step}", self.name);
        }
    }
}

async fn list(client: &Client, all: bool, format: Format, out: &mut Output) -> Result<(), VmError> {
    let path = if all {
        format!("{}?ended=true", route::GUESTS)
    } else {
        route::GUESTS.to_owned()
    };
    let list: GuestList = client.get(&path).await?;
    if format == Format::Json {
        return Ok(out.json(&list.guests)?);
    }
    if list.guests.is_empty() {
        if io::stderr().is_terminal() {
            let remark = if all {
                "omertad remembers no guest"
            } else {
                "no guest lives; `--all` lists ended ones too"
            };
            // A remark that cannot be shown is no reason to fail.
            let _ = writeln!(io::stderr(), "{remark}");
        }
        return Ok(());
    }
    Ok(out.table(&guests(&list.guests))?)
}

fn guests(guests: &[Guest]) -> Table {
    let mut table = Table::headed(&[
        (Side::Left, "NAME"),
        (Side::Left, "STATE"),
        (Side::Left, "INTERFACE"),
        (Side::Left, "ADDRESS"),
        (Side::Left, "CONSUMER"),
        (Side::Left, "HANDSHAKE"),
        (Side::Right, "ROGUE"),
        (Side::Left, "SINCE"),
    ]);
    for guest in guests {
        // The key is long and the same for all guests of a consumer; `vm show` prints it.
        let consumer = guest.consumer.rsplit('@').next().unwrap_or_default();
        table.row(vec![
            Cell::styled(Style::Heading, &guest.name),
            Cell::styled(state_style(guest.state), guest.state),
            Cell::new(&guest.interface),
            Cell::new(guest.address),
            Cell::new(consumer),
            handshake(guest),
            rogue_frames(guest),
            Cell::new(&guest.since),
        ]);
    }
    table
}

fn show(guest: &Guest, format: Format, out: &mut Output) -> Result<(), VmError> {
    if format == Format::Json {
        return Ok(out.json(guest)?);
    }
    Ok(out.table(&details(guest))?)
}

fn details(guest: &Guest) -> Table {
    let mut table = Table::new(&[Side::Left, Side::Left]);
    table.pair("name", Cell::new(&guest.name));
    table.pair("id", Cell::new(guest.id));
    table.pair("state", Cell::styled(state_style(guest.state), guest.state));
    table.pair("since", Cell::new(&guest.since));
    table.pair("image", Cell::new(&guest.image));
    table.pair(
        "size",
        Cell::new(format_args!("{} CPU, {} MiB", guest.cpus, guest.memory_mib)),
    );
    table.pair("interface", Cell::new(&guest.interface));
    table.pair("mac", Cell::new(&guest.mac));
    table.pair("address", Cell::new(guest.address));
    table.pair("gateway", Cell::new(guest.gateway));
    table.pair("consumer", Cell::new(&guest.consumer));
    if !guest.reach.is_empty() {
        table.pair("tunnel", Cell::new(&guest.tunnel));
        table.pair("reach", Cell::new(guest.reach.join(" ")));
    }
    if let Some(name) = &guest.consumer_name {
        table.pair("followed by", Cell::new(name));
    }
    table.pair(
        "public key",
        Cell::new(guest.public_key.as_deref().unwrap_or("not reported yet")),
    );
    table.pair("handshake", handshake(guest));
    if let Some(agent) = &guest.agent {
        let style = match agent.as_str() {
            "awaited" | "arrived" => Style::Changing,
            "sound" => Style::Good,
            _ => Style::Bad,
        };
        table.pair("agent", Cell::styled(style, agent));
    }
    table.pair("mode", Cell::new(&guest.mode));
    for (index, limit) in limit::shown_of_guest(guest.limits).iter().enumerate() {
        table.pair(if index == 0 { "limit" } else { "" }, Cell::new(limit));
    }
    table.pair("on violation", Cell::new(guest.on_violation));
    table.pair("rogue frames", rogue_frames(guest));
    if let Some(seconds) = guest.timeout_seconds {
        table.pair("may run", Cell::new(format_args!("{seconds} s")));
    }
    for (index, (label, value)) in guest.labels.iter().enumerate() {
        let label = format!("{label}={value}");
        table.pair(if index == 0 { "label" } else { "" }, Cell::new(label));
    }
    if let Some(pid) = guest.pid {
        table.pair("pid", Cell::new(pid));
    }
    if let Some(console) = &guest.console {
        table.pair("console", Cell::new(console));
    }
    if let Some(log) = &guest.log {
        table.pair("log", Cell::new(log));
    }
    if let Some(ended) = &guest.ended {
        table.pair("ended", Cell::styled(Style::Bad, ending(ended)));
        for (label, span) in [
            ("frame to paused", ended.frame_to_paused_us),
            ("frame to ended", ended.frame_to_ended_us),
            ("frame to tap gone", ended.frame_to_tap_removed_us),
        ] {
            if let Some(span) = span {
                table.pair(label, Cell::new(microseconds(span)));
            }
        }
    }
    table
}

fn handshake(guest: &Guest) -> Cell {
    if guest.handshake {
        Cell::styled(Style::Good, "yes")
    } else {
        Cell::new("no")
    }
}

fn rogue_frames(guest: &Guest) -> Cell {
    let style = if guest.rogue_frames > 0 {
        Style::Bad
    } else {
        Style::Plain
    };
    Cell::styled(style, guest.rogue_frames)
}

fn state_style(state: GuestState) -> Style {
    match state {
        GuestState::Running => Style::Good,
        GuestState::Condemned | GuestState::Suspended => Style::Bad,
        GuestState::Ended => Style::Plain,
        _ => Style::Changing,
    }
}

/// How a guest ended, in one phrase.
pub fn ending(ended: &Ended) -> String {
    let mut phrase = ended.cause.word().to_owned();
    if let Some(reason) = &ended.reason {
        phrase.push_str(&format!(" ({reason})"));
    }
    for detail in [&ended.frame, &ended.message].into_iter().flatten() {
        phrase.push_str(&format!(": {detail}"));
    }
    if !ended.leftovers.is_empty() {
        phrase.push_str(&format!("; left behind: {}", ended.leftovers.join("; ")));
    }
    phrase
}

/// The console's log as JSON.
#[derive(Serialize)]
struct Log<'a> {
    name: &'a str,
    lines: Vec<&'a str>,
}

async fn logs(
    client: &Client,
    name: &GuestName,
    format: Format,
    out: &mut Output,
) -> Result<(), VmError> {
    let log = console_log(client, name).await?;
    if format == Format::Json {
        return Ok(out.json(&Log {
            name: name.as_str(),
            lines: lines_of_log(&log).collect(),
        })?);
    }
    Ok(out.bytes(text_of_log(&log).as_bytes())?)
}

async fn console_log(client: &Client, name: &GuestName) -> Result<String, VmError> {
    let path = route::of_guest(route::GUEST_LOG, name.as_str());
    let log = client.bytes(&path).await?;
    Ok(String::from_utf8_lossy(&log).into_owned())
}

/// A serial console ends its lines with \r\n, and some programs with \r\r\n.
fn lines_of_log(log: &str) -> impl Iterator<Item = &str> {
    log.lines().map(|line| line.trim_end_matches('\r'))
}

/// A log, fit for a terminal.
fn text_of_log(log: &str) -> String {
    let mut text = String::with_capacity(log.len());
    for line in lines_of_log(log) {
        text.push_str(&visible(line));
        text.push('\n');
    }
    text
}

/// The last `count` lines of a text each of whose lines has its end.
fn last_lines(text: &str, count: u32) -> &str {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let begins = text.rmatch_indices('\n').nth(count);
    begins.map_or(text, |(end, _)| &text[end + 1..])
}

/// Why a command about guests failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The arguments contradict each other.
    #[error(transparent)]
    Usage(#[from] RunError),
    /// omertad did not do it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The console broke.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The guest ended instead of running.
    #[error(
        "guest {name} did not come to run: {ending}; see `omerta vm show {name}` and omertad's log"
    )]
    Ended {
        /// The guest.
        name: String,
        /// How it ended.
        ending: String,
    },
    /// The guest has ended and not all of it is gone.
    #[error("guest {name} has ended but left behind: {leftovers}; see omertad's log")]
    LeftBehind {
        /// The guest.
        name: String,
        /// What is left of it.
        leftovers: String,
    },
    /// The guest did not report its key in time. It is left running.
    #[error(
        "guest {name} is {state} and has not reported its public key in {seconds} s: see `omerta vm logs {name}`, then wait longer or `omerta vm kill {name}`"
    )]
    NoPublicKey {
        /// The guest.
        name: String,
        /// Where it stands.
        state: GuestState,
        /// How long it was waited for.
        seconds: u32,
    },
    /// The guest has no console now.
    #[error("guest {name} is {state} and has no console: only a guest that runs has one")]
    NoConsole {
        /// The guest.
        name: String,
        /// Where it stands.
        state: GuestState,
    },
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl VmError {
    fn ended(guest: Guest) -> Self {
        Self::Ended {
            ending: guest
                .ended
                .as_ref()
                .map_or_else(|| "it ended".to_owned(), ending),
            name: guest.name,
        }
    }

    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Client(error) => error.exit(),
            Self::Console(_)
            | Self::Ended { .. }
            | Self::LeftBehind { .. }
            | Self::NoPublicKey { .. }
            | Self::Output(_) => Exit::Failed,
            Self::NoConsole { .. } => Exit::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scrollback_is_the_last_lines_and_none_of_their_controls_reach_the_terminal() {
        let text = text_of_log("one\r\ntwo\x1b[2J\r\r\nthree");
        assert_eq!(text, "one\ntwo^[[2J\nthree\n");
        for (count, shown) in [
            (0, ""),
            (1, "three\n"),
            (2, "two^[[2J\nthree\n"),
            (3, text.as_str()),
            (99, text.as_str()),
        ] {
            assert_eq!(last_lines(&text, count), shown);
        }
        assert_eq!(last_lines("", 5), "");
    }
}
