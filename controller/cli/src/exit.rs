//! How the process ends: the exit codes that scripts rely on, and the one line that explains them.

use std::error::Error;
use std::fmt::Write as _;
use std::process::ExitCode;

use crate::guest_text::visible;

/// The exit codes of `omerta`. Their numbers are a contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command did what it was asked.
    Done = 0,
    /// The command was well formed but could not be carried out.
    Failed = 1,
    /// The command line, or a file it names, is malformed.
    Usage = 2,
    /// The interface, guest or file that the command names does not exist.
    NotFound = 3,
    /// The state of things, or the provider's policy, forbids it.
    Refused = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// `error` and its causes on one line, without line breaks or control characters, whatever names
/// and messages it quotes.
pub fn explain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a String cannot fail.
        let _ = write!(line, ": {error}");
        cause = error.source();
    }
    one_line(&line)
}

/// `text` with every run of line breaks and the blanks around it made one space, and other
/// control characters made visible.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&visible(part));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open tap0")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_follow_on_the_same_line() {
        let error = Outer(std::io::Error::other("no\nsuch\u{1b}[31m device"));
        assert_eq!(explain(&error), "cannot open tap0: no such^[[31m device");
    }
}
