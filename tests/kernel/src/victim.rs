//! Processes that a test starts in order to kill them.

use std::io::{self, BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// Runs the ignored test `work` of the calling test's binary, in the network namespace of this
/// thread and with `list` in its environment, until it has said [`has_begun`].
pub fn begin(work: &str, list: &str) -> io::Result<Child> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--exact", work, "--ignored", "--nocapture"])
        .env(LIST, list)
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(output) = child.stdout.take() {
        let mut output = BufReader::new(output);
        let mut line = String::new();
        while output.read_line(&mut line)? > 0 {
            if line.contains(BEGUN) {
                // Kept open: what it prints later must not fail.
                child.stdout = Some(output.into_inner());
                return Ok(child);
            }
            line.clear();
        }
    }
    child.wait()?;
    Err(io::Error::other(format!("{work} ended before it began")))
}

/// Tells the test that the work begins now.
pub fn has_begun() {
    println!("{BEGUN}");
}

/// What the test gave to [`begin`].
pub fn list() -> String {
    std::env::var(LIST).unwrap_or_default()
}

const BEGUN: &str = "the work has begun";
const LIST: &str = "OMERTA_TEST_LIST";
