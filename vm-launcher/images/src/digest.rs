//! SHA-256 digests, as text and of what is read.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// What is read at once.
const CHUNK: usize = 1 << 20;

/// A SHA-256 digest; as text, 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Text that is no digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a SHA-256 digest is 64 of 0-9 and a-f")]
pub struct DigestError;

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest of all that `reader` gives, and how much that was. `heard` is told of every chunk.
    ///
    /// # Errors
    /// What `reader` said.
    pub fn of_reader(reader: &mut dyn Read, mut heard: impl FnMut(u64)) -> io::Result<(Self, u64)> {
        let mut digesting = Digesting::new(reader);
        let mut chunk = vec![0; CHUNK];
        loop {
            match digesting.read(&mut chunk)? {
                0 => return Ok(digesting.end()),
                length => heard(length as u64),
            }
        }
    }
}

/// A reader that digests what passes through it.
pub struct Digesting<'a> {
    reader: &'a mut dyn Read,
    hash: Sha256,
    length: u64,
}

impl<'a> Digesting<'a> {
    /// Nothing has passed yet.
    pub fn new(reader: &'a mut dyn Read) -> Self {
        Self {
            reader,
            hash: Sha256::new(),
            length: 0,
        }
    }

    /// The digest of what has passed, and its length.
    pub fn end(self) -> (Digest, u64) {
        (Digest(self.hash.finalize().into()), self.length)
    }
}

impl Read for Digesting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.reader.read(buffer)?;
        self.hash.update(&buffer[..length]);
        self.length += length as u64;
        Ok(length)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{self}")
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Ok(digit - b'0'),
            b'a'..=b'f' => Ok(digit - b'a' + 10),
            _ => Err(DigestError),
        };
        let digits: &[u8; 64] = text.as_bytes().try_into().map_err(|_| DigestError)?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = value(pair[0])? << 4 | value(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_of_nothing_is_the_known_one() {
        let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), nothing);
        assert_eq!(nothing.parse(), Ok(Digest::of(b"")));
        let read = Digest::of_reader(&mut &b"abc"[..], |_| ()).unwrap();
        assert_eq!(read, (Digest::of(b"abc"), 3));
    }

    #[test]
    fn what_is_not_64_small_hexadecimal_digits_is_refused() {
        let upper = Digest::of(b"").to_string().to_uppercase();
        for text in ["", "e3b0", upper.as_str(), &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(text.parse::<Digest>(), Err(DigestError), "{text}");
        }
    }
}
