//! Where guests' images come from: the store, of what a trusted key has signed; and the operator's own
//! directory, where one is named, of what the operator answers for.

use std::path::PathBuf;

use omerta_api::{ApiError, ErrorKind};
use omerta_images::{ImageName, Store, StoreError, Trust, TrustedKeys};
use omerta_vm_launcher::{Image, ImageError};

use crate::failure::{failed, not_found, refused, report, usage};

/// Both places.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    /// Directories of images without manifests, looked at first.
    pub(crate) directory: Option<PathBuf>,
    /// Images with manifests.
    pub(crate) store: Store,
    /// Whose signatures count; read anew for each guest.
    pub(crate) trusted_keys: PathBuf,
    /// Whether an image of the store needs one.
    pub(crate) require_signature: bool,
}

impl Images {
    /// Opens an image. Blocks for as long as its file system does.
    pub(crate) fn open(&self, name: &str) -> Result<Image, ApiError> {
        let name: ImageName = name.parse().map_err(|error| usage(format!("{error}")))?;
        if let Some(directory) = self.directory.as_ref().map(|d| d.join(name.as_str()))
            && directory.exists()
        {
            return Image::open(&directory).map_err(|error| match &error {
                ImageError::Missing { .. } => not_found(format!("no image `{name}`: {error}")),
                _ => failed(&error),
            });
        }
        self.open_stored(&name).map_err(|error| {
            let message = report(&error);
            match error {
                StoreError::NotFound { .. } => not_found(match &self.directory {
                    Some(directory) => {
                        let path = directory.join(name.as_str());
                        format!(
                            "{message}, or build one by `make image IMAGE={}`",
                            path.display()
                        )
                    }
                    None => message,
                }),
                StoreError::Trust(_) => refused(message),
                _ => ApiError {
                    error: ErrorKind::Failed,
                    message,
                },
            }
        })
    }

    fn open_stored(&self, name: &ImageName) -> Result<Image, StoreError> {
        let trust = self.trust()?;
        Ok(Image::of_store(&self.store.open(name, &trust)?))
    }

    fn trust(&self) -> Result<Trust, StoreError> {
        Ok(Trust {
            keys: TrustedKeys::read(&self.trusted_keys)?,
            require_signature: self.require_signature,
        })
    }

    /// The first image by name that can be opened.
    pub(crate) fn first(&self) -> Option<Image> {
        let entries = self.directory.as_ref().map(std::fs::read_dir);
        let mut directories: Vec<_> = entries
            .into_iter()
            .flatten()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        directories.sort();
        let mut own = directories.iter().filter_map(|path| Image::open(path).ok());
        own.next().or_else(|| {
            let listed = self.store.list(&self.trust().ok()?).ok()?;
            let mut found = listed.iter().filter_map(|image| image.found.as_ref().ok());
            found.next().map(Image::of_store)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use omerta_images::{Seed, Sources};
    use std::path::Path;

    fn images(root: &Path, require_signature: bool) -> Images {
        std::fs::write(root.join("vmlinuz"), b"kernel").unwrap();
        std::fs::write(root.join("initrd.img"), b"initrd").unwrap();
        let store = Store::at(root.join("store"));
        let lax = Trust {
            keys: TrustedKeys::default(),
            require_signature: false,
        };
        let sources = Sources::within(root);
        let manifest = sources.measure("small".parse().unwrap(), Seed::Facts, &mut |_| ());
        let manifest = manifest.unwrap().to_bytes().unwrap();
        store
            .import(&manifest, None, &sources, &lax, &mut |_| ())
            .unwrap();
        Images {
            directory: None,
            store,
            trusted_keys: root.join("keys"),
            require_signature,
        }
    }

    #[test]
    fn an_unsigned_image_of_the_store_is_refused_unless_configured_otherwise() {
        let root = tempfile::tempdir().unwrap();
        let error = images(root.path(), true).open("small").unwrap_err();
        assert_eq!(error.error, ErrorKind::Refused);
        assert!(error.message.contains("not signed"), "{}", error.message);
        let root = tempfile::tempdir().unwrap();
        let image = images(root.path(), false).open("small").unwrap();
        assert!(image.stored.is_some());
    }

    #[test]
    fn a_directory_counts_only_where_the_operator_names_it() {
        let root = tempfile::tempdir().unwrap();
        let mut images = images(root.path(), true);
        let own = root.path().join("own/mine");
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(own.join("vmlinuz"), b"kernel").unwrap();
        std::fs::write(own.join("initrd.img"), b"initrd").unwrap();
        let error = images.open("mine").unwrap_err();
        assert_eq!(error.error, ErrorKind::NotFound);
        images.directory = Some(root.path().join("own"));
        assert_eq!(images.open("mine").unwrap().stored, None);
        assert_eq!(images.open("small").unwrap_err().error, ErrorKind::Refused);
        let error = images.open("absent").unwrap_err();
        assert_eq!(error.error, ErrorKind::NotFound);
        assert!(error.message.contains("own"), "{}", error.message);
    }
}
