//! Arguments of `omerta capture`.

use std::fmt;
use std::num::NonZero;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use omerta_verdict::Reason;

use super::Shown;

/// Arguments of `capture`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// A guest of omertad's, or a guarded interface
    #[arg(value_name = "GUEST|INTERFACE")]
    pub target: String,

    /// Write pcapng to this file, or to standard output (`-`), instead of a line for each frame
    #[arg(short, long, value_name = "FILE")]
    pub write: Option<PathBuf>,

    /// Only frames of which this became; may be given again
    #[arg(long, value_enum, value_name = "VERDICT")]
    pub verdict: Vec<VerdictWord>,

    /// Only frames that were dropped for this reason; may be given again
    #[arg(long, value_name = "REASON", value_parser = reason)]
    pub reason: Vec<Reason>,

    /// Bytes that are kept of each frame
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 65_553,
        value_parser = clap::value_parser!(u32).range(14..=65_553)
    )]
    pub snaplen: u32,

    /// The most that files of the capture take: FILE holds the newest frames, FILE.1 those before
    #[arg(long, value_name = "SIZE", default_value = "100MB")]
    pub ring: Size,

    /// Frames a second that are kept; those beyond are counted and left out
    #[arg(long, value_name = "N", default_value = "20000")]
    pub rate: NonZero<u32>,

    /// End after this many frames
    #[arg(short, long, value_name = "N")]
    pub count: Option<NonZero<u64>>,

    #[command(flatten)]
    pub shown: Shown,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VerdictWord {
    /// It went on
    Allowed,
    /// The guard answered it
    Answered,
    /// It was dropped
    Dropped,
}

fn reason(text: &str) -> Result<Reason, String> {
    Reason::ALL
        .iter()
        .copied()
        .find(|reason| reason.word() == text)
        .ok_or_else(|| "no such reason: `omerta guard reasons` lists them".to_owned())
}

/// A size in bytes, not less than a file of a few frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl Size {
    const LEAST: u64 = 256 << 10;
}

impl FromStr for Size {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const SAY: &str = "a size is one such as 500kB, 100MB, 64MiB or 2GB, and 256KiB or more";
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "" | "B" => 1,
            "k" | "kB" => 1_000,
            "M" | "MB" => 1_000_000,
            "G" | "GB" => 1_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(SAY),
        };
        let number: u64 = digits.parse().map_err(|_| SAY)?;
        let size = number.checked_mul(unit).ok_or(SAY)?;
        (size >= Self::LEAST).then_some(Self(size)).ok_or(SAY)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_unit_and_a_least() {
        let size = |text: &str| text.parse::<Size>().map(|size| size.0);
        assert_eq!(size("100MB"), Ok(100_000_000));
        assert_eq!(size("1MiB"), Ok(1 << 20));
        assert_eq!(size("300000"), Ok(300_000));
        for bad in [
            "",
            "MB",
            "1",
            "99999999999999999999",
            "1e9",
            "-1MB",
            "1 MB",
            "99999999999GB",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
