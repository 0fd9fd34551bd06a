//! `omerta guard`: guards, without the daemon.

mod fence;
mod upgrade;
mod watch;

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use omerta_dataplane::{
    Counters, DirectionCounters, ErrorKind, Guard, GuardError, GuardStatus, PinnedGuard, Standing,
};
use omerta_verdict::Reason;
use serde::Serialize;

use crate::allowlist::{self, AllowlistError};
use crate::args::Format;
use crate::args::guard::{
    AttachArgs, AttachError, GuardCommand, InterfaceName, ReasonsFormat, check_limits,
};
use crate::args::limit;
use crate::args::watch::WatchFileError;
use crate::exit::{Exit, one_line};
use crate::output::{Cell, Output, Side, Style, Table, bytes};
use crate::translation;

/// Carries out one command in the network namespace of the calling thread.
///
/// # Errors
/// See [`GuardCommandError`]. What failed has changed nothing, unless it is standard output.
pub fn run(command: GuardCommand, out: &mut Output) -> Result<(), GuardCommandError> {
    match command {
        GuardCommand::Attach(args) => attach(args, out),
        GuardCommand::Allow(args) => {
            let epoch = open(&args.interface)?.allow(&args.endpoints)?;
            in_force(&args.interface, epoch, out)
        }
        GuardCommand::Revoke(args) => {
            let epoch = open(&args.interface)?.revoke(&args.endpoints)?;
            in_force(&args.interface, epoch, out)
        }
        GuardCommand::Replace { interface, file } => {
            let endpoints = allowlist::read(&file)?;
            let epoch = open(&interface)?.replace(&endpoints)?;
            in_force(&interface, epoch, out)
        }
        GuardCommand::Mode { interface, mode } => {
            let epoch = open(&interface)?.set_mode(mode)?;
            in_force(&interface, epoch, out)
        }
        GuardCommand::Limit { interface, limits } => {
            check_limits(&limits)?;
            let epoch = open(&interface)?.limit(|before| limit::put(&limits, before))?;
            in_force(&interface, epoch, out)
        }
        GuardCommand::Lease { interface, lease } => {
            open(&interface)?.set_lease(lease.0)?;
            match lease.0 {
                Some(time) => out.line(format_args!(
                    "{interface}: drops everything in {} s unless it is renewed",
                    time.as_secs()
                ))?,
                None => out.line(format_args!("{interface}: no lease, in force for ever"))?,
            }
            Ok(())
        }
        GuardCommand::Show { interface, shown } => show(&interface, shown.format, out),
        GuardCommand::Log { interface, follow } => log(&interface, follow, out),
        GuardCommand::List(shown) => list(shown.format, out),
        GuardCommand::Upgrade {
            interfaces,
            all,
            shown,
        } => upgrade::run(&interfaces, all, shown.format, out),
        GuardCommand::Watch { config, once } => watch::run(&config, once, out),
        GuardCommand::Fence { remove: true, .. } => fence::remove(out),
        GuardCommand::Fence { shown, .. } => fence::show(shown.format, out),
        GuardCommand::Detach { interface } => detach(&interface, out),
        GuardCommand::Reasons { format } => reasons(format, out),
    }
}

fn open(interface: &InterfaceName) -> Result<Guard, GuardError> {
    Guard::open(interface.as_str())
}

fn attach(args: AttachArgs, out: &mut Output) -> Result<(), GuardCommandError> {
    let attachment = args.check()?;
    let interface = attachment.interface.as_str();
    let told = |error: &GuardError| {
        if attachment.verbose {
            last_words(error);
        }
    };
    let guard = Guard::attach(interface, &attachment.config).inspect_err(told)?;
    if let Some(peers) = &attachment.redirect {
        let peers: Vec<_> = peers.iter().map(InterfaceName::as_str).collect();
        if let Err(error) = guard.redirect(&peers) {
            told(&error);
            // What failed has changed nothing.
            guard.detach()?;
            return Err(error.into());
        }
        if translation::is_found() {
            // Where stderr is closed the guard is in force all the same.
            let _ = writeln!(
                io::stderr(),
                "warning: this host translates source addresses, and what is redirected passes that by: \
                 without --redirect where {interface}'s guest needs it"
            );
        }
    }
    // A good moment; what cannot be removed is in nobody's way.
    let _ = Guard::sweep_gone_namespaces();
    let status = guard.status()?;
    if status.standing != Standing::InForce {
        // What it says is said by `show` too.
        let broken = GuardError::Broken {
            interface: interface.to_owned(),
            standing: status.standing,
        };
        let _ = writeln!(io::stderr(), "warning: {broken}");
    }
    let endpoints = match status.allow.len() {
        1 => "1 endpoint".to_owned(),
        count => format!("{count} endpoints"),
    };
    Ok(out.line(format_args!(
        "{interface}: guarded, {}, {endpoints}, epoch {}",
        status.mode, status.epoch
    ))?)
}

fn in_force(
    interface: &InterfaceName,
    epoch: u64,
    out: &mut Output,
) -> Result<(), GuardCommandError> {
    Ok(out.line(format_args!("{interface}: epoch {epoch} in force"))?)
}

fn detach(interface: &InterfaceName, out: &mut Output) -> Result<(), GuardCommandError> {
    match open(interface) {
        Ok(guard) => {
            guard.detach()?;
            Ok(out.line(format_args!("{interface}: no longer guarded"))?)
        }
        // What is left of a guard whose interface is gone or was re-created.
        Err(error @ (GuardError::NoInterface { .. } | GuardError::NotInForce { .. })) => {
            if !Guard::remove_stale(interface.as_str(), None)? {
                return Err(error.into());
            }
            Ok(out.line(format_args!(
                "{interface}: the guard was not whole; what was left of it is removed"
            ))?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Lines of the verifier's that are worth a look: it tells the reason last.
const LAST_WORDS: usize = 40;

fn last_words(error: &GuardError) {
    let lines: Vec<_> = error.verifier_log().unwrap_or_default().lines().collect();
    for line in &lines[lines.len().saturating_sub(LAST_WORDS)..] {
        // Where stderr is closed the exit code has to do.
        let _ = writeln!(io::stderr(), "verifier: {}", one_line(line));
    }
}

fn show(
    interface: &InterfaceName,
    format: Format,
    out: &mut Output,
) -> Result<(), GuardCommandError> {
    let seen = Guard::inspect(interface.as_str())?;
    if format == Format::Json {
        out.json(&seen.status)?;
    } else {
        out.table(&policy(&seen.status))?;
        out.line("")?;
        out.table(&traffic(&seen.counters))?;
    }
    Ok(seen.judge()?)
}

fn log(interface: &InterfaceName, follow: bool, out: &mut Output) -> Result<(), GuardCommandError> {
    let mut stream = open(interface)?.diagnostics()?;
    loop {
        for told in stream.read() {
            // The same programs judge for other interfaces, of which nobody else is told then.
            let of = told.interface.as_deref().unwrap_or("a guard that is gone");
            out.line(format_args!("{of}: {}", told.line))?;
        }
        if !follow {
            return Ok(());
        }
        let mut ring = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ring, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(GuardCommandError::Wait(errno.into())),
        }
    }
}

fn policy(status: &GuardStatus) -> Table {
    let mut table = Table::new(&[Side::Left, Side::Left]);
    table.pair(
        "interface",
        Cell::new(format_args!(
            "{} (index {})",
            status.interface, status.ifindex
        )),
    );
    let style = if status.standing == Standing::InForce {
        Style::Good
    } else {
        Style::Bad
    };
    table.pair("state", Cell::styled(style, status.state));
    if let Some(owner) = &status.owner {
        table.pair("owner", Cell::new(owner));
    }
    table.pair("programs", programs(status));
    table.pair("mode", Cell::new(status.mode));
    table.pair("epoch", Cell::new(status.epoch));
    let party =
        |mac: &str, addresses: &[String]| Cell::new(format_args!("{mac} {}", addresses.join(" ")));
    table.pair("guest", party(&status.mac, &status.addresses));
    table.pair("gateway", party(&status.gateway_mac, &status.gateways));
    if status.allow.is_empty() {
        table.pair("allow", Cell::styled(Style::Changing, "nothing"));
    }
    for (index, endpoint) in status.allow.iter().enumerate() {
        table.pair(if index == 0 { "allow" } else { "" }, Cell::new(endpoint));
    }
    for (index, limit) in limit::shown(status.limits).iter().enumerate() {
        table.pair(if index == 0 { "limit" } else { "" }, Cell::new(limit));
    }
    match status.lease {
        Some(lease) if lease.expired => table.pair(
            "lease",
            Cell::styled(
                Style::Bad,
                "has ended: everything is dropped until it is renewed",
            ),
        ),
        Some(lease) => table.pair(
            "lease",
            Cell::new(format_args!("ends in {} s", lease.remaining_seconds)),
        ),
        None => {}
    }
    if let Some(redirect) = status.redirect {
        let counts = format_args!(
            "{}: {} to neighbours, {} to peers, {} left to the stack, {} unproven",
            if redirect.in_force {
                "in force"
            } else {
                "cut off"
            },
            redirect.to_neighbours,
            redirect.to_peers,
            redirect.to_stack,
            redirect.unproven
        )
        .to_string();
        let style = if redirect.in_force {
            Style::Good
        } else {
            Style::Bad
        };
        table.pair("redirect", Cell::styled(style, counts));
    }
    if status.events_lost > 0 {
        table.pair("events lost", Cell::styled(Style::Bad, status.events_lost));
    }
    table
}

fn programs(status: &GuardStatus) -> Cell {
    let style = match status.programs {
        "current" => Style::Plain,
        _ => Style::Changing,
    };
    Cell::styled(style, status.programs)
}

/// Both directions side by side; of the reasons only those that occurred.
fn traffic(counters: &Counters) -> Table {
    let mut table = Table::headed(&[
        (Side::Left, ""),
        (Side::Right, "EGRESS"),
        (Side::Right, "BYTES"),
        (Side::Right, "INGRESS"),
        (Side::Right, "BYTES"),
    ]);
    let directions = [&counters.egress, &counters.ingress];
    let mut row =
        |label: &str, bad: bool, pick: &dyn Fn(&DirectionCounters) -> omerta_dataplane::Count| {
            let mut cells = vec![Cell::styled(Style::Heading, label)];
            for direction in directions {
                let count = pick(direction);
                let style = if bad && count.packets > 0 {
                    Style::Bad
                } else {
                    Style::Plain
                };
                cells.push(Cell::styled(style, count.packets));
                cells.push(Cell::new(bytes(count.bytes)));
            }
            table.row(cells);
        };
    row("received", false, &|direction| direction.rx());
    row("allowed", false, &|direction| direction.allowed);
    row("answered", false, &|direction| direction.answered);
    for &reason in Reason::ALL {
        let occurred = |direction: &DirectionCounters| direction.dropped_for(reason).packets > 0;
        if directions.into_iter().any(occurred) {
            row(&format!("dropped: {reason}"), true, &|direction| {
                direction.dropped_for(reason)
            });
        }
    }
    table
}

fn list(format: Format, out: &mut Output) -> Result<(), GuardCommandError> {
    let mut guards = Vec::new();
    let mut broken = None;
    for PinnedGuard {
        interface,
        standing,
        ..
    } in Guard::pinned()?
    {
        if !standing.is_whole() {
            // Left-overs judge nothing; of the others the first is told when the rest is shown.
            if standing != Standing::Gone && broken.is_none() {
                broken = Some(GuardError::Broken {
                    interface,
                    standing,
                });
            }
            continue;
        }
        match Guard::open(&interface).and_then(|guard| guard.status()) {
            Ok(status) => guards.push(status),
            // Detached, or its interface removed, since it was listed.
            Err(
                GuardError::NoInterface { .. }
                | GuardError::NotGuarded { .. }
                | GuardError::NotInForce { .. }
                | GuardError::Replaced { .. },
            ) => {}
            // Of another version, or cut off from its list; the others are shown all the same.
            Err(
                error @ (GuardError::OtherPolicyLayout { .. }
                | GuardError::OtherAccountsLayout { .. }
                | GuardError::ProgramsLost { .. }),
            ) => {
                broken.get_or_insert(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    if format == Format::Json {
        out.json(&guards)?;
    } else if guards.is_empty() && broken.is_none() {
        if io::stderr().is_terminal() {
            // A remark that cannot be shown is no reason to fail.
            let _ = writeln!(
                io::stderr(),
                "no interface of this network namespace is guarded"
            );
        }
    } else if !guards.is_empty() {
        out.table(&overview(&guards))?;
    }
    broken.map_or(Ok(()), |error| Err(error.into()))
}

fn overview(guards: &[GuardStatus]) -> Table {
    let mut table = Table::headed(&[
        (Side::Left, "INTERFACE"),
        (Side::Left, "STATE"),
        (Side::Left, "PROGRAMS"),
        (Side::Left, "MODE"),
        (Side::Right, "EPOCH"),
        (Side::Right, "ENDPOINTS"),
        (Side::Right, "EGRESS"),
        (Side::Right, "DROPPED"),
        (Side::Right, "INGRESS"),
        (Side::Right, "DROPPED"),
    ]);
    for status in guards {
        let mut cells = vec![
            Cell::styled(Style::Heading, &status.interface),
            Cell::new(status.state),
            programs(status),
            Cell::new(status.mode),
            Cell::new(status.epoch),
            Cell::new(status.allow.len()),
        ];
        for direction in [&status.egress, &status.ingress] {
            let dropped: u64 = direction.dropped.values().sum();
            let style = if dropped > 0 {
                Style::Bad
            } else {
                Style::Plain
            };
            cells.push(Cell::new(direction.rx));
            cells.push(Cell::styled(style, dropped));
        }
        table.row(cells);
    }
    table
}

/// A reason as JSON.
#[derive(Serialize)]
struct Meaning {
    reason: &'static str,
    meaning: &'static str,
}

fn reasons(format: ReasonsFormat, out: &mut Output) -> Result<(), GuardCommandError> {
    let all = Reason::ALL.iter().map(|reason| Meaning {
        reason: reason.word(),
        meaning: reason.meaning().trim(),
    });
    match format {
        ReasonsFormat::Json => out.json(&all.collect::<Vec<_>>())?,
        ReasonsFormat::Markdown => {
            out.line("| Reason | A frame dropped for it |\n|---|---|")?;
            for Meaning { reason, meaning } in all {
                out.line(format_args!(
                    "| `{reason}` | {} |",
                    meaning.replace('|', "\\|")
                ))?;
            }
        }
        ReasonsFormat::Text => {
            let mut table = Table::headed(&[(Side::Left, "REASON"), (Side::Left, "MEANING")]);
            for Meaning { reason, meaning } in all {
                table.row(vec![
                    Cell::styled(Style::Heading, reason),
                    Cell::new(meaning),
                ]);
            }
            out.table(&table)?;
        }
    }
    Ok(())
}

/// Why a command about guards failed.
#[derive(Debug, thiserror::Error)]
pub enum GuardCommandError {
    /// The arguments contradict each other.
    #[error(transparent)]
    Usage(#[from] AttachError),
    /// The file declares no interfaces.
    #[error(transparent)]
    WatchFile(#[from] WatchFileError),
    /// Interfaces cannot be watched.
    #[error("cannot watch the interfaces of this network namespace")]
    Watch(#[source] io::Error),
    /// Declared interfaces are not as they should be.
    #[error("{0} of the declared interfaces could not be guarded: each was told above")]
    Unguarded(usize),
    /// The fence could not be made, read or removed.
    #[error(transparent)]
    Fence(#[from] fence::FenceError),
    /// The declared fence does not stand.
    #[error("the fence could not be made: it was told above")]
    NoFence,
    /// The file is no allowlist.
    #[error(transparent)]
    Allowlist(#[from] AllowlistError),
    /// The guard could not be made, changed or read.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The guard's log cannot be followed.
    #[error("cannot wait for the guard's log")]
    Wait(#[source] io::Error),
    /// Standard output failed.
    #[error("cannot write to standard output (what was asked for is done)")]
    Output(#[from] io::Error),
}

impl GuardCommandError {
    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::WatchFile(WatchFileError::Missing(_)) => Exit::NotFound,
            Self::WatchFile(WatchFileError::Unreadable { .. }) => Exit::Failed,
            Self::WatchFile(_) => Exit::Usage,
            Self::Allowlist(error) => error.exit(),
            Self::Guard(error) => exit_of(error),
            Self::Fence(_)
            | Self::NoFence
            | Self::Wait(_)
            | Self::Watch(_)
            | Self::Unguarded(_)
            | Self::Output(_) => Exit::Failed,
        }
    }
}

/// How the process ends after an error of the dataplane.
pub fn exit_of(error: &GuardError) -> Exit {
    match error.kind() {
        ErrorKind::NotFound => Exit::NotFound,
        ErrorKind::Usage => Exit::Usage,
        ErrorKind::Refused => Exit::Refused,
        ErrorKind::Failed => Exit::Failed,
    }
}
