//! The store's directory, and everything that is done with what is in it.
//!
//! ```text
//! blobs/sha256/DIGEST             what images are made of, never written to again
//! manifests/NAME/manifest.json    one image; locked (shared) by whoever uses it
//! manifests/NAME/manifest.json.minisig
//! incoming/                       what is not there yet, or not any more
//! ```
//!
//! The store's own directory is locked for the moments in which something is put in place or taken
//! away, never while bytes are copied or measured.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::signature::{read_bounded, require_private};
use crate::staging::{Staging, sweep};
use crate::{Blob, Digest, ImageName, Manifest, ManifestError, Signer, Trust, TrustError};

const MANIFEST: &str = "manifest.json";
const SIGNATURE: &str = "manifest.json.minisig";

/// Why something cannot be done with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such image.
    #[error("no image `{name}` in {}: see `omerta image list`", root.display())]
    NotFound {
        /// The name that was asked for.
        name: ImageName,
        /// The store.
        root: PathBuf,
    },
    /// Another image has the name.
    #[error("there is another image `{0}`: remove it first, by `omerta image remove {0}`")]
    Exists(ImageName),
    /// A guest runs it.
    #[error("image `{0}` is used by a running guest: end that guest first")]
    InUse(ImageName),
    /// A manifest lies under another name than its own.
    #[error("image `{signed}` lies in the store as `{found}`: remove that and import it again")]
    Misplaced {
        /// Where it lies.
        found: ImageName,
        /// What it is.
        signed: ImageName,
    },
    /// A blob is not what its image's manifest says.
    #[error(
        "image `{name}`: its {what} is not what its manifest says ({why}): remove the image and import it again"
    )]
    Altered {
        /// The image.
        name: ImageName,
        /// Which of its files.
        what: &'static str,
        /// How it differs.
        why: &'static str,
    },
    /// The manifest cannot be used.
    #[error("image `{0}`")]
    Manifest(ImageName, #[source] ManifestError),
    /// It is not trusted.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The system refused.
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
}

pub(crate) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}

pub(crate) fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("sync", path))
}

/// Holds an image in the store until it, with its clones, is dropped or released. Also a process that
/// has inherited a copy of the descriptor holds it.
#[derive(Clone, Debug)]
pub struct Lease(Arc<Mutex<Option<File>>>);

impl Lease {
    /// A hold by an open file, as far as that is locked.
    pub fn of(file: File) -> Self {
        Self(Arc::new(Mutex::new(Some(file))))
    }
}

impl Lease {
    /// Another descriptor of the same hold, for another process to inherit.
    ///
    /// # Errors
    /// When it was released, or the system has no descriptor more.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(file) => Ok(file.try_clone()?.into()),
            None => Err(io::Error::other("the image is not held any more")),
        }
    }

    /// Lets go of this hold, whoever else knows of it. Copies stay.
    pub fn release(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Lease {}

/// An image that may be used, for as long as `lease` lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// What it is made of.
    pub manifest: Manifest,
    /// The manifest's digest: which image exactly.
    pub digest: Digest,
    /// Whose signature was found, where one was needed or there.
    pub signer: Option<Signer>,
    /// Keeps it from being removed.
    pub lease: Lease,
    /// Where its blobs are.
    pub blobs: PathBuf,
}

impl Opened {
    /// The file of one of its blobs.
    pub fn path(&self, blob: Blob) -> PathBuf {
        self.blobs.join(blob.sha256.to_string())
    }
}

/// An image as the list shows it.
#[derive(Debug)]
pub struct Listed {
    /// The name of its directory.
    pub name: String,
    /// What it is, or why that cannot be said.
    pub found: Result<Opened, StoreError>,
}

/// An image whose every byte has been measured.
#[derive(Debug)]
pub struct Verified {
    /// The image.
    pub image: Opened,
    /// How much that was.
    pub bytes: u64,
}

/// An image that is no more.
#[derive(Debug)]
pub struct Removed {
    /// Its name.
    pub name: ImageName,
}

/// What was nobody's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// How many blobs.
    pub blobs: usize,
    /// How long they were together.
    pub bytes: u64,
    /// How many imports that had died half-way.
    pub imports: usize,
}

/// The store.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store at `root`, whether there is one or not.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn manifests(&self) -> PathBuf {
        self.root.join("manifests")
    }

    pub(crate) fn incoming(&self) -> PathBuf {
        self.root.join("incoming")
    }

    /// Makes its directories where they are not there.
    pub(crate) fn make(&self) -> Result<(), StoreError> {
        for path in [self.blobs(), self.manifests(), self.incoming()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&path)
                .map_err(failed("create", &path))?;
        }
        Ok(())
    }

    /// Keeps others from putting anything in place or taking it away, for a moment.
    pub(crate) fn lock(&self, how: FlockArg) -> Result<Flock<File>, StoreError> {
        let root = File::open(&self.root).map_err(failed("open", &self.root))?;
        require_private(&self.root)?;
        Flock::lock(root, how).map_err(|(_, errno)| failed("lock", &self.root)(errno.into()))
    }

    /// Opens an image to run it, if it may be. Its blobs are not measured: whoever reads them does.
    ///
    /// # Errors
    /// When it is not there, not trusted, or not whole.
    pub fn open(&self, name: &ImageName, trust: &Trust) -> Result<Opened, StoreError> {
        if !self.manifests().is_dir() {
            return Err(self.not_found(name));
        }
        let _lock = self.lock(FlockArg::LockShared)?;
        let (bytes, lease) = self.lease(name)?;
        let signature = self.signature(name)?;
        let signer = trust.judge(name.as_str(), &bytes, signature.as_deref())?;
        let manifest =
            Manifest::parse(&bytes).map_err(|error| StoreError::Manifest(name.clone(), error))?;
        if manifest.name != *name {
            let (found, signed) = (name.clone(), manifest.name);
            return Err(StoreError::Misplaced { found, signed });
        }
        trust.refuse_revoked(name.as_str(), &bytes, Some(&manifest))?;
        let image = Opened {
            digest: Digest::of(&bytes),
            manifest,
            signer,
            lease,
            blobs: self.blobs(),
        };
        for (what, blob, _) in image.manifest.parts() {
            let found = fs::symlink_metadata(image.path(blob));
            let why = match found {
                Ok(found) if found.is_file() && found.len() == blob.bytes => continue,
                Ok(_) => "its length differs",
                Err(_) => "it is missing",
            };
            let name = name.clone();
            return Err(StoreError::Altered { name, what, why });
        }
        Ok(image)
    }

    /// Which image exactly has a name, whether or not it is trusted, or whole.
    ///
    /// # Errors
    /// When there is none.
    pub fn digest(&self, name: &ImageName) -> Result<Digest, StoreError> {
        Ok(Digest::of(&self.lease(name)?.0))
    }

    /// Every image, by name.
    ///
    /// # Errors
    /// When the store cannot be read. That an image cannot be is told in its place.
    pub fn list(&self, trust: &Trust) -> Result<Vec<Listed>, StoreError> {
        let names = self.names()?;
        let listed = names.into_iter().map(|name| {
            let found = self.open(&name, trust);
            let name = name.to_string();
            Listed { name, found }
        });
        Ok(listed.collect())
    }

    /// Measures every byte of an image. `heard` is told how much.
    ///
    /// # Errors
    /// When it is not what its manifest says, or not trusted.
    pub fn verify(
        &self,
        name: &ImageName,
        trust: &Trust,
        heard: &mut dyn FnMut(u64),
    ) -> Result<Verified, StoreError> {
        let image = self.open(name, trust)?;
        let mut bytes = 0;
        for (what, blob, _) in image.manifest.parts() {
            let path = image.path(blob);
            let mut file = File::open(&path).map_err(failed("open", &path))?;
            let (digest, length) =
                Digest::of_reader(&mut file, &mut *heard).map_err(failed("read", &path))?;
            if (digest, length) != (blob.sha256, blob.bytes) {
                let (name, why) = (name.clone(), "its digest differs");
                return Err(StoreError::Altered { name, what, why });
            }
            bytes += length;
        }
        Ok(Verified { image, bytes })
    }

    /// Removes an image. Its blobs stay until [`Store::collect`].
    ///
    /// # Errors
    /// When there is none, or a guest runs it.
    pub fn remove(&self, name: &ImageName) -> Result<Removed, StoreError> {
        let place = self.manifests().join(name.as_str());
        if !place.is_dir() {
            return Err(self.not_found(name));
        }
        let _lock = self.lock(FlockArg::LockExclusive)?;
        let staging = Staging::begin(&self.incoming())?;
        let path = place.join(MANIFEST);
        match File::open(&path) {
            Ok(manifest) => match Flock::lock(manifest, FlockArg::LockExclusiveNonblock) {
                Ok(_) => {}
                Err((_, Errno::EWOULDBLOCK)) => return Err(StoreError::InUse(name.clone())),
                Err((_, errno)) => return Err(failed("lock", &path)(errno.into())),
            },
            // What has no manifest nobody can use.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("open", &path)(error)),
        }
        fs::rename(&place, staging.path("removed")).map_err(failed("remove", &place))?;
        sync_directory(&self.manifests())?;
        Ok(Removed { name: name.clone() })
    }

    /// Removes blobs that are no image's, and what dead imports have left.
    ///
    /// # Errors
    /// When a manifest cannot be read: what it needs is then not known.
    pub fn collect(&self) -> Result<Collected, StoreError> {
        if !self.manifests().is_dir() {
            return Ok(Collected::default());
        }
        let _lock = self.lock(FlockArg::LockExclusive)?;
        let mut collected = Collected {
            imports: sweep(&self.incoming())?,
            ..Collected::default()
        };
        let mut needed = BTreeSet::new();
        for name in self.names()? {
            let (bytes, _lease) = self.lease(&name)?;
            let manifest = Manifest::parse(&bytes)
                .map_err(|error| StoreError::Manifest(name.clone(), error))?;
            needed.extend(manifest.parts().map(|(_, blob, _)| blob.sha256.to_string()));
        }
        let blobs = self.blobs();
        for entry in fs::read_dir(&blobs).map_err(failed("read", &blobs))? {
            let entry = entry.map_err(failed("read", &blobs))?;
            if needed.contains(&*entry.file_name().to_string_lossy()) {
                continue;
            }
            let path = entry.path();
            let found = entry.metadata().map_err(failed("look at", &path))?;
            fs::remove_file(&path).map_err(failed("remove", &path))?;
            collected.blobs += 1;
            collected.bytes += found.len();
        }
        sync_directory(&blobs)?;
        Ok(collected)
    }

    /// The bytes of an image's manifest, and a hold on it.
    pub(crate) fn lease(&self, name: &ImageName) -> Result<(Vec<u8>, Lease), StoreError> {
        let path = self.manifests().join(name.as_str()).join(MANIFEST);
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.not_found(name));
            }
            Err(error) => return Err(failed("open", &path)(error)),
        };
        lock_shared(&file).map_err(failed("lock", &path))?;
        let mut bytes = Vec::new();
        (&file)
            .take(Manifest::MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(failed("read", &path))?;
        Ok((bytes, Lease::of(file)))
    }

    fn not_found(&self, name: &ImageName) -> StoreError {
        StoreError::NotFound {
            name: name.clone(),
            root: self.root.clone(),
        }
    }

    pub(crate) fn signature(&self, name: &ImageName) -> Result<Option<String>, StoreError> {
        let path = self.manifests().join(name.as_str()).join(SIGNATURE);
        match read_bounded(&path) {
            Ok(signature) => Ok(Some(signature)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    fn names(&self) -> Result<BTreeSet<ImageName>, StoreError> {
        let manifests = self.manifests();
        let entries = match fs::read_dir(&manifests) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(error) => return Err(failed("read", &manifests)(error)),
        };
        let mut names = BTreeSet::new();
        for entry in entries {
            let entry = entry.map_err(failed("read", &manifests))?;
            // What has no image's name is none of ours.
            if let Ok(name) = entry.file_name().to_string_lossy().parse() {
                names.insert(name);
            }
        }
        Ok(names)
    }

    /// Puts a manifest and its signature into a directory that becomes an image by one rename.
    pub(crate) fn stage_manifest(
        staging: &Staging,
        manifest: &[u8],
        signature: Option<&str>,
    ) -> Result<PathBuf, StoreError> {
        let place = staging.path("manifest");
        fs::create_dir(&place).map_err(failed("create", &place))?;
        let most = Manifest::MAX_BYTES;
        staging.write(&format!("manifest/{MANIFEST}"), &mut &*manifest, most)?;
        if let Some(signature) = signature {
            let mut signature = signature.as_bytes();
            staging.write(&format!("manifest/{SIGNATURE}"), &mut signature, most)?;
        }
        sync_directory(&place)?;
        Ok(place)
    }
}

/// A hold that a descriptor's copies share, and that ends with the last of them.
fn lock_shared(file: &File) -> io::Result<()> {
    // std's, since nix' lock unlocks when it is dropped, also for the copies.
    match file.try_lock_shared() {
        Ok(()) => Ok(()),
        Err(fs::TryLockError::WouldBlock) => Err(io::Error::other("it is being removed")),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}
