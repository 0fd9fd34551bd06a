//! Who signed an image: minisign signatures and the keys that a provider trusts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use minisign_verify::{PublicKey, Signature};

use crate::{Digest, Manifest, Revoked};

/// The longest key or signature file.
const MAX_BYTES: u64 = 4 << 10;

/// Keys that the provider trusts.
#[derive(Debug, Default)]
pub struct TrustedKeys {
    keys: Vec<(String, PublicKey)>,
    /// What they sign in vain.
    revoked: Revoked,
}

/// The trusted key that signed, by its file's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer(pub String);

/// Whether what nobody trusted has signed is taken all the same.
#[derive(Debug)]
pub struct Trust {
    /// The keys.
    pub keys: TrustedKeys,
    /// Whether a signature of one of them is needed.
    pub require_signature: bool,
}

/// Why an image is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file of keys cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file in the directory of keys is no key.
    #[error("{} is no minisign public key; move it out of the directory of trusted keys", .0.display())]
    NotAKey(PathBuf),
    /// Anybody could put a key there.
    #[error("{} may be written by others than root: `chown root` and `chmod go-w` it", .0.display())]
    NotPrivate(PathBuf),
    /// A line of the list of what is revoked means nothing.
    #[error("{}: line {line} is not a digest and a reason; mend it, for until then it is not known what is revoked", .0.display(), line = .1)]
    NotRevoked(PathBuf, usize),
    /// It is not run any more.
    #[error("image `{name}` is revoked (its {what}, {digest}): {why}")]
    Revoked {
        /// The image.
        name: String,
        /// What of it.
        what: &'static str,
        /// Which that is.
        digest: Digest,
        /// Why.
        why: String,
    },
    /// There is no signature.
    #[error("image `{0}` is not signed: import it with --sign-with KEY, or with its signature")]
    Unsigned(String),
    /// The signature is no signature.
    #[error("image `{0}`: its signature is malformed")]
    Malformed(String),
    /// No trusted key has signed it.
    #[error(
        "image `{0}`: no trusted key has signed this manifest; put the signer's public key into the directory of trusted keys if you trust it"
    )]
    Untrusted(String),
}

impl TrustedKeys {
    /// The keys in `directory`, one to a file that ends in `.pub`. No directory, no keys.
    ///
    /// # Errors
    /// When one of the files is no key, or others than root could change one.
    pub fn read(directory: &Path) -> Result<Self, TrustError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| TrustError::Read { path, source }
        };
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(directory)(error)),
        };
        require_private(directory)?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed(directory))?.path();
            if path.extension().is_some_and(|extension| extension == "pub") {
                paths.push(path);
            }
        }
        paths.sort();
        let mut keys = Vec::new();
        for path in paths {
            require_private(&path)?;
            let text = read_bounded(&path).map_err(failed(&path))?;
            let key = PublicKey::decode(&text).map_err(|_| TrustError::NotAKey(path.clone()))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            keys.push((name.into_owned(), key));
        }
        let revoked = Revoked::read(directory)?;
        Ok(Self { keys, revoked })
    }

    /// One key, by its text.
    pub fn one(file: &str, text: &str) -> Option<Self> {
        let key = PublicKey::decode(text).ok()?;
        Some(Self {
            keys: vec![(file.to_owned(), key)],
            revoked: Revoked::default(),
        })
    }

    /// Which of the keys has signed `manifest`.
    ///
    /// # Errors
    /// When none has.
    pub fn signer(
        &self,
        name: &str,
        manifest: &[u8],
        signature: &str,
    ) -> Result<Signer, TrustError> {
        let signature =
            Signature::decode(signature).map_err(|_| TrustError::Malformed(name.to_owned()))?;
        self.keys
            .iter()
            .find(|(_, key)| key.verify(manifest, &signature, false).is_ok())
            .map(|(file, _)| Signer(file.clone()))
            .ok_or_else(|| TrustError::Untrusted(name.to_owned()))
    }
}

impl Trust {
    /// Fails where an image, or something that it is made of, is revoked.
    pub(crate) fn refuse_revoked(
        &self,
        name: &str,
        bytes: &[u8],
        manifest: Option<&Manifest>,
    ) -> Result<(), TrustError> {
        let digest = Digest::of(bytes);
        self.keys.revoked.refuse(name, digest, manifest)
    }

    /// Whether an image is to be taken: who signed it, or `None` where that need not be known.
    ///
    /// # Errors
    /// When it is not.
    pub fn judge(
        &self,
        name: &str,
        manifest: &[u8],
        signature: Option<&str>,
    ) -> Result<Option<Signer>, TrustError> {
        // Before all else, and also where no signature is needed.
        self.refuse_revoked(name, manifest, None)?;
        let signed = match signature {
            Some(signature) => self.keys.signer(name, manifest, signature),
            None => Err(TrustError::Unsigned(name.to_owned())),
        };
        match signed {
            Ok(signer) => Ok(Some(signer)),
            Err(error) if self.require_signature => Err(error),
            Err(_) => Ok(None),
        }
    }
}

pub(crate) fn read_bounded(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let file = fs::File::open(path)?;
    if file.take(MAX_BYTES + 1).read_to_string(&mut text)? as u64 > MAX_BYTES {
        return Err(io::Error::other("it is longer than any key or signature"));
    }
    Ok(text)
}

/// Refuses what somebody else than root, or than whoever asks, may write.
pub(crate) fn require_private(path: &Path) -> Result<(), TrustError> {
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(path).map_err(|source| TrustError::Read {
        path: path.to_owned(),
        source,
    })?;
    let own = nix::unistd::geteuid().as_raw();
    if found.mode() & 0o022 != 0 || (found.uid() != 0 && found.uid() != own) {
        return Err(TrustError::NotPrivate(path.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn pair() -> minisign::KeyPair {
        minisign::KeyPair::generate_unencrypted_keypair().unwrap()
    }

    fn sign(pair: &minisign::KeyPair, bytes: &[u8]) -> String {
        minisign::sign(None, &pair.sk, bytes, None, None)
            .unwrap()
            .into_string()
    }

    fn trusting(pairs: &[&minisign::KeyPair]) -> (tempfile::TempDir, TrustedKeys) {
        let directory = tempfile::tempdir().unwrap();
        for (number, pair) in pairs.iter().enumerate() {
            let text = pair.pk.to_box().unwrap().into_string();
            fs::write(directory.path().join(format!("{number}.pub")), text).unwrap();
        }
        let keys = TrustedKeys::read(directory.path()).unwrap();
        (directory, keys)
    }

    #[test]
    fn only_what_a_trusted_key_signed_as_it_stands_is_trusted() {
        let (ours, other) = (pair(), pair());
        let (_directory, keys) = trusting(&[&other, &ours]);
        let signature = sign(&ours, b"manifest");
        assert_eq!(
            keys.signer("x", b"manifest", &signature).unwrap(),
            Signer("1.pub".into())
        );
        assert!(matches!(
            keys.signer("x", b"manifesT", &signature),
            Err(TrustError::Untrusted(_))
        ));
        let stranger = sign(&pair(), b"manifest");
        assert!(matches!(
            keys.signer("x", b"manifest", &stranger),
            Err(TrustError::Untrusted(_))
        ));
        assert!(matches!(
            keys.signer("x", b"manifest", "gibberish"),
            Err(TrustError::Malformed(_))
        ));
        let none = TrustedKeys::read(Path::new("/nonexistent/keys")).unwrap();
        assert!(matches!(
            none.signer("x", b"manifest", &signature),
            Err(TrustError::Untrusted(_))
        ));
    }

    #[test]
    fn without_a_signature_nothing_is_taken_unless_the_provider_says_so() {
        let keys = TrustedKeys::default();
        let mut trust = Trust {
            keys,
            require_signature: true,
        };
        assert!(matches!(
            trust.judge("x", b"m", None),
            Err(TrustError::Unsigned(_))
        ));
        trust.require_signature = false;
        assert_eq!(trust.judge("x", b"m", None).unwrap(), None);
    }

    #[test]
    fn a_directory_or_key_that_others_may_write_is_refused() {
        let (directory, _) = trusting(&[&pair()]);
        let key = directory.path().join("0.pub");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(
            TrustedKeys::read(directory.path()),
            Err(TrustError::NotPrivate(_))
        ));
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            TrustedKeys::read(directory.path()),
            Err(TrustError::NotPrivate(_))
        ));
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(directory.path().join("1.pub"), "not a key").unwrap();
        assert!(matches!(
            TrustedKeys::read(directory.path()),
            Err(TrustError::NotAKey(_))
        ));
    }
}
