//! Manual pages and completion scripts, made from the command line's own definition.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

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
    let mut command = CommandLine::command().disable_help_subcommand(true);
    // Gives every command its full name.
    command.build();
    write_pages(&command, dir).map_err(failed)
}

fn write_pages(command: &Command, dir: &Path) -> io::Result<()> {
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    page.extend_from_slice(CLOSING_SECTIONS.as_bytes());
    fs::write(dir.join(man.get_filename()), page)?;
    for command in command.get_subcommands() {
        write_pages(command, dir)?;
    }
    Ok(())
}

/// What holds for every command, in roff.
const CLOSING_SECTIONS: &str = r"
.SH EXIT STATUS
.TP
.B 0
Done.
.TP
.B 1
Failed.
.TP
.B 2
Bad usage.
.TP
.B 3
Not found.
.TP
.B 4
Refused by policy.
.SH ENVIRONMENT
.TP
.B OMERTA_SOCKET
The socket of omertad, unless \fB\-\-socket\fR names another.
.TP
.B NO_COLOR
If set, nothing is coloured.
";

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
