//! `omerta incident`: what guests were caught at, read from the record that omertad keeps; without omertad.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use omerta_incidents::{Digest, Entry, Fault, Frame, Incident, Outcome, Verified, What, Witness};
use omerta_verdict::Direction;
use serde::Serialize;

use crate::args::Format;
use crate::args::incident::IncidentCommand;
use crate::capture::{PacketWriter, Seen};
use crate::exit::Exit;
use crate::output::{Cell, Output, Side, Table, microseconds};

/// How often a record that seems broken is read again: omertad may be in the midst of a line.
const AGAIN: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(50);

/// An incident, and what was done about it so far.
#[derive(Serialize)]
struct Case {
    number: u64,
    at: String,
    #[serde(flatten)]
    incident: Incident,
    outcomes: Vec<Outcome>,
}

/// Carries out one verb.
///
/// # Errors
/// See [`IncidentError`].
pub fn run(command: IncidentCommand, out: &mut Output) -> Result<(), IncidentError> {
    match command {
        IncidentCommand::List {
            guest,
            record,
            shown,
        } => {
            let mut cases = cases(&record.record)?;
            cases.retain(|case| {
                guest
                    .as_ref()
                    .is_none_or(|guest| case.incident.guest == *guest)
            });
            match shown.format {
                Format::Json => out.json(&cases)?,
                Format::Text => list(&cases, out)?,
            }
        }
        IncidentCommand::Show {
            case,
            record,
            shown,
        } => {
            let case = find(&record.record, case)?;
            match shown.format {
                Format::Json => out.json(&case)?,
                Format::Text => show(&case, out)?,
            }
        }
        IncidentCommand::Verify {
            anchor,
            record,
            shown,
        } => verify(&record.record, anchor, shown.format, out)?,
        IncidentCommand::Export {
            case,
            write,
            record,
        } => export(&find(&record.record, case)?, &write)?,
    }
    Ok(())
}

/// Reads the whole record; what it says of an incident may be in several entries.
fn cases(record: &Path) -> Result<Vec<Case>, IncidentError> {
    let mut cases: Vec<Case> = Vec::new();
    let each = |cases: &mut Vec<Case>, entry: &Entry| match &entry.what {
        What::Incident(incident) => cases.push(Case {
            number: entry.number,
            at: entry.at.clone(),
            incident: Incident::clone(incident),
            outcomes: Vec::new(),
        }),
        What::Outcome(outcome) => {
            let of = cases
                .iter_mut()
                .rfind(|case| case.incident.case == outcome.case);
            // Its incident may have been removed for the record's bounds.
            if let Some(case) = of {
                case.outcomes.push(Outcome::clone(outcome));
            }
        }
        What::Lost { .. } | What::Removed { .. } | What::Damaged { .. } => {}
    };
    read(record, || {
        cases.clear();
        omerta_incidents::read(record, |entry| each(&mut cases, entry))
    })?;
    Ok(cases)
}

/// Reads by `once`, again where a line may have been half written.
fn read(
    record: &Path,
    mut once: impl FnMut() -> Result<Verified, Fault>,
) -> Result<Verified, IncidentError> {
    if !record.is_dir() {
        return Err(IncidentError::NoRecord(record.to_owned()));
    }
    let mut last = once();
    for _ in 1..AGAIN {
        if last.is_ok() {
            break;
        }
        sleep(BETWEEN);
        last = once();
    }
    last.map_err(IncidentError::Broken)
}

fn find(record: &Path, name: String) -> Result<Case, IncidentError> {
    cases(record)?
        .into_iter()
        .rfind(|case| case.incident.case == name)
        .ok_or(IncidentError::NoCase(name))
}

fn list(cases: &[Case], out: &mut Output) -> io::Result<()> {
    let columns = [
        "CASE", "AT", "GUEST", "TRIED", "REASON", "ACTION", "DONE", "FRAME",
    ];
    let mut table = Table::headed(&columns.map(|column| (Side::Left, column)));
    for case in cases {
        let incident = &case.incident;
        let done = case
            .outcomes
            .last()
            .map_or("-", |outcome| outcome.deed.word());
        table.row(vec![
            Cell::new(&incident.case),
            Cell::new(&case.at),
            Cell::new(&incident.guest),
            Cell::new(&incident.attempt),
            Cell::new(
                incident
                    .frame
                    .as_ref()
                    .map_or("-", |frame| frame.reason.as_str()),
            ),
            Cell::new(&incident.action),
            Cell::new(done),
            Cell::new(
                incident
                    .frame
                    .as_ref()
                    .map_or("-", |frame| frame.text.as_str()),
            ),
        ]);
    }
    out.table(&table)
}

fn show(case: &Case, out: &mut Output) -> io::Result<()> {
    let incident = &case.incident;
    let witnesses: Vec<_> = incident
        .witnesses
        .iter()
        .map(|witness| weight(*witness))
        .collect();
    let epoch = incident
        .epoch
        .map_or_else(|| "unknown".to_owned(), |epoch| epoch.to_string());
    let mut table = Table::new(&[Side::Left, Side::Left]);
    let mut pair = |label: &str, value: &str| table.pair(label, Cell::new(value));
    pair("case", &incident.case);
    pair("at", &case.at);
    pair(
        "guest",
        &format!("{} on {}", incident.guest, incident.interface),
    );
    pair("consumer", &incident.consumer);
    pair(
        "tried",
        &format!("{} ({})", incident.attempt, incident.inferred_from),
    );
    if let Some(caught) = &incident.frame {
        pair("frame", &frame(caught));
    }
    pair("witnesses", &witnesses.join(", "));
    pair("epoch", &epoch);
    pair("action", &incident.action);
    for outcome in &case.outcomes {
        let mut text = outcome.deed.word().to_owned();
        for (what, span) in [
            ("paused", outcome.frame_to_paused_us),
            ("ended", outcome.frame_to_ended_us),
            ("tap removed", outcome.frame_to_tap_removed_us),
        ] {
            if let Some(span) = span {
                text.push_str(&format!(", {what} {} after the frame", microseconds(span)));
            }
        }
        if let Some(message) = &outcome.message {
            text.push_str(&format!(": {message}"));
        }
        pair("done", &text);
    }
    for before in &incident.before {
        pair("before", &frame(before));
    }
    for since in case.outcomes.iter().flat_map(|outcome| &outcome.since) {
        pair("since", &frame(since));
    }
    out.table(&table)
}

fn frame(frame: &Frame) -> String {
    format!(
        "{}, {} bytes {}: {}",
        frame.text, frame.length, frame.direction, frame.reason
    )
}

/// How much a witness's word is worth.
const fn weight(witness: Witness) -> &'static str {
    match witness {
        Witness::Kernel => "kernel (proof)",
        Witness::Agent => "agent (the guest's word, but for its silence)",
        Witness::Outside => "outside (the host's own tables)",
        Witness::Console => "console (the guest's word, and anyone's in it)",
    }
}

/// What `verify -o json` prints.
#[derive(Serialize)]
struct Found {
    first: u64,
    last: u64,
    hash: Digest,
    lost: u64,
    damage: Vec<String>,
}

fn verify(
    record: &Path,
    anchor: Option<(u64, Digest)>,
    format: Format,
    out: &mut Output,
) -> Result<(), IncidentError> {
    let mut at_anchor = None;
    let found = read(record, || {
        omerta_incidents::read(record, |entry| {
            // What an entry says of the one before it has been proven by then.
            if anchor.is_some_and(|(number, _)| number + 1 == entry.number) {
                at_anchor = Some(entry.previous);
            }
        })
    })?;
    if anchor.is_some_and(|(number, _)| number == found.last) {
        at_anchor = Some(found.hash);
    }
    if let Some((number, hash)) = anchor
        && at_anchor != Some(hash)
    {
        return Err(IncidentError::Anchor { number });
    }
    let damage = found
        .damage
        .iter()
        .map(|(number, problem)| format!("entry {number}: {problem}"))
        .collect::<Vec<_>>();
    match format {
        Format::Json => out.json(&Found {
            first: found.first,
            last: found.last,
            hash: found.hash,
            lost: found.lost,
            damage: damage.clone(),
        })?,
        Format::Text => {
            out.line(format!(
                "entries {} to {} are whole and in order; keep {}:{} elsewhere to prove it later",
                found.first, found.last, found.last, found.hash
            ))?;
            if found.lost > 0 {
                out.line(format!("{} entries could not be written", found.lost))?;
            }
        }
    }
    match damage.first() {
        Some(first) => Err(IncidentError::Damaged(first.clone())),
        None => Ok(()),
    }
}

fn export(case: &Case, path: &Path) -> Result<(), IncidentError> {
    if path == Path::new("-") {
        return packets(case, io::stdout()).map_err(IncidentError::Output);
    }
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|file| packets(case, file))
        .map_err(|source| IncidentError::Write {
            path: path.to_owned(),
            source,
        })
}

fn packets(case: &Case, stream: impl Write) -> io::Result<()> {
    let incident = &case.incident;
    let mut writer = PacketWriter::new(stream, &incident.interface)?;
    let since = case.outcomes.iter().flat_map(|outcome| &outcome.since);
    for frame in incident.before.iter().chain(&incident.frame).chain(since) {
        let bytes = frame.head().unwrap_or_default();
        writer.write(&Seen {
            at: Duration::from_nanos(frame.at_ns),
            direction: match frame.direction.as_str() {
                "ingress" => Direction::Ingress,
                _ => Direction::Egress,
            },
            bytes: &bytes,
            length: frame.length,
            comment: &format!("dropped: {} (case {})", frame.reason, incident.case),
        })?;
    }
    writer.flush()
}

/// Why an incident cannot be shown, or a record not be trusted.
#[derive(Debug, thiserror::Error)]
pub enum IncidentError {
    /// There is no such directory.
    #[error("no record of incidents at {}: omertad makes it below its state directory; name another with --record", .0.display())]
    NoRecord(PathBuf),
    /// There is no such incident.
    #[error("no incident `{0}` in the record: see `omerta incident list`")]
    NoCase(String),
    /// The record is broken.
    #[error(
        "the record of incidents is broken: keep a copy, and believe what comes before this place alone"
    )]
    Broken(#[source] Fault),
    /// The record is not the one that was verified before.
    #[error(
        "entry {number} of the record does not have the hash that is given: the record was exchanged or altered since, or begins later"
    )]
    Anchor {
        /// Which entry.
        number: u64,
    },
    /// omertad has found damage before.
    #[error("the record is whole, but omertad found one before it damaged and put it aside: {0}")]
    Damaged(String),
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}

impl IncidentError {
    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::NoRecord(_) | Self::NoCase(_) => Exit::NotFound,
            _ => Exit::Failed,
        }
    }
}
