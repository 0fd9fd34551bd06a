//! Runs the binary and judges how it ended.

use std::io::Write;
use std::process::{Command, Output, Stdio};

/// The binary under test.
pub const OMERTA: &str = env!("CARGO_BIN_EXE_omerta");

/// How one run ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// The run succeeded and had nothing to complain of.
    #[track_caller]
    pub fn done(self) -> Self {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{self:?}");
        self
    }

    /// The run failed with `code` and one line that holds every one of `words`.
    #[track_caller]
    pub fn failed(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.stderr.starts_with("omerta: "), "{self:?}");
        assert_eq!(self.stderr.matches('\n').count(), 1, "{self:?}");
        assert!(self.stderr.ends_with('\n'), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        for word in words {
            assert!(
                self.stderr.contains(word),
                "{word:?} is missing in {self:?}"
            );
        }
        self
    }
}

/// Runs `omerta` with arguments that are separated by blanks.
pub fn omerta(arguments: &str) -> Ran {
    command(arguments).output().unwrap().into()
}

/// `omerta` with arguments that are separated by blanks, in an environment of its own.
pub fn command(arguments: &str) -> Command {
    let mut command = Command::new(OMERTA);
    prepare(&mut command, arguments);
    command
}

/// Gives `command`, which runs the binary, its arguments and environment.
pub fn prepare(command: &mut Command, arguments: &str) {
    command
        .args(arguments.split_whitespace())
        .env_remove("OMERTA_SOCKET")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null());
}

/// Runs `command` with `input` on its standard input.
pub fn fed(mut command: Command, input: &[u8]) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A run that fails early may not read its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap().into()
}
