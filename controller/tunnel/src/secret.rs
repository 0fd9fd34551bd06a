//! Private and preshared keys.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::{Zeroize, Zeroizing};

use crate::PublicKey;

/// A private or a preshared key. Wiped when it is dropped; has no text but what [`Secret::base64`] makes.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<Zeroizing<[u8; 32]>>);

/// Text that is not a key. It does not say which text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a key: write 32 bytes as 44 characters of base64, as `wg genkey` prints them")]
pub struct SecretError;

impl Secret {
    /// A new private key, by the kernel's random numbers.
    ///
    /// # Errors
    /// Where the kernel gives none.
    pub fn generate() -> io::Result<Self> {
        let mut bytes = Zeroizing::new([0; 32]);
        File::open("/dev/urandom")?.read_exact(bytes.as_mut_slice())?;
        // As every X25519 key is made (RFC 7748).
        bytes[0] &= 0xf8;
        bytes[31] = (bytes[31] & 0x7f) | 0x40;
        Ok(Self(Box::new(bytes)))
    }

    /// The public half of a private key.
    pub fn public_key(&self) -> PublicKey {
        let private = x25519_dalek::StaticSecret::from(*self.expose());
        PublicKey::from(x25519_dalek::PublicKey::from(&private))
    }

    /// The key's bytes, for who hands them to a device.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key in base64, for who writes it to a file that nobody else reads.
    pub fn base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.expose()))
    }
}

impl From<[u8; 32]> for Secret {
    fn from(mut bytes: [u8; 32]) -> Self {
        // On the heap, so that moving it leaves no copies behind.
        let secret = Self(Box::new(Zeroizing::new(bytes)));
        bytes.zeroize();
        secret
    }
}

impl FromStr for Secret {
    type Err = SecretError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The decoder wants room for a last group that is whole.
        let mut bytes = Zeroizing::new([0u8; 33]);
        if text.len() != 44 {
            return Err(SecretError);
        }
        match STANDARD.decode_slice(text, bytes.as_mut_slice()) {
            Ok(32) => {}
            _ => return Err(SecretError),
        }
        let mut key = Zeroizing::new([0u8; 32]);
        key.copy_from_slice(&bytes[..32]);
        Ok(Self(Box::new(key)))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_round_trips(bytes in any::<[u8; 32]>()) {
            let secret = Secret::from(bytes);
            prop_assert_eq!(secret.expose(), &bytes);
            prop_assert_eq!(secret.base64().parse::<Secret>(), Ok(secret));
        }
    }

    #[test]
    fn debug_text_says_nothing_of_the_key() {
        let secret = Secret::from([7; 32]);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }

    #[test]
    fn malformed_keys_are_refused() {
        let key = Secret::from([7; 32]).base64();
        let short = STANDARD.encode([7u8; 31]);
        let long = STANDARD.encode([7u8; 33]);
        let second_spelling = key.replace("c=", "d=");
        assert_ne!(*key, second_spelling);
        for text in ["", &key[..43], &short, &long, &second_spelling] {
            assert_eq!(text.parse::<Secret>(), Err(SecretError), "{text:?}");
        }
    }
}
