//! `omerta version`: this command's version, and that of the omertad that it would speak to.

use std::io;

use omerta_api::{Version, route};
use serde::Serialize;

use crate::args::Format;
use crate::client::{Client, ClientError};
use crate::output::{Cell, Output, Side, Table};

/// What is printed as JSON.
#[derive(Serialize)]
struct Versions {
    omerta: &'static str,
    /// Null where none runs.
    omertad: Option<Version>,
}

/// Prints the versions. That no omertad runs is an answer here, not a failure.
///
/// # Errors
/// Where an omertad is there but does not answer as one, or standard output fails.
pub async fn run(client: &Client, format: Format, out: &mut Output) -> Result<(), VersionError> {
    let omertad: Option<Version> = match client.get(route::VERSION).await {
        Ok(version) => Some(version),
        Err(ClientError::NotRunning(_) | ClientError::Forbidden(_)) => None,
        Err(error) => return Err(error.into()),
    };
    let omerta = env!("CARGO_PKG_VERSION");
    if format == Format::Json {
        return Ok(out.json(&Versions { omerta, omertad })?);
    }
    let mut table = Table::new(&[Side::Left, Side::Left]);
    table.pair("omerta", Cell::new(omerta));
    table.pair(
        "omertad",
        match &omertad {
            Some(version) => Cell::new(format_args!(
                "{}, pid {}, {}: {}",
                version.version, version.pid, version.accel, version.accel_why
            )),
            None => Cell::new("not running, or not for this user"),
        },
    );
    if let Some(version) = &omertad {
        table.pair("machine", Cell::new(&version.machine_why));
    }
    Ok(out.table(&table)?)
}

/// Why the versions cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// Something answers, but not as an omertad.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
}
