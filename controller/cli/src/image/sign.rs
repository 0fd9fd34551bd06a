//! Signing manifests with a minisign key, as `minisign -G` or `omerta image keygen` makes it.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use minisign::{KeyPair, SecretKeyBox};

use crate::exit::Exit;

/// The longest key file.
const MAX_BYTES: u64 = 4 << 10;

/// Why nothing is signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// There is no key.
    #[error("{} does not exist: make a key by `omerta image keygen {}`", .0.display(), .0.display())]
    Missing(PathBuf),
    /// It cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others than its owner may read it.
    #[error("{} may be read by others: `chmod 600` it", .0.display())]
    NotSecret(PathBuf),
    /// It is there already.
    #[error("{} exists: give another name, or use it as it is", .0.display())]
    Exists(PathBuf),
    /// It is no secret key, or its password is wrong.
    #[error("{} is no minisign secret key, or its password is another", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: minisign::PError,
    },
    /// It does not sign.
    #[error("cannot sign")]
    Sign(#[source] minisign::PError),
}

impl SignError {
    /// The exit code that fits.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Missing(_) => Exit::NotFound,
            Self::NotSecret(_) | Self::Exists(_) => Exit::Refused,
            Self::Key { .. } => Exit::Usage,
            Self::Io { .. } | Self::Sign(_) => Exit::Failed,
        }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SignError {
    let path = path.to_owned();
    move |source| SignError::Io {
        action,
        path,
        source,
    }
}

/// A key that signs.
pub struct SecretKey(minisign::SecretKey);

impl SecretKey {
    /// Reads the key at `path`, and asks for its password where it has one.
    ///
    /// # Errors
    /// When there is none, others may read it, or it is no key.
    pub fn read(path: &Path) -> Result<Self, SignError> {
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SignError::Missing(path.to_owned()));
            }
            Err(error) => return Err(failed("open", path)(error)),
        };
        let found = file.metadata().map_err(failed("look at", path))?;
        if found.mode() & 0o077 != 0 {
            return Err(SignError::NotSecret(path.to_owned()));
        }
        let mut text = String::new();
        file.take(MAX_BYTES)
            .read_to_string(&mut text)
            .map_err(failed("read", path))?;
        let no_key = |source| SignError::Key {
            path: path.to_owned(),
            source,
        };
        let boxed = || SecretKeyBox::from_string(&text).map_err(no_key);
        let key = match boxed()?.into_unencrypted_secret_key() {
            Ok(key) => key,
            Err(_) => boxed()?.into_secret_key(None).map_err(no_key)?,
        };
        Ok(Self(key))
    }

    /// Its signature of `bytes`, as a `.minisig` file has it.
    ///
    /// # Errors
    /// When it does not sign.
    pub fn sign(&self, bytes: &[u8]) -> Result<String, SignError> {
        minisign::sign(None, &self.0, bytes, None, Some("an image of omerta's"))
            .map(minisign::SignatureBox::into_string)
            .map_err(SignError::Sign)
    }
}

/// Makes a key at `path`, without a password, and its public half beside it.
///
/// # Errors
/// When either is there, or cannot be written.
pub fn generate(path: &Path) -> Result<PathBuf, SignError> {
    let mut public = path.as_os_str().to_owned();
    public.push(".pub");
    let public = PathBuf::from(public);
    if public.exists() {
        return Err(SignError::Exists(public));
    }
    let pair = KeyPair::generate_unencrypted_keypair().map_err(SignError::Sign)?;
    let secret = pair.sk.to_box(None).map_err(SignError::Sign)?.into_string();
    let half = pair.pk.to_box().map_err(SignError::Sign)?.into_string();
    write_new(path, 0o600, &secret)?;
    write_new(&public, 0o644, &half)?;
    Ok(public)
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), SignError> {
    let opened = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path);
    match opened {
        Ok(mut file) => file
            .write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(failed("write", path)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(SignError::Exists(path.to_owned()))
        }
        Err(error) => Err(failed("create", path)(error)),
    }
}
