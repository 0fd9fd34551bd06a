//! An allowlist as a file: one endpoint a line.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use omerta_verdict::{Endpoint, EndpointParseError};

use crate::exit::Exit;

/// Reads the whole allowlist at `path`, or standard input where that is `-`.
///
/// # Errors
/// Where it cannot be read, or any of its lines is no endpoint.
pub fn read(path: &Path) -> Result<Vec<Endpoint>, AllowlistError> {
    let mut bytes = Vec::new();
    let (name, read) = if path == Path::new("-") {
        let stdin = io::stdin().lock();
        let read = stdin.take(MAX_BYTES + 1).read_to_end(&mut bytes);
        (PathBuf::from("standard input"), read)
    } else {
        let name = path.to_owned();
        let read = match fs::metadata(path).map(|found| found.file_type()) {
            // What a pipe without a writer would be waited for may never come.
            Ok(kind) if kind.is_fifo() || kind.is_socket() => {
                return Err(AllowlistError::Pipe(name));
            }
            Ok(_) => fs::File::open(path)
                .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)),
            Err(error) => Err(error),
        };
        (name, read)
    };
    match read {
        Ok(length) if length as u64 > MAX_BYTES => Err(AllowlistError::TooLong(name)),
        Ok(_) => parse(&name, &bytes),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            Err(AllowlistError::Missing(name))
        }
        Err(source) if source.kind() == io::ErrorKind::IsADirectory => {
            Err(AllowlistError::Directory(name))
        }
        Err(source) => Err(AllowlistError::Read { name, source }),
    }
}

/// Parses an allowlist. A byte order mark, blank lines and what follows `#` are ignored. A last line without
/// a line break is that of a file that was cut off, or of an editor that writes none: it is taken only where
/// nothing that could follow makes another endpoint of it.
pub(crate) fn parse(name: &Path, bytes: &[u8]) -> Result<Vec<Endpoint>, AllowlistError> {
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let mut endpoints = Vec::new();
    let last = bytes.split(|&byte| byte == b'\n').count();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let number = index + 1;
        let line = str::from_utf8(line).map_err(|_| AllowlistError::NotText {
            name: name.to_owned(),
            number,
        })?;
        let text = line.split('#').next().unwrap_or_default().trim();
        if text.is_empty() {
            continue;
        }
        let endpoint = text.parse().map_err(|cause| AllowlistError::Endpoint {
            name: name.to_owned(),
            number,
            text: text.chars().take(SHOWN).collect(),
            cause,
        })?;
        endpoints.push(endpoint);
        // Neither a comment nor a blank has ended it, and no line follows.
        if line.ends_with(text) && last == number && may_go_on(text) {
            return Err(AllowlistError::CutOff {
                name: name.to_owned(),
                number,
                text: text.to_owned(),
            });
        }
    }
    Ok(endpoints)
}

/// Whether a digit more makes another endpoint of `text`.
fn may_go_on(text: &str) -> bool {
    let longer = |digit| format!("{text}{digit}").parse::<Endpoint>();
    (0..10).any(|digit| longer(digit).is_ok())
}

/// The longest allowlist that is read, in bytes: more than a full one of the longest endpoints.
const MAX_BYTES: u64 = 64 << 20;
/// How much of a bad line an error quotes, in characters. No endpoint is longer.
const SHOWN: usize = 60;

/// Why a file is no allowlist.
#[derive(Debug, thiserror::Error)]
pub enum AllowlistError {
    /// There is no such file.
    #[error("there is no file {}: give the allowlist's path, or - for standard input", .0.display())]
    Missing(PathBuf),
    /// The file cannot be read.
    #[error("cannot read the allowlist {}: give a readable file, or - for standard input", name.display())]
    Read {
        /// The file.
        name: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A directory.
    #[error("{} is a directory: give a file with one endpoint a line, or - for standard input", .0.display())]
    Directory(PathBuf),
    /// A pipe.
    #[error("{} is a pipe and no file: give a file with one endpoint a line, or - for standard input", .0.display())]
    Pipe(PathBuf),
    /// The last line may be half of one.
    #[error("{}, line {number}: '{text}' has no line break after it, so the file may be cut off; nothing was changed: end it with one where it is whole", name.display())]
    CutOff {
        /// The file.
        name: PathBuf,
        /// The line, counted from 1.
        number: usize,
        /// The line's text.
        text: String,
    },
    /// More than any allowlist has.
    #[error("{} is longer than {} MiB, so it is no allowlist: give a file with one endpoint a line", .0.display(), MAX_BYTES >> 20)]
    TooLong(PathBuf),
    /// A line is not UTF-8.
    #[error("{}, line {number}: not text: save the file as UTF-8; nothing was changed", name.display())]
    NotText {
        /// The file.
        name: PathBuf,
        /// The line, counted from 1.
        number: usize,
    },
    /// A line is no endpoint.
    #[error("{}, line {number}: '{text}': {cause}; nothing was changed", name.display())]
    Endpoint {
        /// The file.
        name: PathBuf,
        /// The line, counted from 1.
        number: usize,
        /// The line's text, or its beginning.
        text: String,
        /// What is wrong with it.
        cause: EndpointParseError,
    },
}

impl AllowlistError {
    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Missing(_) => Exit::NotFound,
            Self::Read { .. } => Exit::Failed,
            Self::Directory(_)
            | Self::Pipe(_)
            | Self::CutOff { .. }
            | Self::TooLong(_)
            | Self::NotText { .. }
            | Self::Endpoint { .. } => Exit::Usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<String>, String> {
        parse(Path::new("list"), text.as_bytes())
            .map(|endpoints| endpoints.iter().map(ToString::to_string).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn comments_blank_lines_and_crlf_are_no_endpoints() {
        let text = "# consumers\r\n\r\nudp:192.0.2.1:51820\r\n  tcp:[2001:db8::1]:443 # web\n\n#\nicmp:192.0.2.1\n";
        assert_eq!(
            parsed(text).unwrap(),
            [
                "udp:192.0.2.1:51820",
                "tcp:[2001:db8::1]:443",
                "icmp:192.0.2.1"
            ]
        );
        assert_eq!(parsed("").unwrap(), [""; 0]);
        assert_eq!(
            parsed("\u{feff}udp:192.0.2.1:51820\r\n").unwrap(),
            ["udp:192.0.2.1:51820"]
        );
    }

    #[test]
    fn bad_line_is_named_by_its_number() {
        assert_eq!(
            parsed("udp:192.0.2.1:1\n# fine\nudp:192.0.2.1:70000\n").unwrap_err(),
            "list, line 3: 'udp:192.0.2.1:70000': the port must be a number from 1 to 65535; nothing was changed"
        );
        assert!(
            parse(Path::new("list"), b"\n\xff\n")
                .unwrap_err()
                .to_string()
                .starts_with("list, line 2: not text")
        );
    }

    #[test]
    fn a_last_line_that_may_be_cut_off_is_refused() {
        for cut in ["udp:192.0.2.1:518", "icmp:192.0.2.1", "tcp:[2001:db8::1]:4"] {
            let complaint = parsed(&format!("udp:192.0.2.9:9\n{cut}")).unwrap_err();
            assert!(
                complaint.contains("line 2") && complaint.contains("cut off"),
                "{complaint}"
            );
            for whole in ["\n", "\r\n", " # consumer", " "] {
                assert_eq!(parsed(&format!("{cut}{whole}")).unwrap(), [cut]);
            }
        }
        // Nothing that could follow makes another of these.
        for whole in [
            "udp:192.0.2.1:51820",
            "icmp:[2001:db8::1]",
            "icmp:192.0.2.100",
        ] {
            assert_eq!(parsed(whole).unwrap(), [whole]);
        }
    }

    #[test]
    fn bad_line_is_quoted_within_bounds() {
        assert!(parsed(&"x".repeat(1 << 20)).unwrap_err().len() < 200);
    }
}
