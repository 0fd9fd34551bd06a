//! The names that cases use in place of numbers.

use std::collections::BTreeMap;
use std::net::IpAddr;

use omerta_verdict::Mac;
use serde::Deserialize;

use crate::CorpusError;

/// Who plays: `cast.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    mac: BTreeMap<String, String>,
    address: BTreeMap<String, String>,
}

impl Cast {
    /// The committed cast.
    ///
    /// # Errors
    /// Where the file is not what its parser takes.
    pub fn load() -> Result<Self, CorpusError> {
        toml::from_str(include_str!("../cast.toml")).map_err(|source| CorpusError::File {
            file: "cast.toml",
            source: Box::new(source),
        })
    }

    /// A MAC by its name or as it is written.
    pub fn mac(&self, text: &str) -> Result<Mac, String> {
        let text = self.mac.get(text).map_or(text, String::as_str);
        text.parse().map_err(|_| format!("no MAC: {text}"))
    }

    /// An address by its name or as it is written.
    pub fn address(&self, text: &str) -> Result<IpAddr, String> {
        let text = self.address.get(text).map_or(text, String::as_str);
        text.parse().map_err(|_| format!("no address: {text}"))
    }
}
