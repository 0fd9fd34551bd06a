//! A public key of OpenSSH's, as a line of `authorized_keys` without options.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// The longest line.
const MAX_BYTES: usize = 8 << 10;

const TYPES: [&str; 7] = [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "ssh-rsa",
];

/// A public key: its type, itself, and perhaps a comment, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshPublicKey(String);

/// Text that is no public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it is no SSH public key: give one line as in ~/.ssh/id_ed25519.pub, without options before it"
)]
pub struct SshPublicKeyError;

impl FromStr for SshPublicKey {
    type Err = SshPublicKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let line = text.strip_suffix('\n').unwrap_or(text);
        if line.len() > MAX_BYTES || line.chars().any(char::is_control) {
            return Err(SshPublicKeyError);
        }
        let mut words = line.splitn(3, ' ');
        let (kind, key) = (words.next(), words.next());
        let (Some(kind), Some(key)) = (kind, key) else {
            return Err(SshPublicKeyError);
        };
        let key = STANDARD.decode(key).map_err(|_| SshPublicKeyError)?;
        // The key names its type itself, behind its length.
        let named = key
            .split_first_chunk::<4>()
            .and_then(|(length, rest)| rest.get(..u32::from_be_bytes(*length) as usize));
        if !TYPES.contains(&kind) || named != Some(kind.as_bytes()) || key.len() <= 4 + kind.len() {
            return Err(SshPublicKeyError);
        }
        Ok(Self(line.to_owned()))
    }
}

impl fmt::Display for SshPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f";

    #[test]
    fn a_key_with_or_without_a_comment_is_taken_as_it_is() {
        for line in [KEY.to_owned(), format!("{KEY} me: \"here\" #{{}}'\u{e9}")] {
            assert_eq!(line.parse::<SshPublicKey>().unwrap().to_string(), line);
            let file = format!("{line}\n");
            assert_eq!(file.parse::<SshPublicKey>().unwrap().to_string(), line);
        }
    }

    #[test]
    fn what_is_more_or_less_than_one_key_is_refused() {
        for text in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 AAAA",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5",
            &KEY.replace("ssh-ed25519", "ssh-rsa"),
            &format!("command=\"sh\" {KEY}"),
            &format!("{KEY}\n{KEY}"),
            &format!("{KEY} a\u{1b}[2J"),
            &format!("{KEY} {}", "x".repeat(9000)),
        ] {
            assert_eq!(
                text.parse::<SshPublicKey>(),
                Err(SshPublicKeyError),
                "{text}"
            );
        }
    }
}
