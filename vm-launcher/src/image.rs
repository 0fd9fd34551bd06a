//! A guest image on disk, a kernel and an initramfs, and what of it a guest boots: copies in memory,
//! so that nothing that happens to the files later reaches a guest that was checked. What comes from
//! the store is measured as it is copied.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use omerta_images::{Digest, Digesting, DiskFormat, Lease, Opened, RootDevice, Seed};

use crate::jail::{INITRD, KERNEL};
use crate::memory_file::MemoryFile;

/// A guest image whose files were there and readable when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The kernel (`vmlinuz`).
    pub kernel: PathBuf,
    /// The initramfs (`initrd.img`).
    pub initrd: PathBuf,
    /// What it must be, where that is known.
    pub stored: Option<Stored>,
    /// Whether its guests run the agent.
    pub has_agent: bool,
    /// Whether its guests' own firewall says on the console what it blocks.
    pub firewall_log: bool,
}

/// What the store knows of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The kernel's digest.
    pub kernel: Digest,
    /// The initramfs' digest.
    pub initrd: Digest,
    /// The disk, if it has one.
    pub disk: Option<StoredDisk>,
    /// Keeps the image in the store for as long as its guest's QEMU lives, which inherits it.
    pub lease: Lease,
}

/// A disk of the store's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDisk {
    /// Its file.
    pub path: PathBuf,
    /// The file's digest.
    pub sha256: Digest,
    /// The file's length.
    pub bytes: u64,
    /// How QEMU reads it.
    pub format: DiskFormat,
    /// Its size as the guest sees it.
    pub virtual_bytes: u64,
    /// Where on it the root file system is.
    pub root: RootDevice,
    /// Whether the guest is given a seed for cloud-init.
    pub has_seed: bool,
}

/// Lets go of a lease when it is dropped.
#[derive(Debug)]
pub(crate) struct LeaseEnd(Option<Lease>);

impl Drop for LeaseEnd {
    fn drop(&mut self) {
        if let Some(lease) = &self.0 {
            lease.release();
        }
    }
}

/// The directory of an image's file.
fn directory(file: &Path) -> &Path {
    file.parent().unwrap_or(file)
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file of the image does not exist.
    #[error("guest image: {} does not exist; build the image with `make image IMAGE={}`", path.display(), directory(path).display())]
    Missing {
        /// The missing file.
        path: PathBuf,
    },
    /// A file of the image exists but cannot be used.
    #[error("guest image: {} cannot be read; as a service omertad reads only what root owns or everybody may read: `chown -R root {}`", path.display(), directory(path).display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file of the image is empty or not a regular file.
    #[error("guest image: {} is empty or not a file; rebuild the image with `make image IMAGE={}`", path.display(), directory(path).display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// A file of the image is longer than any kernel or initramfs.
    #[error("guest image: {} is longer than {} MiB; rebuild the image with `make image IMAGE={}`", path.display(), Image::MAX_FILE_BYTES >> 20, directory(path).display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A file of the image was written to while it was read.
    #[error("guest image: {} changed while it was read; run the guest again when the image is whole", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A file is not the one that was signed.
    #[error("guest image: {} is not what its manifest says: remove the image and import it again, by `omerta image`", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
    },
    /// There is no memory for a copy of the image.
    #[error("guest image: {} cannot be copied into memory; free some, then run the guest again", path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl Image {
    /// What stands for the image of a guest that runs already: QEMU has it, and nobody boots it again.
    pub fn of_a_running_guest() -> Self {
        Self {
            kernel: PathBuf::new(),
            initrd: PathBuf::new(),
            stored: None,
            has_agent: false,
            firewall_log: false,
        }
    }

    /// The longest kernel or initramfs, in bytes.
    pub const MAX_FILE_BYTES: u64 = 512 << 20;

    /// Opens the image in `directory`, which holds `vmlinuz` and `initrd.img`.
    ///
    /// # Errors
    /// When one of the files is missing, unreadable, empty or not a regular file.
    pub fn open(directory: &Path) -> Result<Self, ImageError> {
        let image = Self {
            kernel: directory.join("vmlinuz"),
            initrd: directory.join("initrd.img"),
            stored: None,
            // Left there by the recipe, which put it into the image.
            has_agent: directory.join("omerta-agent").exists(),
            firewall_log: directory.join("firewall-log").exists(),
        };
        for path in [&image.kernel, &image.initrd] {
            open(path)?;
        }
        Ok(image)
    }

    /// The image that the store has opened.
    pub fn of_store(opened: &Opened) -> Self {
        let manifest = &opened.manifest;
        Self {
            kernel: opened.path(manifest.kernel),
            initrd: opened.path(manifest.initrd),
            has_agent: manifest.agent,
            firewall_log: manifest.firewall_log,
            stored: Some(Stored {
                kernel: manifest.kernel.sha256,
                initrd: manifest.initrd.sha256,
                disk: manifest.disk.map(|disk| StoredDisk {
                    path: opened.path(disk.blob()),
                    sha256: disk.sha256,
                    bytes: disk.bytes,
                    format: disk.format,
                    virtual_bytes: disk.virtual_bytes,
                    root: disk.root,
                    has_seed: manifest.seed == Seed::Nocloud,
                }),
                lease: opened.lease.clone(),
            }),
        }
    }

    /// Its disk, if it has one.
    pub fn disk(&self) -> Option<&StoredDisk> {
        self.stored.as_ref()?.disk.as_ref()
    }

    /// What, when it is dropped, lets go of the store's lease: a guest's spec is remembered for longer than
    /// there is the guest.
    pub(crate) fn lease_end(&self) -> LeaseEnd {
        LeaseEnd(self.stored.as_ref().map(|stored| stored.lease.clone()))
    }

    /// A copy of the store's lease, for QEMU to inherit: the image is in use for as long as that
    /// lives, whatever becomes of this process.
    pub(crate) fn lease(&self) -> Result<Option<OwnedFd>, ImageError> {
        let copied = self.stored.as_ref().map(|stored| stored.lease.copy());
        copied.transpose().map_err(|source| ImageError::Copy {
            path: self.kernel.clone(),
            source,
        })
    }

    /// Copies both files as they are now: an image may have changed or gone since it was opened.
    /// `write` takes a file's place in the jail and its bytes, and tells how many there were. Waits
    /// for the file system, for as long as that takes.
    pub(crate) fn copy_into(
        &self,
        write: impl Fn(&str, &mut dyn Read) -> io::Result<u64>,
    ) -> Result<(), ImageError> {
        let stored = self.stored.as_ref();
        for (file, place, digest) in [
            (&self.kernel, KERNEL, stored.map(|stored| stored.kernel)),
            (&self.initrd, INITRD, stored.map(|stored| stored.initrd)),
        ] {
            copy(file, digest, |bytes| Ok((write(place, bytes)?, ())))?;
        }
        Ok(())
    }

    pub(crate) fn copy_kernel(&self) -> Result<MemoryFile, ImageError> {
        let digest = self.stored.as_ref().map(|stored| stored.kernel);
        copy(&self.kernel, digest, |bytes| {
            let copy = MemoryFile::copy_of(bytes, c"omerta-kernel")?;
            Ok((copy.length(), copy))
        })
    }
}

fn open(path: &Path) -> Result<(File, Metadata), ImageError> {
    let path = || path.to_owned();
    // To open a fifo would wait for a writer, and the daemon with it.
    let is_file = std::fs::metadata(path()).map(|found| found.is_file());
    if matches!(is_file, Ok(false)) {
        return Err(ImageError::NotAFile { path: path() });
    }
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path())
        .and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    match opened {
        Ok((_, metadata)) if !metadata.is_file() || metadata.len() == 0 => {
            Err(ImageError::NotAFile { path: path() })
        }
        Ok((_, metadata)) if metadata.len() > Image::MAX_FILE_BYTES => {
            Err(ImageError::TooLong { path: path() })
        }
        Ok(opened) => Ok(opened),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(ImageError::Missing { path: path() })
        }
        Err(source) => Err(ImageError::Unreadable {
            path: path(),
            source,
        }),
    }
}

/// Has `write` copy the file, and checks that it was whole all the while, and what it must be.
fn copy<T>(
    path: &Path,
    expected: Option<Digest>,
    write: impl FnOnce(&mut dyn Read) -> io::Result<(u64, T)>,
) -> Result<T, ImageError> {
    let (file, before) = open(path)?;
    // No more than was there: what grows without end is not followed.
    let mut bounded = (&file).take(before.len());
    let mut digesting = Digesting::new(&mut bounded);
    let written = write(&mut digesting);
    let (digest, _) = digesting.end();
    let (length, copied) = written.map_err(|source| ImageError::Copy {
        path: path.to_owned(),
        source,
    })?;
    let is_same = file.metadata().is_ok_and(|after| {
        (after.len(), after.mtime(), after.mtime_nsec())
            == (before.len(), before.mtime(), before.mtime_nsec())
    });
    if !is_same || length != before.len() {
        return Err(ImageError::Changed {
            path: path.to_owned(),
        });
    }
    if expected.is_some_and(|expected| expected != digest) {
        return Err(ImageError::Altered {
            path: path.to_owned(),
        });
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn each_missing_file_is_named_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let error = Image::open(directory.path()).unwrap_err().to_string();
        assert!(
            error.contains("vmlinuz") && error.contains("make image"),
            "{error}"
        );

        std::fs::write(directory.path().join("vmlinuz"), b"kernel").unwrap();
        let error = Image::open(directory.path()).unwrap_err().to_string();
        assert!(
            error.contains("initrd.img") && error.contains("make image"),
            "{error}"
        );

        std::fs::write(directory.path().join("initrd.img"), b"").unwrap();
        let error = Image::open(directory.path()).unwrap_err();
        assert!(matches!(error, ImageError::NotAFile { .. }), "{error}");

        std::fs::write(directory.path().join("initrd.img"), b"initrd").unwrap();
        Image::open(directory.path()).unwrap();
    }

    #[test]
    fn what_was_copied_is_what_is_booted_whatever_becomes_of_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let (kernel, initrd) = (
            directory.path().join("vmlinuz"),
            directory.path().join("initrd.img"),
        );
        std::fs::write(&kernel, b"kernel").unwrap();
        std::fs::write(&initrd, b"initrd").unwrap();
        let image = Image::open(directory.path()).unwrap();
        let (copied, taken) = (image.copy_kernel().unwrap(), RefCell::new(Vec::new()));
        let take = |place: &str, bytes: &mut dyn Read| {
            let mut copy = Vec::new();
            bytes.read_to_end(&mut copy)?;
            let length = copy.len() as u64;
            taken.borrow_mut().push((place.to_owned(), copy));
            Ok(length)
        };
        image.copy_into(take).unwrap();
        std::fs::write(&kernel, b"").unwrap();
        std::fs::write(&initrd, b"another").unwrap();
        assert_eq!(std::fs::read(copied.path()).unwrap(), b"kernel");
        let expected = [(KERNEL, &b"kernel"[..]), (INITRD, b"initrd")];
        let taken_now = taken.borrow().clone();
        assert_eq!(
            taken_now,
            expected.map(|(place, bytes)| (place.to_owned(), bytes.to_vec()))
        );
        let error = image.copy_into(take).unwrap_err();
        assert!(matches!(error, ImageError::NotAFile { .. }), "{error}");
    }

    #[test]
    fn a_file_that_is_not_what_was_signed_is_not_booted() {
        let directory = tempfile::tempdir().unwrap();
        for (kernel, initrd) in [
            ("kernel", "initrd"),
            ("kerneL", "initrd"),
            ("kernel", "initrD"),
        ] {
            std::fs::write(directory.path().join("vmlinuz"), kernel).unwrap();
            std::fs::write(directory.path().join("initrd.img"), initrd).unwrap();
            let mut image = Image::open(directory.path()).unwrap();
            image.stored = Some(Stored {
                kernel: Digest::of(b"kernel"),
                initrd: Digest::of(b"initrd"),
                disk: None,
                lease: Lease::of(File::open(directory.path()).unwrap()),
            });
            let copied = image.copy_into(|_, bytes| io::copy(bytes, &mut io::sink()));
            let is_sound = kernel == "kernel" && initrd == "initrd";
            assert_eq!(copied.is_ok(), is_sound, "{copied:?}");
            assert!(is_sound || matches!(copied, Err(ImageError::Altered { .. })));
            assert_eq!(image.copy_kernel().is_ok(), kernel == "kernel");
        }
    }

    #[test]
    fn a_file_without_end_is_refused_before_it_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = File::create(directory.path().join("vmlinuz")).unwrap();
        kernel.set_len(Image::MAX_FILE_BYTES + 1).unwrap();
        let error = Image::open(directory.path()).unwrap_err();
        assert!(matches!(error, ImageError::TooLong { .. }), "{error}");
    }

    #[test]
    fn a_fifo_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("vmlinuz");
        nix::unistd::mkfifo(&kernel, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = Image::open(directory.path()).unwrap_err();
        assert!(matches!(error, ImageError::NotAFile { .. }), "{error}");
    }
}
