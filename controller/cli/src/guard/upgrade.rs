//! `omerta guard upgrade`.

use std::io::{self, IsTerminal, Write};

use omerta_dataplane::{Counting, Guard, GuardError, Standing};
use serde::Serialize;

use super::GuardCommandError;
use crate::args::Format;
use crate::args::guard::InterfaceName;
use crate::exit::{explain, one_line};
use crate::output::Output;

/// What became of one guard.
#[derive(Serialize)]
struct Upgraded {
    interface: String,
    /// `upgraded`, `current` (nothing was to be done), `owned` (left to its owner) or `failed`.
    outcome: &'static str,
    /// What became of its counters: `continued`, or `afresh`.
    #[serde(skip_serializing_if = "Option::is_none")]
    counters: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Upgraded {
    fn new(interface: &str, outcome: &'static str) -> Self {
        Self {
            interface: interface.to_owned(),
            outcome,
            counters: None,
            error: None,
        }
    }

    fn line(&self) -> String {
        let Self { interface, .. } = self;
        match (self.outcome, self.counters, &self.error) {
            (_, _, Some(error)) => format!("{interface}: not upgraded: {error}"),
            ("owned", ..) => {
                format!("{interface}: left to omertad, which upgrades it when it starts")
            }
            ("current", ..) => format!("{interface}: current already"),
            (_, Some("afresh"), _) => {
                format!("{interface}: upgraded; its counters, of another version, begin at 0")
            }
            _ => format!("{interface}: upgraded"),
        }
    }
}

/// Upgrades one guard after the other. Where one fails the others are done all the same, and the first
/// failure is how the command ends.
pub fn run(
    interfaces: &[InterfaceName],
    all: bool,
    format: Format,
    out: &mut Output,
) -> Result<(), GuardCommandError> {
    let mut failed: Option<GuardError> = None;
    let names = if all {
        everybodys(&mut failed)?
    } else {
        let named = interfaces
            .iter()
            .map(|name| (name.as_str().to_owned(), false));
        named.collect()
    };
    let count = names.len();
    let mut done = Vec::with_capacity(count);
    for (number, (name, is_owned)) in names.into_iter().enumerate() {
        let upgraded = if is_owned {
            Upgraded::new(&name, "owned")
        } else {
            match one(&name) {
                Ok(upgraded) => upgraded,
                Err(error) => {
                    let told = Upgraded {
                        error: Some(explain(&error)),
                        ..Upgraded::new(&name, "failed")
                    };
                    failed.get_or_insert(error);
                    told
                }
            }
        };
        if format == Format::Text {
            // The one guard that was named and failed is told by the error alone.
            if upgraded.error.is_none() || count > 1 {
                out.line(one_line(&upgraded.line()))?;
            }
        } else if count > 1 && io::stderr().is_terminal() {
            // A remark that cannot be shown is no reason to fail.
            let _ = writeln!(io::stderr(), "{} of {count}: {name}", number + 1);
        }
        done.push(upgraded);
    }
    if format == Format::Json {
        out.json(&done)?;
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

fn one(name: &str) -> Result<Upgraded, GuardError> {
    let guard = Guard::open(name)?;
    if guard.is_current()? {
        return Ok(Upgraded::new(name, "current"));
    }
    let counters = match guard.upgrade()? {
        Counting::Continued => "continued",
        Counting::Afresh => "afresh",
    };
    Ok(Upgraded {
        counters: Some(counters),
        ..Upgraded::new(name, "upgraded")
    })
}

/// The interfaces of all whole guards, with whether each has an owner. The first that is not whole, and
/// no left-over, is told as `failed`.
fn everybodys(failed: &mut Option<GuardError>) -> Result<Vec<(String, bool)>, GuardError> {
    let mut names = Vec::new();
    for guard in Guard::pinned()? {
        if guard.standing.is_whole() {
            names.push((guard.interface, guard.owner.is_some()));
        } else if guard.standing != Standing::Gone {
            failed.get_or_insert(GuardError::Broken {
                interface: guard.interface,
                standing: guard.standing,
            });
        }
    }
    Ok(names)
}
