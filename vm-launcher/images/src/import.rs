//! How an image comes into the store: all of it, or nothing.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::FlockArg;

use crate::qcow2::{HEAD_BYTES, Header, HeaderError};
use crate::staging::{Staging, sweep};
use crate::store::{failed, sync_directory};
use crate::{
    Blob, Digest, Disk, DiskFormat, ImageName, Manifest, ManifestError, RootDevice, Seed, Signer,
    Store, StoreError, Trust,
};

/// Is told how many bytes more have been read.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// A disk that is to be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its file.
    pub path: PathBuf,
    /// How that is to be read.
    pub format: DiskFormat,
    /// Where on it the root file system is.
    pub root: RootDevice,
}

/// The files that an image is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The disk, if there is one.
    pub disk: Option<Source>,
    /// Whether its guests run the agent.
    pub agent: bool,
    /// Whether its guests' own firewall says on the console what it blocks.
    pub firewall_log: bool,
}

/// Why an image was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A source cannot be read.
    #[error("cannot read {}", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A source is not there.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// A source is not what the manifest says.
    #[error("{} is not the {what} that the manifest names", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
    },
    /// The disk's header is not let in.
    #[error("{} is refused", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// The manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An image that is in the store now.
#[derive(Debug)]
pub struct Imported {
    /// What it is made of.
    pub manifest: Manifest,
    /// The manifest's digest.
    pub digest: Digest,
    /// Who signed it.
    pub signer: Option<Signer>,
    /// It was there before, just so.
    pub was_there: bool,
}

impl Sources {
    /// The sources in `directory`, by the names that builds give them.
    pub fn within(directory: &Path) -> Self {
        let disk = [DiskFormat::Qcow2, DiskFormat::Raw].map(|format| Source {
            path: directory.join(format!("disk.{}", format.word())),
            format,
            root: RootDevice::DISK,
        });
        Self {
            kernel: directory.join("vmlinuz"),
            initrd: directory.join("initrd.img"),
            disk: disk.into_iter().find(|disk| disk.path.exists()),
            // Left there by the recipes, which put it into the image.
            agent: directory.join("omerta-agent").exists(),
            firewall_log: directory.join("firewall-log").exists(),
        }
    }

    /// How many bytes there are to read.
    pub fn bytes(&self) -> u64 {
        let disk = self.disk.as_ref().map(|disk| &disk.path);
        [&self.kernel, &self.initrd]
            .into_iter()
            .chain(disk)
            .map(|path| fs::metadata(path).map_or(0, |found| found.len()))
            .sum()
    }

    /// The manifest of these files as they are.
    ///
    /// # Errors
    /// When one cannot be read, or is refused.
    pub fn measure(
        &self,
        name: ImageName,
        seed: Seed,
        heard: Progress<'_>,
    ) -> Result<Manifest, ImportError> {
        let mut blob = |path: &Path| -> Result<Blob, ImportError> {
            let mut file = open(path)?;
            let (sha256, bytes) = Digest::of_reader(&mut file, &mut *heard).map_err(read(path))?;
            Ok(Blob { sha256, bytes })
        };
        let (kernel, initrd) = (blob(&self.kernel)?, blob(&self.initrd)?);
        let disk = match &self.disk {
            None => None,
            Some(Source { path, format, root }) => {
                let Blob { sha256, bytes } = blob(path)?;
                Some(Disk {
                    sha256,
                    bytes,
                    format: *format,
                    virtual_bytes: virtual_bytes(&open(path)?, *format, bytes, path)?,
                    root: *root,
                })
            }
        };
        let manifest = Manifest {
            omerta_image: Manifest::VERSION,
            name,
            kernel,
            initrd,
            disk,
            seed,
            agent: self.agent,
            firewall_log: self.firewall_log,
        };
        manifest.check()?;
        Ok(manifest)
    }

    fn path(&self, what: &str) -> &Path {
        match (what, &self.disk) {
            ("initrd", _) => &self.initrd,
            ("disk", Some(disk)) => &disk.path,
            _ => &self.kernel,
        }
    }
}

impl Store {
    /// Imports the image of `manifest` and, where there is one, its signature, from `sources`.
    ///
    /// # Errors
    /// When it is not trusted, or the sources are not what it says. The store is then as it was.
    pub fn import(
        &self,
        manifest: &[u8],
        signature: Option<&str>,
        sources: &Sources,
        trust: &Trust,
        heard: Progress<'_>,
    ) -> Result<Imported, ImportError> {
        let parsed = Manifest::parse(manifest)?;
        let signer = trust
            .judge(parsed.name.as_str(), manifest, signature)
            .and_then(|signer| {
                trust.refuse_revoked(parsed.name.as_str(), manifest, Some(&parsed))?;
                Ok(signer)
            })
            .map_err(StoreError::from)?;
        let mut imported = Imported {
            digest: Digest::of(manifest),
            manifest: parsed,
            signer,
            was_there: false,
        };
        self.make()?;
        let staging = {
            let _lock = self.lock(FlockArg::LockExclusive)?;
            sweep(&self.incoming())?;
            if self.has(&imported.manifest.name, manifest, signature)? {
                imported.was_there = true;
                return Ok(imported);
            }
            Staging::begin(&self.incoming())?
        };
        for (what, blob, _) in imported.manifest.parts() {
            let path = sources.path(what);
            let copied = copy(&staging, path, what, blob, &mut *heard)?;
            if let ("disk", Some(disk)) = (what, &imported.manifest.disk) {
                let bytes = virtual_bytes(&copied, disk.format, disk.bytes, path)?;
                if bytes != disk.virtual_bytes {
                    let path = path.to_owned();
                    return Err(ImportError::Altered { path, what });
                }
            }
        }
        let staged = Self::stage_manifest(&staging, manifest, signature)?;

        let _lock = self.lock(FlockArg::LockExclusive)?;
        if self.has(&imported.manifest.name, manifest, signature)? {
            imported.was_there = true;
            return Ok(imported);
        }
        let blobs = self.blobs();
        for (what, blob, _) in imported.manifest.parts() {
            let place = blobs.join(blob.sha256.to_string());
            // Another image may have it; it is the same then.
            fs::rename(staging.path(what), &place).map_err(failed("create", &place))?;
        }
        sync_directory(&blobs)?;
        // From here on it counts.
        let place = self.manifests().join(imported.manifest.name.as_str());
        fs::rename(&staged, &place).map_err(failed("create", &place))?;
        sync_directory(&self.manifests())?;
        Ok(imported)
    }

    /// Whether the very image is there. Another of its name is an error.
    fn has(
        &self,
        name: &ImageName,
        manifest: &[u8],
        signature: Option<&str>,
    ) -> Result<bool, StoreError> {
        if !self.manifests().join(name.as_str()).exists() {
            return Ok(false);
        }
        let (bytes, _lease) = self.lease(name)?;
        // Signing anew gives another signature, of another time.
        let is_signed = signature.is_none() || self.signature(name)?.is_some();
        let is_same = bytes == manifest && is_signed;
        is_same
            .then_some(true)
            .ok_or_else(|| StoreError::Exists(name.clone()))
    }
}

fn copy(
    staging: &Staging,
    path: &Path,
    what: &'static str,
    blob: Blob,
    heard: Progress<'_>,
) -> Result<File, ImportError> {
    let mut told = Told {
        file: open(path)?,
        heard,
    };
    let (copied, digest, length) = staging.write(what, &mut told, blob.bytes)?;
    if (digest, length) != (blob.sha256, blob.bytes) {
        let path = path.to_owned();
        return Err(ImportError::Altered { path, what });
    }
    Ok(copied)
}

struct Told<'a> {
    file: File,
    heard: Progress<'a>,
}

impl Read for Told<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read(buffer)?;
        (self.heard)(length as u64);
        Ok(length)
    }
}

/// The size of the disk in `file`, as the guest sees it.
fn virtual_bytes(
    file: &File,
    format: DiskFormat,
    bytes: u64,
    path: &Path,
) -> Result<u64, ImportError> {
    match format {
        DiskFormat::Raw => Ok(bytes),
        DiskFormat::Qcow2 => {
            let header = read_header(file, bytes).map_err(read(path))?;
            let header = header.map_err(|source| ImportError::Header {
                path: path.to_owned(),
                source,
            })?;
            Ok(header.virtual_bytes)
        }
    }
}

/// Reads the header of a qcow2 file.
fn read_header(file: &File, bytes: u64) -> io::Result<Result<Header, HeaderError>> {
    let mut head = vec![0; HEAD_BYTES.min(usize::try_from(bytes).unwrap_or(HEAD_BYTES))];
    file.read_exact_at(&mut head, 0)?;
    Ok(Header::parse(&head, bytes))
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> ImportError {
    let path = path.to_owned();
    move |source| ImportError::Source { path, source }
}

/// Opens a regular file; anything else might keep us waiting.
fn open(path: &Path) -> Result<File, ImportError> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ImportError::Missing(path.to_owned()));
        }
        Err(error) => return Err(read(path)(error)),
    };
    if !file.metadata().map_err(read(path))?.is_file() {
        return Err(read(path)(io::Error::other("it is no regular file")));
    }
    file.rewind().map_err(read(path))?;
    Ok(file)
}
