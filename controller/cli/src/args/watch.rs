//! The file of `omerta guard watch`: interfaces, and what `guard attach` takes for each.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::Deserialize;

use super::fence::FenceConfig;
use super::guard::{AttachArgs, AttachError, Attachment};

/// The longest file, in bytes: more than a thousand taps need.
const MAX_BYTES: u64 = 4 << 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    fence: Option<FenceConfig>,
    #[serde(default)]
    tap: Vec<Tap>,
}

/// What a file declares.
#[derive(Debug)]
pub struct Declared {
    /// What is kept from everything until it is guarded.
    pub fence: Option<FenceConfig>,
    /// What is guarded.
    pub taps: Vec<Attachment>,
}

/// One interface, each key as the option of `guard attach`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tap {
    pub name: String,
    pub mac: String,
    pub ip: Vec<String>,
    pub gateway: Vec<String>,
    pub gateway_mac: Option<String>,
    #[serde(default)]
    pub allow: Vec<String>,
    #[serde(default = "filtered")]
    pub mode: String,
    #[serde(default)]
    pub limit: Vec<String>,
    pub lease: Option<String>,
    #[serde(default)]
    pub redirect: bool,
    #[serde(default)]
    pub redirect_peer: Vec<String>,
}

fn filtered() -> String {
    "filtered".to_owned()
}

/// Why a file is not one of interfaces to watch.
#[derive(Debug, thiserror::Error)]
pub enum WatchFileError {
    /// There is none.
    #[error("there is no file {}: give --config the file that declares the interfaces", .0.display())]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("cannot read {}: give --config a readable file", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A pipe, a device or a directory.
    #[error("{} is not a regular file: give --config the file that declares the interfaces", .0.display())]
    NoFile(PathBuf),
    /// It is longer than any.
    #[error("{} is longer than {} MiB, so it is not what declares interfaces", .0.display(), MAX_BYTES >> 20)]
    TooLong(PathBuf),
    /// It is no such TOML.
    #[error("{}: {why}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A value cannot be used.
    #[error("{}: the tap {tap}: {key} = \"{value}\": {why}", .path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The interface.
        tap: String,
        /// The key.
        key: &'static str,
        /// What it says.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// The fence cannot be such a one.
    #[error("{}: fence: {key} = \"{}\": {why}", .path.display(), .value.escape_default())]
    Fence {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What it says.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Its values contradict each other.
    #[error("{}: the tap {tap}", .path.display())]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// The interface.
        tap: String,
        /// How.
        #[source]
        source: AttachError,
    },
    /// Two of one name.
    #[error("{}: the tap {tap} is declared twice: declare it once", .path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The interface.
        tap: String,
    },
    /// None at all.
    #[error("{} declares no tap: write a [[tap]] for each interface that is to be guarded", .0.display())]
    Empty(PathBuf),
}

/// The interfaces that `path` declares, all checked.
///
/// # Errors
/// At the first thing that is wrong: nothing is guarded by half of a file.
pub fn read(path: &Path) -> Result<Declared, WatchFileError> {
    let mut text = String::new();
    // Without waiting for whoever may write to a pipe.
    let opened = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path);
    let read = opened.and_then(|file| {
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        file.take(MAX_BYTES + 1).read_to_string(&mut text).map(Some)
    });
    match read {
        Ok(None) => Err(WatchFileError::NoFile(path.to_owned())),
        Ok(Some(length)) if length as u64 > MAX_BYTES => {
            Err(WatchFileError::TooLong(path.to_owned()))
        }
        Ok(Some(_)) => parse(path, &text),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            Err(WatchFileError::Missing(path.to_owned()))
        }
        Err(source) => Err(WatchFileError::Unreadable {
            path: path.to_owned(),
            source,
        }),
    }
}

fn parse(path: &Path, text: &str) -> Result<Declared, WatchFileError> {
    let document: Document = toml::from_str(text).map_err(|error| WatchFileError::Malformed {
        path: path.to_owned(),
        why: error.to_string(),
    })?;
    let checked = document.fence.as_ref().map_or(Ok(()), FenceConfig::check);
    checked.map_err(|(key, value, why)| WatchFileError::Fence {
        path: path.to_owned(),
        key,
        value,
        why,
    })?;
    let mut taps: Vec<Attachment> = Vec::new();
    for tap in document.tap {
        let name = tap.name.clone();
        let attachment = AttachArgs::of_tap(path, tap)?.check().map_err(|source| {
            WatchFileError::Contradiction {
                path: path.to_owned(),
                tap: name.clone(),
                source,
            }
        })?;
        if taps.iter().any(|tap| tap.interface == attachment.interface) {
            return Err(WatchFileError::Twice {
                path: path.to_owned(),
                tap: name,
            });
        }
        taps.push(attachment);
    }
    if taps.is_empty() {
        return Err(WatchFileError::Empty(path.to_owned()));
    }
    Ok(Declared {
        fence: document.fence,
        taps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAP: &str = "[[tap]]\nname = \"tap0\"\nmac = \"52:54:00:00:00:01\"\nip = [\"10.0.0.5\"]\ngateway = [\"10.0.0.1\"]\n";

    fn complaint(text: &str) -> String {
        let error = parse(Path::new("taps"), text).unwrap_err();
        crate::exit::explain(&error)
    }

    #[test]
    fn what_attach_takes_is_taken() {
        let text = format!(
            "{TAP}gateway_mac = \"52:54:00:00:00:fe\"\nallow = [\"udp:192.0.2.10:51820\"]\nmode = \"conntrack\"\nlimit = [\"egress-bits=100M\"]\nlease = \"12h\"\n"
        );
        let taps = parse(Path::new("taps"), &text).unwrap().taps;
        assert_eq!(taps[0].interface.as_str(), "tap0");
        assert_eq!(taps[0].config.allow.len(), 1);
        assert_eq!(taps[0].config.mode, omerta_verdict::Mode::Conntrack);
        assert!(taps[0].config.lease.is_some());
    }

    #[test]
    fn the_example_is_one() {
        let text = include_str!("../../../../deploy/taps.toml");
        let example = parse(Path::new("taps"), text).unwrap().taps;
        assert_eq!(example[0].interface.as_str(), "tap100i0");
        // What it shows as a comment is as good.
        let text = ["limit", "lease", "redirect", "[fence]", "interfaces"]
            .iter()
            .fold(text.to_owned(), |text, key| {
                text.replace(&format!("# {key}"), key)
            });
        let example = parse(Path::new("taps"), &text).unwrap();
        assert!(example.taps[0].config.lease.is_some());
        assert!(example.taps[0].redirect.is_some());
        assert_eq!(example.fence.unwrap().interfaces, ["tap*"]);
    }

    #[test]
    fn what_is_not_known_or_cannot_be_right_is_refused_whole() {
        for (text, words) in [
            (String::new(), "declares no tap"),
            (format!("{TAP}alow = []\n"), "alow"),
            (format!("{TAP}{TAP}"), "declared twice"),
            (format!("{TAP}mode = \"open\"\n"), "mode = \"open\""),
            (format!("{TAP}allow = [\"udp:x\"]\n"), "allow = \"udp:x\""),
            (TAP.replace("tap0", "a/b"), "name = \"a/b\""),
            (TAP.replace("10.0.0.1", "fe80::1"), "10.0.0.5"),
            (
                format!("{TAP}redirect_peer = [\"veth0\"]\n"),
                "redirect_peer",
            ),
            (format!("[fence]\n{TAP}"), "interfaces"),
            (
                format!("[fence]\ninterfaces = [\"*\"]\n{TAP}"),
                "interfaces = \"*\"",
            ),
            (
                format!("[fence]\ninterfaces = [\"tap*\"]\nname = 1\n{TAP}"),
                "name",
            ),
        ] {
            assert!(complaint(&text).contains(words), "{}", complaint(&text));
        }
    }
}
