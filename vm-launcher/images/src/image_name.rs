//! What an image is called: part of paths, and of what its signature covers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const MAX_BYTES: usize = 64;

/// 1 to 64 of `A`–`Z`, `a`–`z`, `0`–`9`, `.`, `-` and `_`, not beginning with `.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName(String);

/// Text that names no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an image name: write 1 to 64 of A-Z, a-z, 0-9, ., - and _, not beginning with ."
)]
pub struct ImageNameError(String);

impl ImageName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ImageName {
    type Err = ImageNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_plain = (1..=MAX_BYTES).contains(&text.len())
            && !text.starts_with('.')
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        if is_plain {
            return Ok(Self(text.to_owned()));
        }
        let shown = text.chars().take(MAX_BYTES);
        Err(ImageNameError(
            shown.flat_map(char::escape_default).collect(),
        ))
    }
}

impl Serialize for ImageName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ImageName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_leave_its_directory_is_no_name() {
        for name in ["small", "debian-12.1_x", &"a".repeat(64)] {
            assert_eq!(name.parse::<ImageName>().unwrap().as_str(), name);
        }
        for name in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a b",
            "ä",
            "a\0",
            &"a".repeat(65),
        ] {
            let error = name.parse::<ImageName>().unwrap_err().to_string();
            assert!(
                error.contains("not an image name") && !error.contains('\0'),
                "{error}"
            );
        }
    }
}
