//! Who alone changes and removes a guard.

use std::fmt;
use std::str::FromStr;

/// The name of a guard's owner: 1 to 31 printable ASCII characters without blanks, such as
/// `omertad`. A guard without an owner is everybody's.
///
/// It keeps honest tools out of each other's way; root can remove any pin.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner(String);

impl Owner {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 31;

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text that cannot be an owner's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "an owner's name has 1 to {} printable ASCII characters and no blanks",
    Owner::MAX_BYTES
)]
pub struct OwnerParseError;

impl FromStr for Owner {
    type Err = OwnerParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=Self::MAX_BYTES).contains(&text.len());
        if fits && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(OwnerParseError)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_printable() {
        for good in ["o", "omertad", &"x".repeat(31)] {
            assert_eq!(good.parse::<Owner>().unwrap().as_str(), good);
        }
        for bad in ["", "two words", "é", "a\n", &"x".repeat(32)] {
            assert_eq!(bad.parse::<Owner>(), Err(OwnerParseError), "{bad:?}");
        }
    }
}
