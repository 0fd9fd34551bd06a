//! Files that say what guest to run: TOML or JSON, with the fields of the API's request.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use omerta_api::RunRequest;
use serde_json::{Map, Value};

/// The longest file, in bytes: more than any guest needs, and less than harms.
const MAX_BYTES: u64 = 64 << 10;

/// Why a file is no spec.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("cannot read {}: give --spec a file of TOML or JSON, or `-`", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is longer than any spec.
    #[error("{} is longer than {} KiB, which no spec is", .path.display(), MAX_BYTES >> 10)]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It is neither TOML nor JSON.
    #[error("{} is not {kind}: {why}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it was taken for.
        kind: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Others may read the key in it.
    #[error("{} has a preshared_key, and others than its owner may read it: chmod 600 it", .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// It does not describe a guest.
    #[error("{}: {why}; see `omerta vm run --help`", .path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The request of `path`, where what `flags` holds stands above what the file says.
///
/// # Errors
/// When the file cannot be read, is neither TOML nor JSON, or does not describe a guest: unknown
/// fields are refused.
pub fn read(path: &Path, flags: Map<String, Value>) -> Result<RunRequest, SpecError> {
    let (text, is_private) = text_of(path)?;
    let request = parse(path, &text, flags)?;
    if request.preshared_key.is_some() && !is_private {
        return Err(SpecError::Exposed {
            path: path.to_owned(),
        });
    }
    Ok(request)
}

/// The same, of a text that `path` holds.
pub fn parse(path: &Path, text: &str, flags: Map<String, Value>) -> Result<RunRequest, SpecError> {
    let mut fields = fields_of(path, text)?;
    fields.extend(flags);
    serde_json::from_value(Value::Object(fields)).map_err(|error| SpecError::Unfit {
        path: path.to_owned(),
        why: error.to_string(),
    })
}

/// And whether nobody but its owner may read it.
fn text_of(path: &Path) -> Result<(String, bool), SpecError> {
    let mut text = String::new();
    let mut is_private = true;
    let bounded = |from: &mut dyn Read| from.take(MAX_BYTES + 1).read_to_string(&mut text);
    let read = if path == Path::new("-") {
        let mut bounded = bounded;
        bounded(&mut io::stdin().lock())
    } else {
        let mut bounded = bounded;
        File::open(path).and_then(|mut file| {
            is_private = file.metadata()?.mode() & 0o077 == 0;
            bounded(&mut file)
        })
    };
    let length = read.map_err(|source| SpecError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    if length as u64 > MAX_BYTES {
        return Err(SpecError::TooLong {
            path: path.to_owned(),
        });
    }
    Ok((text, is_private))
}

/// JSON begins with a brace, which no TOML does.
fn fields_of(path: &Path, text: &str) -> Result<Map<String, Value>, SpecError> {
    let malformed = |kind, why: String| SpecError::Malformed {
        path: path.to_owned(),
        kind,
        why: why.split_whitespace().collect::<Vec<_>>().join(" "),
    };
    if text.trim_start().starts_with('{') {
        serde_json::from_str(text).map_err(|error| malformed("JSON", error.to_string()))
    } else {
        // Its own text quotes the line, which may hold a key.
        toml::from_str(text).map_err(|error| {
            let before = text.get(..error.span().map_or(0, |span| span.start));
            let line = before.unwrap_or_default().matches('\n').count() + 1;
            malformed("TOML", format!("line {line}: {}", error.message()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, flags: &[(&str, Value)]) -> Result<RunRequest, SpecError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let flags = flags
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        read(file.path(), flags)
    }

    const TOML: &str = "name = 'a'\nimage = 'small'\nconsumer = 'k'\nmemory_mib = 128\n\
        [limits.egress]\nbits_per_second = 1000\n[labels]\nplan = 'b'\n";

    #[test]
    fn toml_and_json_say_the_same() {
        let json = r#" {"name":"a","image":"small","consumer":"k","memory_mib":128,
            "limits":{"egress":{"bits_per_second":1000}},"labels":{"plan":"b"}}"#;
        let request = of(TOML, &[]).unwrap();
        assert_eq!(request, of(json, &[]).unwrap());
        assert_eq!(request.memory_mib, Some(128));
        assert_eq!(request.labels["plan"], "b");
    }

    #[test]
    fn a_flag_stands_above_the_file() {
        let request = of(TOML, &[("name", "b".into()), ("memory_mib", 64.into())]).unwrap();
        assert_eq!((request.name.as_str(), request.memory_mib), ("b", Some(64)));
        assert_eq!(request.image, "small");
    }

    #[test]
    fn what_is_unknown_missing_or_malformed_is_named_in_one_line() {
        let long = "#".repeat(70_000);
        for (text, named) in [
            (
                "name = 'a'\nimage = 'i'\nconsumer = 'k'\nmemroy_mib = 1\n",
                "memroy_mib",
            ),
            ("name = 'a'\nimage = 'i'\n", "consumer"),
            (
                "name = 'a'\nimage = 'i'\nconsumer = 'k'\ncpus = 300\n",
                "300",
            ),
            ("name = 'a", "not TOML: line 1"),
            ("{\"name\": ", "not JSON"),
            (long.as_str(), "longer than 64 KiB"),
        ] {
            let error = of(text, &[]).unwrap_err().to_string();
            assert!(error.contains(named) && !error.contains('\n'), "{error}");
        }
    }
}
