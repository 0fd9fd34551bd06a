//! `omerta doctor`: what this host has and lacks of what Omerta needs, and what to do about it.

mod checks;
mod guest_checks;

use std::io;

use serde::Serialize;

use crate::args::Format;
use crate::client::Client;
use crate::output::{Cell, Output, Side, Style, Table};

/// How a requirement stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Standing {
    /// As it should be.
    Ok,
    /// Guards work; something else is missing or weaker than it could be.
    Warning,
    /// Guards do not work here.
    Failed,
}

/// One requirement.
#[derive(Debug, Serialize)]
struct Check {
    /// What is required.
    name: &'static str,
    /// How it stands.
    status: Standing,
    /// What was found.
    found: String,
    /// What to do about it; absent where nothing is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            status: Standing::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn warning(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            status: Standing::Warning,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn failed(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            status: Standing::Failed,
            ..Self::warning(name, found, remedy)
        }
    }
}

/// What is printed as JSON.
#[derive(Serialize)]
struct Report {
    /// Whether guards work here.
    usable: bool,
    checks: Vec<Check>,
}

/// Looks at everything and changes nothing.
///
/// # Errors
/// Where guards do not work here, after all was told; or where standard output fails.
pub async fn run(client: &Client, format: Format, out: &mut Output) -> Result<(), DoctorError> {
    let mut checks = checks::kernel();
    checks.extend(checks::network());
    let omertad = guest_checks::omertad(client).await;
    checks.extend(guest_checks::guests(omertad.is_there).await);
    checks.push(omertad.check);
    let failed = count(&checks, Standing::Failed);
    let warnings = count(&checks, Standing::Warning);
    let report = Report {
        usable: failed == 0,
        checks,
    };
    match format {
        Format::Json => out.json(&report)?,
        Format::Text => {
            print(&report.checks, out)?;
            out.line(format_args!(
                "\n{} ok, {warnings} warnings, {failed} failed",
                report.checks.len() - warnings - failed
            ))?;
        }
    }
    if failed > 0 {
        return Err(DoctorError::Unusable { failed });
    }
    Ok(())
}

fn count(checks: &[Check], status: Standing) -> usize {
    checks.iter().filter(|check| check.status == status).count()
}

fn print(checks: &[Check], out: &mut Output) -> io::Result<()> {
    let mut table = Table::new(&[Side::Left, Side::Left, Side::Left]);
    for check in checks {
        let (style, word) = match check.status {
            Standing::Ok => (Style::Good, "ok"),
            Standing::Warning => (Style::Changing, "warning"),
            Standing::Failed => (Style::Bad, "failed"),
        };
        table.row(vec![
            Cell::styled(style, word),
            Cell::styled(Style::Heading, check.name),
            Cell::new(&check.found),
        ]);
        if let Some(remedy) = &check.remedy {
            table.row(vec![
                Cell::new(""),
                Cell::new(""),
                Cell::new(format_args!("→ {remedy}")),
            ]);
        }
    }
    out.table(&table)
}

/// Why `omerta doctor` does not end well.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    /// A requirement of guards is not met.
    #[error("guards do not work on this host: {failed} of the checks above failed")]
    Unusable {
        /// How many.
        failed: usize,
    },
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}
