//! Manual pages and completion scripts, made from the command line's own definition.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::CommandLine;
use crate::output::Output;

/// Prints the completion script for one shell.
///
/// # Errors
/// Where standard output cannot be written.
pub fn completions(shell: Shell, out: &mut Output) -> Result<(), ManualError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut CommandLine::command(), "omerta", &mut script);
    Ok(out.bytes(&script)?)
}

/// Writes one page for each command to `dir`, which is made if it does not exist.
///
/// # Errors
/// Where the directory cannot be made or written to.
pub fn pages(dir: &Path) -> Result<(), ManualError> {
    let failed = |source| ManualError::Write {
        dir: dir.to_owned(),
        source,
    };
    fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(CommandLine::command(), dir).map_err(failed)
}

/// Why the manual was not written.
#[derive(Debug, thiserror::Error)]
pub enum ManualError {
    /// The directory does not take the pages.
    #[error("cannot write the manual to {}: give a directory you may write to", dir.display())]
    Write {
        /// The directory.
        dir: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}
