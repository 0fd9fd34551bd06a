//! Files that are in memory alone and can never change: what QEMU is given to boot from.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A sealed file in memory; gone when it is dropped and nobody maps it any more.
#[derive(Debug)]
pub(crate) struct MemoryFile {
    file: File,
    length: u64,
}

impl MemoryFile {
    /// Copies `from` to its end and seals the copy. `name` is what `/proc` shows.
    pub(crate) fn copy_of(mut from: impl Read, name: &CStr) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create(name, flags)?);
        let length = io::copy(&mut from, &mut file)?;
        let seals = SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(Self { file, length })
    }

    /// How many bytes it holds.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// By which path another process of the same user opens it. QEMU inherits nothing.
    pub(crate) fn path(&self) -> PathBuf {
        let (process, fd) = (std::process::id(), self.file.as_raw_fd());
        PathBuf::from(format!("/proc/{process}/fd/{fd}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn copy_is_whole_and_cannot_be_changed_by_its_path_either() {
        let copy = MemoryFile::copy_of(&b"kernel"[..], c"test").unwrap();
        assert_eq!(copy.length(), 6);
        assert_eq!(std::fs::read(copy.path()).unwrap(), b"kernel");
        let mut again = File::options().write(true).open(copy.path()).unwrap();
        again.write_all(b"other!").unwrap_err();
        again.set_len(0).unwrap_err();
        again.set_len(7).unwrap_err();
        assert_eq!(std::fs::read(copy.path()).unwrap(), b"kernel");
    }
}
