//! What the machines said, read and shown.

use crate::suite::Suite;

/// One suite on one kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// The kernel's series.
    pub series: String,
    /// The suite's name.
    pub suite: String,
    /// Tests that passed, without those that were skipped.
    pub passed: u32,
    /// Tests that failed; 1 for a suite that did not end.
    pub failed: u32,
    /// Tests that said that they cannot run.
    pub skipped: u32,
    /// How long it took, by the kernel's own clock.
    pub milliseconds: u64,
    /// Anything else to know.
    pub note: String,
}

impl Row {
    fn empty(series: &str, suite: &str) -> Self {
        Self {
            series: series.to_owned(),
            suite: suite.to_owned(),
            passed: 0,
            failed: 0,
            skipped: 0,
            milliseconds: 0,
            note: String::new(),
        }
    }

    /// A kernel that cannot be had.
    pub fn skipped(series: &str, reason: &str) -> Self {
        Self {
            skipped: 1,
            note: reason.to_owned(),
            ..Self::empty(series, "all")
        }
    }
}

/// The rows of one kernel, with the hook that it runs guards by. A suite that did not end has
/// failed.
pub fn read(series: &str, said: &str, suites: &[Suite]) -> Vec<Row> {
    let hook = said.lines().find_map(|line| line.strip_prefix("hook: "));
    let row = |suite: &Suite| {
        let mut row = Row::empty(series, &suite.name);
        match section(said, &suite.name) {
            Some((text, milliseconds)) => {
                row.milliseconds = milliseconds;
                count(text, &mut row);
                row.note = hook.unwrap_or_default().to_owned();
            }
            None => {
                row.failed = 1;
                row.note = "did not end".into();
            }
        }
        row
    };
    suites.iter().map(row).collect()
}

/// What a suite said, and its milliseconds.
fn section<'a>(said: &'a str, suite: &str) -> Option<(&'a str, u64)> {
    let (_, rest) = said.split_once(&format!("vm: begin {suite}\n"))?;
    let (text, rest) = rest.split_once(&format!("vm: end {suite} "))?;
    Some((text, rest.lines().next()?.parse().ok()?))
}

/// Counts from the runner's own summary. A suite without one, or of no test, has failed.
fn count(text: &str, row: &mut Row) {
    let result = text
        .lines()
        .find_map(|line| line.strip_prefix("test result: "));
    let number = |word| {
        let (before, _) = result?.split_once(word)?;
        before.split_whitespace().next_back()?.parse::<u32>().ok()
    };
    let (Some(passed), Some(failed)) = (number(" passed"), number(" failed")) else {
        row.failed = 1;
        return;
    };
    row.skipped = (skips(text).len() as u32).min(passed);
    row.passed = passed - row.skipped;
    row.failed = if passed + failed == 0 { 1 } else { failed };
}

/// The first reason of each test that said that it cannot run.
pub fn skips(text: &str) -> Vec<&str> {
    let (mut reasons, mut counted) = (Vec::new(), false);
    for line in text.lines() {
        if line.starts_with("---- ") {
            counted = false;
        } else if let Some(reason) = line.trim_start().strip_prefix("skipped: ")
            && !std::mem::replace(&mut counted, true)
        {
            reasons.push(reason);
        }
    }
    reasons
}

/// What a person should see of a console: failures, panics of the kernel, and which way the programs
/// read its structures.
pub fn noteworthy(said: &str) -> Vec<&str> {
    const MARKS: [&str; 7] = [
        "the programs read the kernel's structures by",
        "FAILED",
        "panicked at",
        "Kernel panic",
        "BUG:",
        "WARNING:",
        "vm: the machine hung",
    ];
    let marked = |line: &&str| MARKS.iter().any(|mark| line.contains(mark));
    said.lines().filter(marked).collect()
}

/// One line a row, under a heading.
pub fn render(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<8} {:<12} {:>7} {:>7} {:>7} {:>8}\n",
        "kernel", "suite", "passed", "failed", "skipped", "seconds"
    );
    for row in rows {
        let line = format!(
            "{:<8} {:<12} {:>7} {:>7} {:>7} {:>8.1}  {}",
            row.series,
            row.suite,
            row.passed,
            row.failed,
            row.skipped,
            row.milliseconds as f64 / 1000.0,
            row.note
        );
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suites() -> Vec<Suite> {
        ["support", "tap"]
            .map(|name| Suite {
                name: name.into(),
                path: name.into(),
            })
            .into()
    }

    fn numbers(said: &str) -> Vec<(u32, u32, u32, u64)> {
        read("6.12", said, &suites())
            .iter()
            .map(|row| (row.passed, row.failed, row.skipped, row.milliseconds))
            .collect()
    }

    const SUPPORT: &str = "vm: begin support\ntest result: ok. 1 passed; 0 failed; 0 ignored\n\
                           vm: end support 70\n";

    #[test]
    fn each_test_is_counted_once() {
        let said = format!(
            "{SUPPORT}vm: begin tap\n---- a stdout ----\nskipped: x\nskipped: y\n\
             ---- b stdout ----\nskipped: x\ntest result: FAILED. 5 passed; 2 failed; 0 ignored\n\
             vm: end tap 1500\n"
        );
        assert_eq!(numbers(&said), [(1, 0, 0, 70), (3, 2, 2, 1500)]);
    }

    #[test]
    fn a_suite_that_did_not_end_has_failed() {
        assert_eq!(numbers(""), [(0, 1, 0, 0), (0, 1, 0, 0)]);
        let hung = format!("{SUPPORT}vm: begin tap\ntest a ... ok\n");
        assert_eq!(numbers(&hung), [(1, 0, 0, 70), (0, 1, 0, 0)]);
    }

    #[test]
    fn a_suite_without_tests_or_summary_has_failed() {
        let none =
            format!("{SUPPORT}vm: begin tap\ntest result: ok. 0 passed; 0 failed\nvm: end tap 1\n");
        assert_eq!(numbers(&none)[1], (0, 1, 0, 1));
        let killed = format!("{SUPPORT}vm: begin tap\nKilled\nvm: end tap 9\n");
        assert_eq!(numbers(&killed)[1], (0, 1, 0, 9));
    }

    #[test]
    fn the_hook_is_told_in_every_row() {
        let said = SUPPORT.replace("test result", "hook: clsact\ntest result");
        let rows = read("6.1", &said, &suites());
        assert_eq!(rows[0].note, "clsact");
        assert_eq!(rows[1].note, "did not end");
    }
}
