//! A guest's disks: the image's, which it reads; a layer of its own above that, which it writes; and the
//! seed for cloud-init.
//!
//! The layer has no name: it is in a directory's file system, reserved in full, and gone with the last
//! process that has it open, so nobody who is killed leaves one. QEMU has all of them by descriptor.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use omerta_images::qcow2::{HEAD_BYTES, Header, HeaderError, Layer};
use omerta_images::{Digest, DiskFormat};

use crate::command::DiskDescriptors;
use crate::memory_file::MemoryFile;
use crate::process::QemuProcess;
use crate::{Spec, SpecError, seed};

/// Where a guest's own layer is made, and how large its disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// A directory on a file system with room.
    pub directory: PathBuf,
    /// The disk's size as the guest sees it.
    pub layer: Layer,
}

/// What became of what a guest had written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scrubbed {
    /// How much of the file system the guest's own layer took.
    pub bytes: u64,
}

/// Why a guest has no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image's disk cannot be read.
    #[error("guest image: {} cannot be read", path.display())]
    Base {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The image's disk is not the one that was signed.
    #[error("guest image: {} is not what its manifest says: remove the image and import it again, by `omerta image`", .0.display())]
    Altered(PathBuf),
    /// The image's disk has a header that is not let in.
    #[error("guest image: {} is refused", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// There is no room for what the guest may write.
    #[error("no room for a disk of {} MiB in {}: free some, or give the guest a smaller one", bytes >> 20, directory.display())]
    NoRoom {
        /// The directory.
        directory: PathBuf,
        /// The most that the guest may write, with what qcow2 adds.
        bytes: u64,
    },
    /// The guest's own layer cannot be made.
    #[error("cannot make a disk in {}; it takes a file system with O_TMPFILE and fallocate (ext4, XFS, btrfs, tmpfs)", directory.display())]
    Layer {
        /// The directory.
        directory: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// They cannot be handed on.
    #[error("cannot hand the disks on to QEMU")]
    Handles(#[source] io::Error),
    /// The seed cannot be made.
    #[error("cannot make the seed for cloud-init")]
    Seed(#[source] io::Error),
}

/// A guest's disks, open.
#[derive(Debug)]
pub(crate) struct Disks {
    /// None of a guest that was taken over: its QEMU has it.
    base: Option<File>,
    layer: File,
    layer_bytes: u64,
    seed: Option<File>,
}

/// Copies of their descriptors, for QEMU to inherit.
#[derive(Debug)]
pub(crate) struct Handles {
    pub(crate) base: OwnedFd,
    pub(crate) layer: OwnedFd,
    pub(crate) seed: Option<OwnedFd>,
}

impl Handles {
    pub(crate) fn numbers(&self) -> DiskDescriptors {
        DiskDescriptors {
            base: self.base.as_raw_fd(),
            layer: self.layer.as_raw_fd(),
            seed: self.seed.as_ref().map(AsRawFd::as_raw_fd),
        }
    }

    pub(crate) fn into_all(self) -> impl Iterator<Item = OwnedFd> {
        [self.base, self.layer].into_iter().chain(self.seed)
    }
}

impl Disks {
    /// Measures the image's disk and makes the rest; `None` where the image has no disk. Waits for the
    /// file systems.
    pub(crate) fn prepare(spec: &Spec) -> Result<Option<Self>, DiskError> {
        let (Some(stored), Some(layer)) = (&spec.image.stored, &spec.layer) else {
            return Ok(None);
        };
        let Some(disk) = &stored.disk else {
            return Ok(None);
        };
        let base = open_base(&disk.path, disk.sha256, disk.bytes, disk.format)?;
        let layer_file = make_layer(layer)?;
        let seed = disk
            .has_seed
            .then(|| seed_file(spec))
            .transpose()
            .map_err(DiskError::Seed)?;
        Ok(Some(Self {
            base: Some(base),
            layer: layer_file,
            layer_bytes: layer.layer.max_file_bytes(),
            seed,
        }))
    }

    /// The layer of a QEMU whose launcher is dead, if it has one: the one file without a name that it
    /// can write. No other process knows it by anything but this descriptor.
    pub(crate) fn adopt(process: &QemuProcess) -> io::Result<Option<Self>> {
        for descriptor in process.descriptors()? {
            let layer = File::from(descriptor);
            let found = layer.metadata()?;
            let own = format!("/proc/self/fd/{}", layer.as_raw_fd());
            let target = std::fs::read_link(own)?;
            // The seed is in memory, and sealed.
            // A log that somebody has removed is open for appending.
            let how = fcntl(&layer, FcntlArg::F_GETFL)?;
            let is_layer = found.is_file()
                && found.nlink() == 0
                && how & (libc::O_ACCMODE | libc::O_APPEND) == libc::O_RDWR
                && !target.to_string_lossy().starts_with("/memfd:");
            if is_layer {
                return Ok(Some(Self {
                    base: None,
                    layer,
                    layer_bytes: found.len(),
                    seed: None,
                }));
            }
        }
        Ok(None)
    }

    pub(crate) fn handles(&self) -> io::Result<Handles> {
        Ok(Handles {
            base: match &self.base {
                Some(base) => base.try_clone()?.into(),
                None => return Err(io::Error::other("its QEMU has them already")),
            },
            layer: self.layer.try_clone()?.into(),
            seed: match &self.seed {
                Some(seed) => Some(seed.try_clone()?.into()),
                None => None,
            },
        })
    }

    /// Gives all that the guest has written back to the file system, and looks that it has it. QEMU must
    /// be gone.
    pub(crate) fn scrub(self) -> io::Result<Scrubbed> {
        let before = self.layer.metadata()?;
        let bytes = before.blocks() * 512;
        let end = before.len().max(self.layer_bytes);
        let end = libc::off_t::try_from(end).map_err(io::Error::other)?;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.layer, punch, 0, end)?;
        self.layer.set_len(0)?;
        self.layer.sync_all()?;
        let after = self.layer.metadata()?;
        if (after.len(), after.blocks(), after.nlink()) != (0, 0, 0) {
            return Err(io::Error::other("the file system still keeps some of it"));
        }
        Ok(Scrubbed { bytes })
    }

    /// Leaves them open for as long as this process lives.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

fn open_base(
    path: &Path,
    digest: Digest,
    bytes: u64,
    format: DiskFormat,
) -> Result<File, DiskError> {
    let failed = |source| DiskError::Base {
        path: path.to_owned(),
        source,
    };
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    let is_it = found.is_file()
        && found.len() == bytes
        && Digest::of_reader(&mut file, |_| ()).map_err(failed)? == (digest, bytes);
    if !is_it {
        return Err(DiskError::Altered(path.to_owned()));
    }
    if format == DiskFormat::Qcow2 {
        // Whatever brought it into the store: QEMU sees no header that was not judged.
        let mut head = vec![0; HEAD_BYTES.min(usize::try_from(bytes).unwrap_or(HEAD_BYTES))];
        file.read_exact_at(&mut head, 0).map_err(failed)?;
        Header::parse(&head, bytes).map_err(|source| DiskError::Header {
            path: path.to_owned(),
            source,
        })?;
    }
    file.rewind().map_err(failed)?;
    Ok(file)
}

fn make_layer(spec: &LayerSpec) -> Result<File, DiskError> {
    let failed = |source| DiskError::Layer {
        directory: spec.directory.clone(),
        source,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE | libc::O_EXCL)
        .mode(0o600)
        .open(&spec.directory)
        .map_err(failed)?;
    file.write_all(&spec.layer.content()).map_err(failed)?;
    let bytes = spec.layer.max_file_bytes();
    let most = libc::off_t::try_from(bytes).map_err(|error| failed(io::Error::other(error)))?;
    // What a guest is promised it has: a full file system must not stop it, nor it fill one.
    match fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, most) {
        Ok(()) => Ok(file),
        Err(nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT | nix::errno::Errno::EFBIG) => {
            Err(DiskError::NoRoom {
                directory: spec.directory.clone(),
                bytes,
            })
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

/// The seed as a file in memory that nobody can write, opened for reading.
fn seed_file(spec: &Spec) -> io::Result<File> {
    let image = seed::image(spec)?;
    let sealed = MemoryFile::copy_of(&image[..], c"omerta-seed")?;
    File::open(sealed.path())
}

impl LayerSpec {
    /// Checks that the disk is no smaller than the image's.
    pub(crate) fn check(&self, image_bytes: u64) -> Result<(), SpecError> {
        if self.layer.virtual_bytes() < image_bytes {
            return Err(SpecError::DiskSmall {
                given: self.layer.virtual_bytes() >> 20,
                least: image_bytes.div_ceil(1 << 20),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn layer(directory: &Path, mib: u64) -> LayerSpec {
        LayerSpec {
            directory: directory.to_owned(),
            layer: Layer::new(mib << 20).unwrap(),
        }
    }

    fn disks(directory: &Path, base: File) -> Disks {
        let spec = layer(directory, 64);
        Disks {
            base: Some(base),
            layer: make_layer(&spec).unwrap(),
            layer_bytes: spec.layer.max_file_bytes(),
            seed: None,
        }
    }

    #[test]
    fn a_layer_has_no_name_its_room_is_reserved_and_scrubbing_gives_all_of_it_back() {
        let directory = tempfile::tempdir().unwrap();
        let disks = disks(directory.path(), File::open("/dev/null").unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let reserved = disks.layer.metadata().unwrap();
        assert!(reserved.blocks() * 512 >= 64 << 20);
        assert_eq!(
            reserved.len(),
            Layer::new(64 << 20).unwrap().content().len() as u64
        );
        let secret = [7; 4096];
        disks.layer.write_all_at(&secret, 40 << 20).unwrap();
        let still_open = disks.layer.try_clone().unwrap();
        let scrubbed = disks.scrub().unwrap();
        assert!(scrubbed.bytes >= 64 << 20, "{scrubbed:?}");
        let mut left = Vec::new();
        (&still_open).take(1 << 20).read_to_end(&mut left).unwrap();
        assert_eq!(left, b"");
        assert_eq!(still_open.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn a_disk_for_which_there_is_no_room_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let spec = layer(directory.path(), 1 << 20);
        let refused = make_layer(&spec);
        assert!(
            matches!(refused, Err(DiskError::NoRoom { .. })),
            "{refused:?}"
        );
        let missing = layer(&directory.path().join("missing"), 1);
        assert!(matches!(make_layer(&missing), Err(DiskError::Layer { .. })));
    }

    #[test]
    fn a_base_that_was_altered_or_is_a_layer_itself_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let mut content = Layer::new(1 << 20).unwrap().content();
        let (digest, length) = (Digest::of(&content), content.len() as u64);
        std::fs::write(&path, &content).unwrap();
        let open = |digest, length| open_base(&path, digest, length, DiskFormat::Qcow2);
        open(digest, length).unwrap();
        assert!(matches!(
            open(digest, length - 1),
            Err(DiskError::Altered(_))
        ));
        content[14] = 2;
        std::fs::write(&path, &content).unwrap();
        assert!(matches!(open(digest, length), Err(DiskError::Altered(_))));
        let refused = open(Digest::of(&content), length);
        assert!(
            matches!(refused, Err(DiskError::Header { .. })),
            "{refused:?}"
        );
        open_base(&path, Digest::of(&content), length, DiskFormat::Raw).unwrap();
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(open(digest, length), Err(DiskError::Altered(_))));
    }
}
