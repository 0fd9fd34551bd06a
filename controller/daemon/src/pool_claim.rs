//! One omertad for each guest's address in a network namespace.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::geteuid;
use thiserror::Error;

use crate::made_directories::MadeDirectories;
use crate::pool::{GuestPool, Slot};

/// Where every omertad has its claims, whatever its own directories are. The unit may write there
/// (`StateDirectory`), and it outlives the unit, unlike what is below /run.
const DIRECTORY: &str = "/var/lib/omerta";

/// The file whose bytes are locked. It stays empty.
const FILE: &str = "guest-pools.lock";

/// Why a pool cannot be had.
#[derive(Debug, Error)]
pub(crate) enum PoolClaimError {
    #[error(
        "another omertad in this network namespace has addresses of the guest pool {0}: stop it, or give this one another --guest-pool"
    )]
    Taken(GuestPool),
    #[error(
        "{path} belongs to another user or is open to others, who could then keep omertad from its guest pool: `chown root {path}; chmod go-rwx {path}`", path = .0.display()
    )]
    NotPrivate(PathBuf),
    #[error("cannot {action} {}; omertad must be able to write there", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The right to give out a pool's addresses in this network namespace, held until dropped or until
/// this process ends, however it ends. The last to be dropped removes the file, and each the
/// directories that it made.
#[derive(Debug)]
pub(crate) struct PoolClaim {
    file: File,
    path: PathBuf,
    /// Of the namespace.
    inode: u64,
    /// Dropped after the file is removed.
    #[expect(dead_code, reason = "made is held")]
    directories: MadeDirectories,
}

impl PoolClaim {
    /// Claims the pool, or fails where another process has claimed any part of it: two pools
    /// overlap exactly where two ranges of bytes do, an address being a byte.
    pub(crate) fn take(pool: GuestPool) -> Result<Self, PoolClaimError> {
        Self::take_in(Path::new(DIRECTORY), pool)
    }

    fn take_in(directory: &Path, pool: GuestPool) -> Result<Self, PoolClaimError> {
        let namespace = Path::new("/proc/thread-self/ns/net");
        let inode = namespace.metadata().map_err(failed("read", namespace))?;
        let inode = inode.ino();
        let path = directory.join(FILE);
        let range = Self::range(inode, pool.base(), pool.capacity() * 4);
        loop {
            let directories =
                MadeDirectories::make(directory).map_err(failed("create", directory))?;
            let file = open_private(directory, &path)?;
            let claimed = lock(&file, &range).map_err(failed("lock", &path))?;
            // Another may have removed the file between the two; what is locked then binds nobody.
            let there = path.metadata().is_ok_and(|there| {
                file.metadata()
                    .is_ok_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()))
            });
            match (claimed, there) {
                (true, true) => {
                    return Ok(Self {
                        file,
                        path,
                        inode,
                        directories,
                    });
                }
                (false, true) => return Err(PoolClaimError::Taken(pool)),
                (_, false) => {}
            }
        }
    }

    /// Claims the addresses of a guest that was there before, of whatever pool they are; `false` where another process has
    /// claimed them.
    pub(crate) fn hold(&self, slot: Slot) -> Result<bool, PoolClaimError> {
        let range = Self::range(self.inode, slot.0.wrapping_mul(4), 4);
        lock(&self.file, &range).map_err(failed("lock", &self.path))
    }

    /// The range of bytes of so many addresses, of 2³² to a namespace (inodes of namespaces have 32 bits, offsets 63).
    fn range(inode: u64, first: u32, addresses: usize) -> libc::flock {
        let start = (inode & 0x7fff_ffff) << 32 | u64::from(first);
        libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start as libc::off_t,
            l_len: addresses as libc::off_t,
            l_pid: 0,
        }
    }
}

impl Drop for PoolClaim {
    fn drop(&mut self) {
        // All of the file can be had by its last user alone.
        let whole = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        if matches!(lock(&self.file, &whole), Ok(true))
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "left behind");
        }
    }
}

/// Whether the range could be locked: by the open file, not the process, so that the lock goes with
/// the last descriptor and never with another's close.
fn lock(file: &File, range: &libc::flock) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(range)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens the file that nobody else may open: whoever may could lock it for good.
fn open_private(directory: &Path, path: &Path) -> Result<File, PoolClaimError> {
    let user = geteuid().as_raw();
    let of_directory = directory.metadata().map_err(failed("read", directory))?;
    // Others may look into it, for the images are there, but not put another file in place.
    if of_directory.uid() != user || of_directory.mode() & 0o022 != 0 {
        return Err(PoolClaimError::NotPrivate(directory.to_owned()));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed("open", path))?;
    let of_file = file.metadata().map_err(failed("read", path))?;
    if of_file.uid() != user || of_file.mode() & 0o077 != 0 {
        return Err(PoolClaimError::NotPrivate(path.to_owned()));
    }
    Ok(file)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PoolClaimError {
    let path = path.to_owned();
    move |source| PoolClaimError::Io {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use omerta_test_support::Namespace;

    fn take(directory: &Path, pool: &str) -> Result<PoolClaim, PoolClaimError> {
        PoolClaim::take_in(directory, pool.parse().unwrap())
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o777
    }

    #[test]
    fn overlapping_pools_are_refused_in_one_namespace_only() {
        let directory = tempfile::tempdir().unwrap();
        let take = |pool| take(directory.path(), pool);
        let namespace = Namespace::new("pool").unwrap();
        let other = Namespace::new("pool").unwrap();
        let first = namespace.enter(|| take("10.77.0.0/16")).unwrap().unwrap();
        namespace
            .enter(|| {
                for overlapping in ["10.77.0.0/16", "10.77.9.0/24", "10.0.0.0/8"] {
                    let error = take(overlapping).unwrap_err().to_string();
                    assert!(error.contains(overlapping), "{error}");
                    assert!(error.contains("--guest-pool"), "{error}");
                }
                take("10.78.0.0/16").unwrap();
            })
            .unwrap();
        other.enter(|| take("10.77.0.0/16")).unwrap().unwrap();
        drop(first);
        namespace.enter(|| take("10.77.0.0/16")).unwrap().unwrap();
    }

    /// The configuration has named another pool since.
    #[test]
    fn addresses_of_guests_that_were_there_before_are_claimed_whatever_the_pool_is_now() {
        let directory = tempfile::tempdir().unwrap();
        let take = |pool| take(directory.path(), pool);
        let namespace = Namespace::new("pool").unwrap();
        namespace
            .enter(|| {
                let own = take("10.78.0.0/16").unwrap();
                let (slot, _) = crate::pool::Slots::new("10.77.3.0/24".parse().unwrap())
                    .take()
                    .unwrap();
                assert!(own.hold(slot).unwrap());
                take("10.77.0.0/16").unwrap_err();
                let other = take("10.77.4.0/24").unwrap();
                assert!(!other.hold(slot).unwrap());
                drop(own);
                assert!(other.hold(slot).unwrap());
            })
            .unwrap();
    }

    #[test]
    fn the_last_to_go_removes_the_file_and_what_was_made_for_it() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        let first = take(&directory, "10.77.0.0/16").unwrap();
        let second = take(&directory, "10.78.0.0/16").unwrap();
        take(&directory, "10.78.0.0/16").unwrap_err();
        drop(second);
        assert!(directory.join(FILE).exists(), "the first still claims");
        take(&directory, "10.77.0.0/16").unwrap_err();
        drop(first);
        assert!(!directory.exists());
    }

    /// Whoever may open the file may lock all of it, and no omertad would start.
    #[test]
    fn nobody_else_can_open_what_is_locked() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        let _claim = take(&directory, "10.77.0.0/16").unwrap();
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join(FILE)), 0o600);
    }

    #[test]
    fn a_place_that_others_have_access_to_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        let _other = take(&directory, "10.78.0.0/16").unwrap();
        let file = directory.join(FILE);
        for (path, open, private) in [(&file, 0o644, 0o600), (&directory, 0o777, 0o755)] {
            std::fs::set_permissions(path, Permissions::from_mode(open)).unwrap();
            let error = take(&directory, "10.77.0.0/16").unwrap_err().to_string();
            assert!(error.starts_with(&*path.to_string_lossy()), "{error}");
            std::fs::set_permissions(path, Permissions::from_mode(private)).unwrap();
            take(&directory, "10.77.0.0/16").unwrap();
        }
        std::fs::rename(&file, directory.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(directory.join("elsewhere"), &file).unwrap();
        take(&directory, "10.77.0.0/16").unwrap_err();
    }
}
