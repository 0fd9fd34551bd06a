//! Arguments of `omerta peer`.

use std::path::PathBuf;

use clap::Subcommand;
use omerta_tunnel::PeerEndpoint;

use super::Shown;
use super::vm::GuestName;

/// The verbs of `omerta peer`.
#[derive(Debug, Subcommand)]
pub enum PeerCommand {
    /// List the consumers of guests: where each one is, and what has passed
    List {
        #[command(flatten)]
        shown: Shown,
    },

    /// Say where a guest's consumer is now
    ///
    /// The guest may reach it there and nowhere else from then on, in one switch. The guest is told; what it still sends to
    /// where the consumer was is dropped and not held against it.
    Set {
        /// The guest
        guest: GuestName,

        /// Where its consumer's WireGuard is now: an IPv4 address, or a name, which is followed from then on
        #[arg(long, value_name = "ADDR:PORT")]
        endpoint: PeerEndpoint,

        #[command(flatten)]
        shown: Shown,
    },

    /// Read a consumer's .conf of wg or wg-quick, and print what `omerta vm run --spec` takes of it
    ///
    /// Needs no omertad. The file is the one that a client of the consumer's WireGuard would use. Keys that are none of
    /// WireGuard's are refused with their line. Commands in it are never run, and no key of it but the consumer's public one
    /// is printed: a preshared key is written with `--write` alone.
    Import {
        /// The file (`-`: standard input)
        file: PathBuf,

        /// Make a file of it that nobody else can read, in place of printing it
        #[arg(long, short, value_name = "FILE")]
        write: Option<PathBuf>,

        #[command(flatten)]
        shown: Shown,
    },
}
