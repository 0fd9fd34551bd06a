//! The command line as typed, and the checks that make it safe to act on.
//!
//! clap parses single values; what only shows when values are seen together is checked by the
//! `check` functions of [`guard`] and [`vm`], before anything is touched.

pub mod capture;
pub mod fence;
pub mod guard;
pub mod image;
pub mod incident;
pub mod limit;
pub mod peer;
pub mod vm;
pub mod watch;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Where omertad listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/omerta/omertad.sock";

/// Rents out virtual machines that can reach nothing but their consumer.
///
/// `guard` puts a kernel packet filter on one interface and works on its own, as `image` does on the store of
/// images. `vm`, `peer` and `events` speak to omertad, which runs guests behind such guards.
#[derive(Debug, Parser)]
#[command(
    name = "omerta",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad usage, 3 not found, 4 refused by policy."
)]
pub struct CommandLine {
    /// The socket of omertad
    #[arg(
        long,
        global = true,
        env = "OMERTA_SOCKET",
        value_name = "PATH",
        default_value = DEFAULT_SOCKET,
        help_heading = "Global options"
    )]
    pub socket: PathBuf,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Guard one interface: what may pass between a guest and its peers
    #[command(subcommand, arg_required_else_help = true)]
    Guard(guard::GuardCommand),

    /// Run guests, each behind its guard
    #[command(subcommand, arg_required_else_help = true)]
    Vm(vm::VmCommand),

    /// Say where guests' consumers are, and list them
    #[command(subcommand, arg_required_else_help = true)]
    Peer(peer::PeerCommand),

    /// Build, import and look after the images that guests boot
    #[command(subcommand, arg_required_else_help = true)]
    Image(image::ImageCommand),

    /// Show what happened to guests
    Events(EventsArgs),

    /// Show or record what crosses a guarded interface, and what became of each frame
    #[command(
        after_help = "Works without omertad on any guarded interface. Frames of the guest are judged as the guard judges \
them; what the guard drops on its way to the guest is not seen. As in: omerta capture alpha -w - | wireshark -k -i -"
    )]
    Capture(capture::CaptureArgs),

    /// Look into what guests were caught at, and prove that its record is whole
    #[command(subcommand, arg_required_else_help = true)]
    Incident(incident::IncidentCommand),

    /// Look at what this host has and lacks, and what to do about it
    #[command(after_help = "Changes nothing. Exit codes: 0 guards work here, 1 they do not.")]
    Doctor(Shown),

    /// Print the versions of this command and of omertad
    Version(Shown),

    /// Print a shell's completion script
    Completions {
        /// The shell that will read it
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },

    /// Write the manual pages
    Man {
        /// The directory to write them to; it is made if it does not exist
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
    },
}

/// How something is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Text,
    /// For programs
    Json,
}

/// The option of every command that shows something.
#[derive(Clone, Copy, Debug, Args)]
pub struct Shown {
    /// The form of what is printed
    #[arg(
        short = 'o',
        long = "output",
        value_enum,
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub format: Format,
}

/// Arguments of `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Keep printing events as they happen
    #[arg(short, long)]
    pub follow: bool,

    /// Only this guest's events
    #[arg(long, value_name = "NAME")]
    pub guest: Option<vm::GuestName>,

    #[command(flatten)]
    pub shown: Shown,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }
}
