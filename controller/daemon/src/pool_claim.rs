//! One omertad for each guest's address in a network namespace.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use thiserror::Error;

use crate::pool::GuestPool;

/// The file whose bytes are locked: every omertad has it, and it is never written to disk.
const DEVICE: &str = "/dev/net/tun";

/// Why a pool cannot be had.
#[derive(Debug, Error)]
pub(crate) enum PoolClaimError {
    #[error(
        "another omertad in this network namespace has addresses of the guest pool {0}: stop it, or give this one another --guest-pool"
    )]
    Taken(GuestPool),
    #[error("cannot {action} {path}; load the driver with `modprobe tun`")]
    Io {
        action: &'static str,
        path: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The right to give out a pool's addresses in this network namespace, held until dropped or until
/// this process ends, however it ends.
#[derive(Debug)]
pub(crate) struct PoolClaim(#[expect(dead_code, reason = "open is held")] File);

impl PoolClaim {
    /// Claims the pool, or fails where another process has claimed any part of it: two pools
    /// overlap exactly where two ranges of bytes do, an address being a byte.
    pub(crate) fn take(pool: GuestPool) -> Result<Self, PoolClaimError> {
        let failed = |action, path| {
            move |source| PoolClaimError::Io {
                action,
                path,
                source,
            }
        };
        let namespace = "/proc/thread-self/ns/net";
        let inode = Path::new(namespace)
            .metadata()
            .map_err(failed("read", namespace))?
            .ino();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(failed("open", DEVICE))?;
        let mut range: libc::flock = Self::range(inode, pool);
        range.l_type = libc::F_WRLCK as libc::c_short;
        // Of the open file, not of the process: it goes with the last descriptor and never with
        // another's close.
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&range)) {
            Ok(_) => Ok(Self(file)),
            Err(Errno::EAGAIN | Errno::EACCES) => Err(PoolClaimError::Taken(pool)),
            Err(errno) => Err(failed("lock", DEVICE)(errno.into())),
        }
    }

    /// The pool's range of bytes, 2³² of them to a namespace (inodes of namespaces have 32 bits,
    /// offsets 63).
    fn range(inode: u64, pool: GuestPool) -> libc::flock {
        let start = (inode & 0x7fff_ffff) << 32 | u64::from(pool.base());
        libc::flock {
            l_type: 0,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start as libc::off_t,
            l_len: (pool.capacity() * 4) as libc::off_t,
            l_pid: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use omerta_test_support::Namespace;

    fn take(pool: &str) -> Result<PoolClaim, PoolClaimError> {
        PoolClaim::take(pool.parse().unwrap())
    }

    #[test]
    fn overlapping_pools_are_refused_in_one_namespace_only() {
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
}
