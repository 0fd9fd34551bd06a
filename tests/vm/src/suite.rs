//! The kernel tests' executables, one a suite.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::package;

/// What another kernel may do otherwise, in the order in which it is run. The first says by which
/// hook the kernel runs guards. Those of `tests/kernel` that are not here need no kernel, or load
/// the programs so often that emulation takes many minutes; of `tap` it is the exchange of programs alone. The last is of `controller/tunnel`: the kernel's WireGuard,
/// which the running kernel may lack.
const SUITES: [&str; 8] = [
    "support",
    "load",
    "corpus",
    "parity",
    "lifecycle",
    "clsact",
    "tap",
    "device",
];
/// What a machine does not run, for the time that emulation takes: `clsact` is run where that is the
/// only hook.
const LEFT_OUT: [(&str, &str); 1] = [("6.12", "clsact")];

/// Tests of a suite that a machine does not run, by a word in their names: the other machine does,
/// and the running kernel runs them all.
const TESTS_LEFT_OUT: [(&str, &str, &str); 2] =
    [("6.1", "corpus", "bridged"), ("6.12", "corpus", "routed")];

/// What `suite` is told on a machine with a kernel of `series`.
pub fn arguments(series: &str, suite: &str) -> String {
    match suite {
        // The userspace program is not there, and is tried where the tests are built.
        "device" => return " kernel::".to_owned(),
        "tap" => return " upgrade::programs_are_exchanged".to_owned(),
        _ => {}
    }
    TESTS_LEFT_OUT
        .iter()
        .filter(|(kernel, name, _)| (*kernel, *name) == (series, suite))
        .map(|(_, _, word)| format!(" --skip {word}"))
        .collect()
}

/// Whether a machine with a kernel of `series` runs `suite`.
pub fn is_run(series: &str, suite: &str) -> bool {
    !LEFT_OUT.contains(&(series, suite))
}

/// A test executable.
#[derive(Clone)]
pub struct Suite {
    /// Its name among the tests.
    pub name: String,
    /// The executable.
    pub path: PathBuf,
}

/// Builds the kernel tests as the test runner does, so that nothing is compiled twice.
pub fn build(workspace: &Path) -> Result<Vec<Suite>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let messages = package::run(
        Command::new(cargo)
            .args(["test", "--workspace", "--locked", "--no-run"])
            .arg("--message-format=json")
            .current_dir(workspace),
    )?;
    let mut suites: Vec<Suite> = String::from_utf8_lossy(&messages)
        .lines()
        .filter_map(|line| suite(&serde_json::from_str(line).ok()?))
        .collect();
    suites.sort_by_key(|suite| SUITES.iter().position(|name| *name == suite.name));
    if suites.len() != SUITES.len() {
        bail!(
            "cargo built no such tests in tests/kernel and controller/tunnel: {}",
            SUITES.join(", ")
        );
    }
    Ok(suites)
}

fn suite(message: &Value) -> Option<Suite> {
    let name = message["target"]["name"].as_str()?;
    let manifest = match name {
        "device" => "controller/tunnel/Cargo.toml",
        _ => "tests/kernel/Cargo.toml",
    };
    let ours = message["manifest_path"].as_str()?.ends_with(manifest);
    let test = message["target"]["kind"][0] == "test";
    (ours && test && SUITES.contains(&name)).then_some(())?;
    Some(Suite {
        name: name.to_owned(),
        path: message["executable"].as_str()?.into(),
    })
}

impl Suite {
    /// Runs it on the running kernel; what it says, in the machines' form.
    pub fn run_here(&self, variable: (&str, &str)) -> Result<String> {
        let began = Instant::now();
        let output = Command::new(&self.path)
            .arg("--show-output")
            .env(variable.0, variable.1)
            .output()
            .with_context(|| format!("cannot run {}", self.path.display()))?;
        Ok(format!(
            "vm: begin {0}\n{1}{2}\nvm: end {0} {3}\n",
            self.name,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            began.elapsed().as_millis()
        ))
    }
}
