//! The name of a guest.

use std::fmt;
use std::str::FromStr;

/// A guest's name: 1 to 32 of `[a-z0-9-]`, beginning with a letter, so that it is at once a file
/// name, a host name, a metric label and a QEMU argument without any quoting.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestName(String);

/// Text that is not a guest's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a guest name: write 1 to 32 of a-z, 0-9 and -, beginning with a letter and not ending in -"
)]
pub struct GuestNameError(String);

impl GuestName {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 32;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestName {
    type Err = GuestNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let well_formed = text.len() <= Self::MAX_BYTES
            && text.starts_with(|first: char| first.is_ascii_lowercase())
            && !text.ends_with('-')
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if well_formed {
            Ok(Self(text.to_owned()))
        } else {
            // What is shown back is bounded and printable, whatever came in.
            Err(GuestNameError(
                text.chars()
                    .take(64)
                    .flat_map(char::escape_default)
                    .collect(),
            ))
        }
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_names_are_taken() {
        for name in ["a", "web-1", "tenant-42-b", &"x".repeat(32)] {
            assert_eq!(
                name.parse::<GuestName>().map(|n| n.to_string()).as_deref(),
                Ok(name)
            );
        }
        for name in [
            "",
            "1a",
            "-a",
            "a-",
            "A",
            "a_b",
            "a,b",
            "a b",
            "a/b",
            "..",
            "a\n",
            "ä",
            &"x".repeat(33),
        ] {
            assert!(name.parse::<GuestName>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_refusal_is_one_printable_line() {
        let error = "a\n\x1b[31m".parse::<GuestName>().unwrap_err().to_string();
        assert!(error.chars().all(|c| !c.is_control()), "{error:?}");
    }
}
