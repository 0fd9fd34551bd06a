//! Directories that this process made where there were none, and removes when it goes.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The directories, outermost first. Dropped, those that are empty are removed.
#[derive(Debug, Default)]
pub(crate) struct MadeDirectories(Vec<PathBuf>);

impl MadeDirectories {
    /// Makes `directory` and what of the path to it is missing, mode 0700.
    pub(crate) fn make(directory: &Path) -> io::Result<Self> {
        let missing = directory.ancestors().take_while(|path| !path.exists());
        let mut missing: Vec<_> = missing.map(Path::to_owned).collect();
        missing.reverse();
        let mut made = Self::default();
        for path in missing {
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => made.0.push(path),
                // Another made it meanwhile, and keeps it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(made)
    }
}

impl Drop for MadeDirectories {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            // What another put there keeps it.
            let _ = std::fs::remove_dir(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_goes_and_what_was_there_or_is_used_stays() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("a/b/c");
        drop(MadeDirectories::make(&deep).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);

        std::fs::create_dir(directory.path().join("a")).unwrap();
        let made = MadeDirectories::make(&deep).unwrap();
        std::fs::write(directory.path().join("a/b/file"), b"").unwrap();
        drop(made);
        assert!(!deep.exists() && directory.path().join("a/b/file").exists());

        std::fs::write(directory.path().join("file"), b"").unwrap();
        MadeDirectories::make(&directory.path().join("file/d/e")).unwrap_err();
    }
}
