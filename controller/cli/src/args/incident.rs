//! Arguments of `omerta incident`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use omerta_incidents::Digest;

use super::Shown;

/// Where omertad records incidents unless told otherwise.
const DEFAULT_RECORD: &str = "/var/lib/omerta/incidents";

/// The verbs of `omerta incident`.
#[derive(Debug, Subcommand)]
pub enum IncidentCommand {
    /// List incidents, oldest first
    List {
        /// Only this guest's
        #[arg(long, value_name = "NAME")]
        guest: Option<String>,

        #[command(flatten)]
        record: Record,

        #[command(flatten)]
        shown: Shown,
    },

    /// Show an incident and what was done about it
    Show {
        /// The incident, as `list` names it
        case: String,

        #[command(flatten)]
        record: Record,

        #[command(flatten)]
        shown: Shown,
    },

    /// Prove that nothing of the record was altered, removed or put in since it was written
    Verify {
        /// A hash that an earlier `verify` printed: it must be in the record at its place
        #[arg(long, value_name = "NUMBER:HASH", value_parser = anchor)]
        anchor: Option<(u64, Digest)>,

        #[command(flatten)]
        record: Record,

        #[command(flatten)]
        shown: Shown,
    },

    /// Write the frames of an incident as pcapng
    Export {
        /// The incident, as `list` names it
        case: String,

        /// The file, or `-` for standard output
        #[arg(short, long, value_name = "FILE")]
        write: PathBuf,

        #[command(flatten)]
        record: Record,
    },
}

/// Which record.
#[derive(Debug, Args)]
pub struct Record {
    /// The directory of the record
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RECORD)]
    pub record: PathBuf,
}

fn anchor(text: &str) -> Result<(u64, Digest), String> {
    let say = "an anchor is NUMBER:HASH, as `omerta incident verify` prints it";
    let (number, hash) = text.split_once(':').ok_or(say)?;
    let number = number.parse().map_err(|_| say)?;
    let hash = hash.parse().map_err(|error| format!("{error}"))?;
    Ok((number, hash))
}
