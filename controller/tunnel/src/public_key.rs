//! WireGuard public keys.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// A WireGuard public key: 32 bytes, written as 44 characters of base64.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

/// Text that is not a WireGuard public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a WireGuard public key: write 32 bytes as 44 characters of base64, as `wg pubkey` prints them"
)]
pub struct PublicKeyError;

impl PublicKey {
    /// The key's bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<x25519_dalek::PublicKey> for PublicKey {
    fn from(key: x25519_dalek::PublicKey) -> Self {
        Self(key.to_bytes())
    }
}

impl TryFrom<[u8; 32]> for PublicKey {
    type Error = PublicKeyError;

    fn try_from(bytes: [u8; 32]) -> Result<Self, Self::Error> {
        // All zero is what WireGuard shows for "no key"; no private key has this public key.
        if bytes == [0; 32] {
            Err(PublicKeyError)
        } else {
            Ok(Self(bytes))
        }
    }
}

impl FromStr for PublicKey {
    type Err = PublicKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 44 {
            return Err(PublicKeyError);
        }
        let bytes = STANDARD.decode(text).map_err(|_| PublicKeyError)?;
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| PublicKeyError)?;
        Self::try_from(bytes)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_round_trips(bytes in any::<[u8; 32]>()) {
            prop_assume!(bytes != [0; 32]);
            let key = PublicKey::try_from(bytes).unwrap();
            prop_assert_eq!(key.to_string().parse::<PublicKey>(), Ok(key));
        }
    }

    #[test]
    fn malformed_keys_are_refused() {
        let key = PublicKey([7; 32]).to_string();
        let zero = STANDARD.encode([0u8; 32]);
        let short = STANDARD.encode([7u8; 31]);
        let trailing = format!("{key} ");
        // The last group's spare bits must be zero: one key, one spelling.
        let second_spelling = key.replace("c=", "d=");
        assert_ne!(key, second_spelling);
        for text in ["", &key[..43], &zero, &short, &trailing, &second_spelling] {
            assert_eq!(text.parse::<PublicKey>(), Err(PublicKeyError), "{text:?}");
        }
    }
}
