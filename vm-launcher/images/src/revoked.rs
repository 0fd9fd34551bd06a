//! What a provider runs no more, whoever has signed it: a list beside the trusted keys.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::signature::{TrustError, require_private};
use crate::{Digest, Manifest};

/// The list's name in the directory of trusted keys.
const FILE: &str = "revoked";
/// The longest list.
const MAX_BYTES: u64 = 1 << 20;
/// The longest reason, in bytes.
const MAX_WHY: usize = 200;

/// What is revoked, each with why: digests of manifests, which are images, and of what they are made of.
#[derive(Debug, Default)]
pub struct Revoked(BTreeMap<Digest, String>);

/// Why something cannot be revoked.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// The list that is there cannot be read.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The reason cannot be written on one line.
    #[error("a reason is one line of up to {MAX_WHY} bytes without control characters")]
    Why,
    /// The list would be too long.
    #[error("{} is full: take out what no store has any more", .0.display())]
    Full(PathBuf),
    /// The system refused.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Revoked {
    /// The list in `directory`; without one nothing is revoked.
    ///
    /// # Errors
    /// When it cannot be read, or others than root could change it, or a line of it means nothing: what is
    /// revoked is then not known.
    pub fn read(directory: &Path) -> Result<Self, TrustError> {
        let path = directory.join(FILE);
        let text = match text(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(TrustError::Read { path, source }),
        };
        require_private(&path)?;
        Self::parse(&text).map_err(|line| TrustError::NotRevoked(path, line))
    }

    /// The list that a text is.
    ///
    /// # Errors
    /// The number of the line that means nothing.
    pub fn parse(text: &str) -> Result<Self, usize> {
        let mut all = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (digest, why) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let digest = digest.parse().map_err(|_| index + 1)?;
            all.insert(digest, why.trim().to_owned());
        }
        Ok(Self(all))
    }

    /// Whether a digest is on it.
    pub fn has(&self, digest: Digest) -> bool {
        self.0.contains_key(&digest)
    }

    /// Adds a digest to the list in `directory`, which is made where it is not there, and tells whether it
    /// was not on it. Whoever reads it meanwhile finds it as it was or as it is then.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn add(directory: &Path, digest: Digest, why: &str) -> Result<bool, RevokeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RevokeError::Write { path, source }
        };
        if why.len() > MAX_WHY || why.chars().any(char::is_control) {
            return Err(RevokeError::Why);
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed(directory))?;
        let held = File::open(directory).map_err(failed(directory))?;
        let held = Flock::lock(held, FlockArg::LockExclusive)
            .map_err(|(_, errno)| failed(directory)(errno.into()))?;
        require_private(directory)?;
        if Self::read(directory)?.0.contains_key(&digest) {
            return Ok(false);
        }
        let path = directory.join(FILE);
        let mut list = match text(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(failed(&path))?,
        };
        if !list.is_empty() && !list.ends_with('\n') {
            list.push('\n');
        }
        list.push_str(format!("{digest} {why}").trim_end());
        list.push('\n');
        if list.len() as u64 > MAX_BYTES {
            return Err(RevokeError::Full(path));
        }
        let anew = directory.join(format!(".{FILE}.new"));
        let write = || {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .custom_flags(libc::O_NOFOLLOW)
                .mode(0o644)
                .open(&anew)?;
            file.write_all(list.as_bytes())?;
            file.sync_all()?;
            fs::rename(&anew, &path)?;
            held.sync_all()
        };
        write().map_err(failed(&path))?;
        Ok(true)
    }

    /// Fails where an image is revoked: itself, or something that it is made of.
    pub(crate) fn refuse(
        &self,
        name: &str,
        manifest: Digest,
        parts: Option<&Manifest>,
    ) -> Result<(), TrustError> {
        let parts = parts.into_iter().flat_map(Manifest::parts);
        let digests = parts.map(|(what, blob, _)| (what, blob.sha256));
        let mut digests = [("manifest", manifest)].into_iter().chain(digests);
        digests.try_for_each(|(what, digest)| match self.0.get(&digest) {
            None => Ok(()),
            Some(why) => Err(TrustError::Revoked {
                name: name.to_owned(),
                what,
                digest,
                why: if why.is_empty() {
                    "no reason is given".to_owned()
                } else {
                    why.clone()
                },
            }),
        })
    }
}

fn text(path: &Path) -> io::Result<String> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut text = String::new();
    if file.take(MAX_BYTES + 1).read_to_string(&mut text)? as u64 > MAX_BYTES {
        return Err(io::Error::other("it is longer than 1 MiB"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_added_is_refused_with_why_and_the_rest_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let (bad, good) = (Digest::of(b"bad"), Digest::of(b"good"));
        assert!(Revoked::read(&path).unwrap().refuse("x", bad, None).is_ok());
        assert!(Revoked::add(&path, bad, "its kernel is CVE-ridden").unwrap());
        assert!(!Revoked::add(&path, bad, "again").unwrap());
        assert!(Revoked::add(&path, Digest::of(b"other"), "").unwrap());
        let revoked = Revoked::read(&path).unwrap();
        let refused = revoked.refuse("x", bad, None).unwrap_err().to_string();
        assert!(
            refused.contains("its kernel is CVE-ridden") && refused.contains(&bad.to_string()),
            "{refused}"
        );
        assert!(revoked.refuse("x", good, None).is_ok());
        let other = revoked.refuse("x", Digest::of(b"other"), None).unwrap_err();
        assert!(other.to_string().contains("no reason"));
        for why in ["two\nlines", "\x1b[31m", &"x".repeat(201)] {
            assert!(matches!(
                Revoked::add(&path, good, why),
                Err(RevokeError::Why)
            ));
        }
    }

    #[test]
    fn a_list_that_means_nothing_or_that_others_may_write_is_no_list() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        let digest = Digest::of(b"");
        fs::write(&path, format!("# comment\n\n{digest}\n")).unwrap();
        let list = Revoked::read(directory.path()).unwrap();
        assert!(list.refuse("x", digest, None).is_err());
        fs::write(&path, format!("{digest}\nsmall\n")).unwrap();
        let error = Revoked::read(directory.path()).unwrap_err();
        assert!(matches!(error, TrustError::NotRevoked(_, 2)), "{error}");
        assert!(Revoked::add(directory.path(), digest, "").is_err());
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let error = Revoked::read(directory.path()).unwrap_err();
        assert!(matches!(error, TrustError::NotPrivate(_)), "{error}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        Revoked::read(directory.path()).unwrap_err();
    }
}
