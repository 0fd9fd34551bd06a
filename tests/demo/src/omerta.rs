//! The command line of Omerta, as an operator uses it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use omerta_test_support::Namespace;
use serde_json::Value;

use crate::bounded;

const LIMIT: Duration = Duration::from_secs(30);

/// `omerta`, run in the provider's namespace.
pub struct Omerta<'a> {
    pub namespace: &'a Namespace,
    pub binary: PathBuf,
    pub socket: PathBuf,
}

/// What a guard has let pass and dropped of what its guest sent.
#[derive(Clone, Default, PartialEq)]
pub struct Egress {
    pub allowed: u64,
    pub answered: u64,
    pub dropped: Vec<(String, u64)>,
}

impl Egress {
    /// How many frames were answered or dropped.
    pub fn kept_back(&self) -> u64 {
        self.answered + self.dropped.iter().map(|(_, n)| n).sum::<u64>()
    }

    /// Which drop counters have risen since `before`, and by how much.
    pub fn risen_since(&self, before: &Self) -> Vec<(String, u64)> {
        let earlier = |reason: &str| {
            before
                .dropped
                .iter()
                .find(|(name, _)| name == reason)
                .map_or(0, |(_, n)| *n)
        };
        let risen = self
            .dropped
            .iter()
            .map(|(reason, n)| (reason.clone(), n.saturating_sub(earlier(reason))));
        risen.filter(|(_, n)| *n > 0).collect()
    }
}

impl Omerta<'_> {
    /// Runs a command that must succeed, and gives back what it printed.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        bounded::expect(self.command(arguments), "", LIMIT)
    }

    /// Runs a command that must succeed with `-o json`.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let arguments = [arguments, &["-o", "json"]].concat();
        bounded::json(
            &self.run(&arguments)?,
            &format!("omerta {}", arguments.join(" ")),
        )
    }

    /// A guest's events so far, oldest first.
    pub fn events(&self, guest: &str) -> Result<Vec<Value>> {
        let text = self.run(&["events", "-o", "json"])?;
        let mut events = Vec::new();
        for line in text.lines() {
            let event = bounded::json(line, "omerta events -o json")?;
            if event.get("guest").and_then(Value::as_str) == Some(guest) {
                events.push(event);
            }
        }
        Ok(events)
    }

    /// What the guard of an interface has counted.
    pub fn egress(&self, interface: &str) -> Result<Egress> {
        let shown = self.json(&["guard", "show", interface])?;
        let egress = shown
            .get("egress")
            .context("omerta guard show tells nothing of egress")?;
        let dropped = egress.get("dropped").and_then(Value::as_object);
        let dropped = dropped.context("omerta guard show tells nothing of what was dropped")?;
        let count = |value: Option<&Value>, what: &str| {
            value
                .and_then(Value::as_u64)
                .with_context(|| format!("omerta guard show gives no number for {what}"))
        };
        let dropped: Result<Vec<_>> = dropped
            .iter()
            .map(|(reason, n)| Ok((reason.clone(), count(Some(n), reason)?)))
            .collect();
        Ok(Egress {
            allowed: count(egress.get("allowed"), "allowed")?,
            answered: count(egress.get("answered"), "answered")?,
            dropped: dropped?,
        })
    }

    /// How many frames the guard of an interface has kept from its guest.
    pub fn kept_from_guest(&self, interface: &str) -> Result<u64> {
        let shown = self.json(&["guard", "show", interface])?;
        let dropped = shown
            .get("ingress")
            .and_then(|ingress| ingress.get("dropped"))
            .and_then(Value::as_object)
            .context("omerta guard show tells nothing of what was dropped on ingress")?;
        Ok(dropped.values().filter_map(Value::as_u64).sum())
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = self.namespace.command(&self.binary.to_string_lossy());
        command.env("OMERTA_SOCKET", &self.socket).args(arguments);
        command
    }
}

/// A text field of a JSON object.
pub fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    match value.get(field).and_then(Value::as_str) {
        Some(text) => Ok(text),
        None => bail!(
            "no {field} in {}",
            bounded::one_line(&value.to_string(), 200)
        ),
    }
}
