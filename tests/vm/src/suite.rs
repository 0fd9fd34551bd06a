//! The kernel tests' executables, one a suite.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::package;

/// Not for other kernels: the first judges frames without any; the others start hundreds of
/// processes to kill them, which takes minutes under emulation.
const LEFT_OUT: [&str; 3] = ["properties", "crash", "policy_model"];
/// Says first whether this kernel can run guards at all.
const FIRST: &str = "support";

/// A test executable of `tests/kernel`.
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
    suites.sort_by_key(|suite| (suite.name != FIRST, suite.name.clone()));
    if suites.first().is_none_or(|suite| suite.name != FIRST) {
        bail!("cargo built no test named {FIRST} in tests/kernel");
    }
    Ok(suites)
}

fn suite(message: &Value) -> Option<Suite> {
    let ours = message["manifest_path"]
        .as_str()?
        .ends_with("tests/kernel/Cargo.toml");
    let name = message["target"]["name"].as_str()?;
    let test = message["target"]["kind"][0] == "test";
    (ours && test && !LEFT_OUT.contains(&name)).then_some(())?;
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
