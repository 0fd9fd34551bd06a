//! A guest image on disk: a kernel and an initramfs.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A guest image whose files were there and readable when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The kernel (`vmlinuz`).
    pub kernel: PathBuf,
    /// The initramfs (`initrd.img`).
    pub initrd: PathBuf,
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
}

impl Image {
    /// Opens the image in `directory`, which holds `vmlinuz` and `initrd.img`.
    ///
    /// # Errors
    /// When one of the files is missing, unreadable, empty or not a regular file.
    pub fn open(directory: &Path) -> Result<Self, ImageError> {
        let image = Self {
            kernel: directory.join("vmlinuz"),
            initrd: directory.join("initrd.img"),
        };
        image.check()?;
        Ok(image)
    }

    /// Checks again that both files are there: an image may have gone since it was opened.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn check(&self) -> Result<(), ImageError> {
        for path in [&self.kernel, &self.initrd] {
            // To open a fifo would wait for a writer, and the daemon with it.
            let is_file = std::fs::metadata(path).map(|found| found.is_file());
            if matches!(is_file, Ok(false)) {
                return Err(ImageError::NotAFile { path: path.clone() });
            }
            let metadata = File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .and_then(|file| file.metadata())
                .map_err(|source| match source.kind() {
                    std::io::ErrorKind::NotFound => ImageError::Missing { path: path.clone() },
                    _ => ImageError::Unreadable {
                        path: path.clone(),
                        source,
                    },
                })?;
            if !metadata.is_file() || metadata.len() == 0 {
                return Err(ImageError::NotAFile { path: path.clone() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_fifo_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("vmlinuz");
        nix::unistd::mkfifo(&kernel, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = Image::open(directory.path()).unwrap_err();
        assert!(matches!(error, ImageError::NotAFile { .. }), "{error}");
    }
}
