//! The fence of `omerta guard watch`: rules of nftables(8) that keep interfaces of declared names from
//! everything, in both directions, until they are guarded.
//!
//! Whoever makes a tap and sets it up at once is milliseconds ahead of whoever is to guard it. The rules
//! drop what comes from, or goes to, an interface whose name is fenced and that is not in the group of those
//! that are let through. Every interface begins in group 0, whatever its name and index, and leaves a group
//! only with its end; the watch puts one into that group when its guard is in force. So what is made again
//! is fenced from its first instant, also while no watch lives: the rules stay when it ends.

use std::io::{self, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{self, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use serde::Serialize;
use serde_json::Value;

use super::GuardCommandError;
use crate::args::Format;
use crate::args::fence::FenceConfig;
use crate::output::{Cell, Output, Side, Style, Table};

/// The table's name, in each family.
const NAME: &str = "omerta_fence";
/// A chain: its name, its hook, and what nftables calls the interface there.
type Chain = (&'static str, &'static str, &'static str);
/// What is routed or for the host itself.
const INET: &[Chain] = &[("from", "prerouting", "iif"), ("to", "postrouting", "oif")];
const ARP: &[Chain] = &[("from", "input", "iif"), ("to", "output", "oif")];
/// What goes from port to port, and between a port and the bridge itself: what a bridge sends of its own
/// (spanning tree, queries) goes by `output` alone, and what is for bridges alone comes by `input`.
const BRIDGE: &[Chain] = &[
    ("from", "prerouting", "iif"),
    ("from_alone", "input", "iif"),
    ("to", "postrouting", "oif"),
    ("to_alone", "output", "oif"),
];
const FAMILIES: [(&str, &[Chain]); 3] = [("inet", INET), ("arp", ARP), ("bridge", BRIDGE)];
/// Before all that others do (defragmentation is at -400), so that nothing is remembered of what is dropped.
const PRIORITY: i32 = -500;
/// Between two looks of which there was occasion: others may change their rules all the time.
const BETWEEN: Duration = Duration::from_secs(1);

/// Why the fence does not stand, or cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// Another watch keeps its own there.
    #[error(
        "another `omerta guard watch` keeps the fence of this network namespace: declare all taps in its file, or end it"
    )]
    Kept,
    /// The system refuses.
    #[error("cannot take the fence of this network namespace")]
    Take(#[source] io::Error),
    /// There is no `nft`.
    #[error("cannot run nft, which makes the fence: install nftables")]
    NoProgram(#[source] io::Error),
    /// It refuses.
    #[error("nft cannot {action} the fence (as root, with nf_tables in the kernel): {why}")]
    Refused {
        /// What was asked of it.
        action: &'static str,
        /// Its complaint.
        why: String,
    },
}

/// The fence as it is declared, and as it was found last.
pub struct Fence {
    config: FenceConfig,
    /// Its name is one watch's alone in a network namespace: two would undo each other's rules.
    _turn: UnixDatagram,
    /// As `nft` lists the rules where nobody has changed them.
    wanted: Option<String>,
    /// Whether they were made.
    made: bool,
    /// When it was looked at last.
    looked: Option<Instant>,
    /// Whether there was an occasion to look again since.
    is_due: bool,
    told: Option<String>,
}

impl Fence {
    /// One that does not stand yet.
    ///
    /// # Errors
    /// Where another process keeps one in this network namespace.
    pub fn take(config: FenceConfig) -> Result<Self, FenceError> {
        // Abstract names are a network namespace's own (unix(7)).
        let turn =
            SocketAddr::from_abstract_name(NAME).and_then(|name| UnixDatagram::bind_addr(&name));
        let turn = turn.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => FenceError::Kept,
            _ => FenceError::Take(error),
        })?;
        Ok(Self {
            config,
            _turn: turn,
            wanted: None,
            made: false,
            looked: None,
            is_due: true,
            told: None,
        })
    }

    /// The group of interfaces that are let through.
    pub fn group(&self) -> u32 {
        self.config.group
    }

    /// Whether anything is wrong with it.
    pub fn is_wrong(&self) -> bool {
        self.told.is_some()
    }

    /// Makes the fence, or looks whether it is as it was made where there is an `occasion`. What is wrong is
    /// told once, and tried again. Gives how it has changed.
    pub fn look(&mut self, occasion: bool) -> Option<&'static str> {
        self.is_due |= occasion || self.told.is_some();
        if !self.is_due || self.looked.is_some_and(|then| then.elapsed() < BETWEEN) {
            return None;
        }
        self.looked = Some(Instant::now());
        self.is_due = false;
        match self.stand() {
            Ok(how) => {
                self.told = None;
                how
            }
            Err(error) => {
                let why = crate::exit::explain(&error);
                if self.told.as_ref() != Some(&why) {
                    // Where stderr is closed guarding goes on all the same.
                    let _ = writeln!(io::stderr(), "omerta: no fence: {why}");
                }
                self.told = Some(why);
                None
            }
        }
    }

    fn stand(&mut self) -> Result<Option<&'static str>, FenceError> {
        let wanted = match &self.wanted {
            Some(wanted) => wanted,
            None => self.wanted.insert(listed_apart(&self.config)?),
        };
        if self.made && listed().is_ok_and(|listed| listed == *wanted) {
            return Ok(None);
        }
        nft("make", &["-f", "-"], &rules(&self.config))?;
        // Somebody may change them at once.
        self.is_due = true;
        Ok(Some(match std::mem::replace(&mut self.made, true) {
            true => "it was not as it had been made: it stands again",
            false => "it stands",
        }))
    }
}

/// How `nft` lists the fence, as it tells in a network namespace of nobody else's.
fn listed_apart(config: &FenceConfig) -> Result<String, FenceError> {
    let rules = rules(config);
    let apart = move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| FenceError::Take(errno.into()))?;
        nft("make", &["-f", "-"], &rules)?;
        listed()
    };
    // A thread's namespace is its own.
    let thread = thread::Builder::new().name("fence".into());
    let thread = thread.spawn(apart).map_err(FenceError::Take)?;
    thread
        .join()
        .unwrap_or_else(|_| Err(FenceError::Take(io::Error::other("a thread broke off"))))
}

/// All of it, in one transaction of the kernel's: what stood before it goes when it comes.
fn rules(config: &FenceConfig) -> String {
    let mut text = String::new();
    for (family, chains) in FAMILIES {
        // There must be one to delete.
        text += &format!("add table {family} {NAME}\ndelete table {family} {NAME}\n");
        text += &format!("table {family} {NAME} {{\n");
        for (chain, hook, way) in chains {
            text += &format!(
                "chain {chain} {{\ntype filter hook {hook} priority {PRIORITY}; policy accept;\n"
            );
            for name in &config.interfaces {
                let group = config.group;
                text += &format!("{way}name \"{name}\" {way}group != {group} counter drop\n");
            }
            text += "}\n";
        }
        text += "}\n";
    }
    text
}

/// The rules as they are, without what they have counted, in numbers: a group may be given a name at any time
/// (/etc/iproute2/group).
fn listed() -> Result<String, FenceError> {
    FAMILIES
        .into_iter()
        .map(|(family, _)| nft("list", &["-n", "-s", "list", "table", family, NAME], ""))
        .collect()
}

/// One rule, as a person or a program is shown it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Rule {
    /// inet, arp or bridge.
    family: String,
    /// `from` or `to` the interfaces.
    direction: &'static str,
    /// Their name, or how it begins.
    interfaces: String,
    /// The group of those that are let through.
    group: u64,
    /// What was dropped.
    packets: u64,
    bytes: u64,
}

/// Shows the fence of this network namespace.
///
/// # Errors
/// Where nft cannot be run or understood.
pub fn show(format: Format, out: &mut Output) -> Result<(), GuardCommandError> {
    let rules = read()?;
    if format == Format::Json {
        return Ok(out.json(&rules)?);
    }
    if rules.is_empty() {
        return Ok(out.line("no fence: `omerta guard watch` makes the one that its file declares")?);
    }
    let mut table = Table::headed(&[
        (Side::Left, "INTERFACES"),
        (Side::Left, "DROPPED"),
        (Side::Left, "FAMILY"),
        (Side::Right, "PACKETS"),
        (Side::Right, "BYTES"),
    ]);
    for rule in rules {
        table.row(vec![
            Cell::styled(Style::Heading, rule.interfaces),
            Cell::new(rule.direction),
            Cell::new(rule.family),
            Cell::new(rule.packets),
            Cell::new(rule.bytes),
        ]);
    }
    Ok(out.table(&table)?)
}

fn read() -> Result<Vec<Rule>, FenceError> {
    let objects = objects("ruleset")?.into_iter();
    Ok(objects.filter_map(|object| rule(&object["rule"])).collect())
}

/// What nft lists of `what`.
fn objects(what: &str) -> Result<Vec<Value>, FenceError> {
    let said = nft("list", &["-n", "-j", "list", what], "")?;
    let mut said: Value = serde_json::from_str(&said).map_err(|error| FenceError::Refused {
        action: "list",
        why: format!("its answer is no JSON: {error}"),
    })?;
    match said["nftables"].take() {
        Value::Array(objects) => Ok(objects),
        _ => Ok(Vec::new()),
    }
}

fn rule(rule: &Value) -> Option<Rule> {
    if rule["table"] != NAME {
        return None;
    }
    let parts = rule["expr"].as_array()?;
    let right = |place: usize| Some(&parts.get(place)?["match"]["right"]);
    let counter = parts.iter().find_map(|part| part.get("counter"))?;
    Some(Rule {
        family: rule["family"].as_str()?.to_owned(),
        direction: match rule["chain"].as_str()? {
            "from" | "from_alone" => "from",
            _ => "to",
        },
        interfaces: right(0)?.as_str()?.to_owned(),
        group: right(1)?.as_u64()?,
        packets: counter["packets"].as_u64()?,
        bytes: counter["bytes"].as_u64()?,
    })
}

/// Removes the fence: what it kept is open.
///
/// # Errors
/// Where nft cannot be run, or refuses.
pub fn remove(out: &mut Output) -> Result<(), GuardCommandError> {
    let tables = objects("tables")?;
    let is_there = |family: &str| {
        let mut tables = tables.iter().map(|object| &object["table"]);
        tables.any(|table| table["family"] == family && table["name"] == NAME)
    };
    let there: Vec<_> = FAMILIES
        .into_iter()
        .filter(|(family, _)| is_there(family))
        .map(|(family, _)| format!("delete table {family} {NAME}\n"))
        .collect();
    if there.is_empty() {
        return Ok(out.line("there is no fence")?);
    }
    nft("remove", &["-f", "-"], &there.concat())?;
    Ok(out.line("the fence is removed")?)
}

/// Runs nft with `input`, and gives what it prints.
fn nft(action: &'static str, arguments: &[&str], input: &str) -> Result<String, FenceError> {
    let run = || -> io::Result<process::Output> {
        let mut child = Command::new("nft")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // Where it does not read, it says why.
            let _ = stdin.write_all(input.as_bytes());
        }
        child.wait_with_output()
    };
    let ran = run().map_err(FenceError::NoProgram)?;
    if !ran.status.success() {
        let why = String::from_utf8_lossy(&ran.stderr);
        let why = why
            .lines()
            .next()
            .unwrap_or("it did not say why")
            .to_owned();
        return Err(FenceError::Refused { action, why });
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_fenced_in_each_family_and_both_ways() {
        let config = FenceConfig {
            interfaces: vec!["tap*".into(), "vm0".into()],
            group: 7,
        };
        let text = rules(&config);
        for way in ["iif", "oif"] {
            for name in ["tap*", "vm0"] {
                let rule = format!("{way}name \"{name}\" {way}group != 7 counter drop\n");
                assert_eq!(text.matches(&rule).count(), 4, "{text}");
            }
        }
        assert_eq!(text.matches("priority -500").count(), 8);
    }

    #[test]
    fn a_rule_of_nfts_is_read_and_what_is_another_tables_is_not() {
        let said: Value = serde_json::from_str(
            r#"{"family": "arp", "table": "omerta_fence", "chain": "to", "handle": 5, "expr": [
                {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "tap*"}},
                {"match": {"op": "!=", "left": {"meta": {"key": "oifgroup"}}, "right": 7}},
                {"counter": {"packets": 3, "bytes": 84}}, {"drop": null}]}"#,
        )
        .unwrap();
        let read = rule(&said).unwrap();
        assert_eq!(
            (read.family.as_str(), read.interfaces.as_str()),
            ("arp", "tap*")
        );
        assert_eq!((read.group, read.packets, read.bytes), (7, 3, 84));
        for broken in [
            said.to_string().replace("omerta_fence", "filter"),
            said.to_string().replace("counter", "count"),
            said.to_string().replace("\"tap*\"", "{}"),
            "null".to_owned(),
        ] {
            assert_eq!(
                rule(&serde_json::from_str(&broken).unwrap()),
                None,
                "{broken}"
            );
        }
    }
}
