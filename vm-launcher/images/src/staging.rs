//! Where an import is put together: a directory that counts for nothing until it is renamed away,
//! and that is locked for as long as its maker lives.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use crate::store::{StoreError, failed, sync_directory};
use crate::{Digest, Digesting};

const LOCK: &str = "lock";

/// A directory of its own below `incoming`; gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Staging {
    directory: tempfile::TempDir,
    _lock: Flock<File>,
}

impl Staging {
    /// Makes one. The store must be locked, so that no sweep meets it before it is locked itself.
    pub(crate) fn begin(incoming: &Path) -> Result<Self, StoreError> {
        let directory = tempfile::Builder::new()
            .prefix("import-")
            .tempdir_in(incoming)
            .map_err(failed("make a directory in", incoming))?;
        let path = directory.path().join(LOCK);
        let file = File::create(&path).map_err(failed("create", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| failed("lock", &path)(errno.into()))?;
        Ok(Self {
            directory,
            _lock: lock,
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes at most `most` bytes of `reader` to a new file, has them reach the disk, and gives the
    /// file, at its start, with its digest and length.
    pub(crate) fn write(
        &self,
        name: &str,
        reader: &mut dyn Read,
        most: u64,
    ) -> Result<(File, Digest, u64), StoreError> {
        let path = self.path(name);
        let mut written = || -> io::Result<_> {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o444)
                .open(&path)?;
            file.set_permissions(Permissions::from_mode(0o444))?;
            // One byte more, so that a longer source is seen to be longer.
            let mut bounded = reader.take(most.saturating_add(1));
            let mut digesting = Digesting::new(&mut bounded);
            io::copy(&mut digesting, &mut file)?;
            let (digest, length) = digesting.end();
            file.flush()?;
            file.sync_all()?;
            file.rewind()?;
            Ok((file, digest, length))
        };
        written().map_err(failed("write", &path))
    }
}

/// Removes what dead imports and removals have left. The store must be locked.
pub(crate) fn sweep(incoming: &Path) -> Result<usize, StoreError> {
    let mut swept = 0;
    let entries = fs::read_dir(incoming).map_err(failed("read", incoming))?;
    for entry in entries {
        let path = entry.map_err(failed("read", incoming))?.path();
        let lives = File::open(path.join(LOCK))
            .is_ok_and(|file| Flock::lock(file, FlockArg::LockSharedNonblock).is_err());
        if lives {
            continue;
        }
        fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
        swept += 1;
    }
    if swept > 0 {
        sync_directory(incoming)?;
    }
    Ok(swept)
}
