//! The file system that QEMU sees: what it boots, its program, libraries and firmware, a few devices,
//! and nothing of the host's besides.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use super::entry::{BindStep, c_path};
use super::{CellError, JailError, qemu_program};
use crate::{Accel, Spec};

/// Where QEMU finds what the guest boots and is told.
pub(crate) const KERNEL: &str = "/boot/kernel";
pub(crate) const INITRD: &str = "/boot/initrd";
pub(crate) const CONFIG: &str = "/boot/guest.conf";

/// What a distribution's QEMU needs beside its program. What a host has not is left out: the names
/// of the directories differ.
const PACKAGED: [&str; 7] = [
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/qemu",
    "/usr/share/seabios",
];

const DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/urandom"];
const KVM: &str = "/dev/kvm";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BindKind {
    Directory,
    File,
    Device,
}

/// A path of the host's that the jail has too, at the same place.
#[derive(Debug)]
pub(super) struct Bind {
    pub(super) path: PathBuf,
    pub(super) kind: BindKind,
}

/// A file system in memory, seen by nobody but who holds its descriptor and, bound read-only, by
/// QEMU.
#[derive(Debug)]
pub(crate) struct Root {
    mount: OwnedFd,
    program: PathBuf,
    binds: Vec<Bind>,
}

impl Root {
    pub(super) fn build(spec: &Spec) -> Result<Self, CellError> {
        let program = qemu_program().ok_or(CellError::NoProgram)?;
        let mut root = Self {
            mount: empty_file_system().map_err(JailError::make("make a file system"))?,
            program,
            binds: Vec::new(),
        };
        root.fill(spec)?;
        spec.image
            .copy_into(|name, bytes| root.write(name, bytes))?;
        let config = spec.guest_config();
        root.write(CONFIG, &mut config.as_bytes())
            .map_err(JailError::make("write the guest's configuration"))?;
        Ok(root)
    }

    fn fill(&mut self, spec: &Spec) -> Result<(), JailError> {
        for directory in ["/boot", "/dev"] {
            self.make_directory(Path::new(directory))
                .map_err(JailError::make("make a directory"))?;
        }
        // In order, so that a directory comes before what is in it.
        let mut paths: Vec<(PathBuf, bool)> = PACKAGED
            .iter()
            .map(|path| (PathBuf::from(path), false))
            .chain(spec.jail.paths.iter().map(|path| (path.clone(), true)))
            .chain([(self.program.clone(), true)])
            .collect();
        paths.sort();
        for (path, is_needed) in paths {
            match self.add(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && !is_needed => {}
                Err(source) => return Err(JailError::Path { path, source }),
            }
        }
        let kvm = (spec.accel == Accel::Kvm).then_some(KVM);
        for device in DEVICES.into_iter().chain(kvm) {
            self.bind(Path::new(device), BindKind::Device)
                .map_err(JailError::make("bind a device"))?;
        }
        Ok(())
    }

    /// Adds what is at `path` on the host; a symbolic link as such.
    fn add(&mut self, path: &Path) -> io::Result<()> {
        let is_covered =
            |bind: &Bind| bind.kind == BindKind::Directory && path.starts_with(&bind.path);
        if self.binds.iter().any(is_covered) {
            return Ok(());
        }
        let found = fs::symlink_metadata(path)?;
        if found.is_symlink() {
            self.make_parent(path)?;
            return match symlink(fs::read_link(path)?, self.within(path)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                made => made,
            };
        }
        let kind = if found.is_dir() {
            BindKind::Directory
        } else {
            BindKind::File
        };
        self.bind(path, kind)
    }

    fn bind(&mut self, path: &Path, kind: BindKind) -> io::Result<()> {
        self.make_parent(path)?;
        if kind == BindKind::Directory {
            self.make_directory(path)?;
        } else {
            File::create(self.within(path))?;
        }
        self.binds.push(Bind {
            path: path.to_owned(),
            kind,
        });
        Ok(())
    }

    fn make_parent(&self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(parent) => self.make_directory(parent),
            None => Ok(()),
        }
    }

    /// Makes a directory and those above it, which QEMU can enter whatever this process's umask is.
    fn make_directory(&self, path: &Path) -> io::Result<()> {
        let mut above: Vec<_> = path
            .ancestors()
            .filter(|path| path.parent().is_some())
            .collect();
        above.reverse();
        for path in above {
            let place = self.within(path);
            match fs::create_dir(&place) {
                // A symbolic link of the jail's, perhaps.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => {
                    made?;
                    fs::set_permissions(&place, Permissions::from_mode(0o755))?;
                }
            }
        }
        Ok(())
    }

    /// Writes a file that QEMU can read and nobody change, and tells its length.
    fn write(&self, name: &str, bytes: &mut dyn Read) -> io::Result<u64> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(self.within(Path::new(name)))?;
        file.set_permissions(Permissions::from_mode(0o444))?;
        let length = io::copy(bytes, &mut file)?;
        file.flush()?;
        Ok(length)
    }

    /// The path by which this process reaches `path` of the jail's.
    fn within(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/self/fd/{}", self.mount.as_raw_fd()));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// QEMU's program, the same path inside and outside.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    pub(super) fn binds(&self) -> &[Bind] {
        &self.binds
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    pub(super) fn handle(&self) -> Result<OwnedFd, JailError> {
        self.mount
            .try_clone()
            .map_err(JailError::make("hand on the root"))
    }

    /// What is to be mounted, in this order.
    pub(super) fn steps(&self) -> Result<Vec<BindStep>, JailError> {
        let step = |bind: &Bind| {
            let flags = match bind.kind {
                BindKind::Device => MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
                _ => MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            };
            let place: CString = c_path(bind.path.strip_prefix("/").unwrap_or(&bind.path))?;
            Ok(BindStep {
                source: c_path(&bind.path)?,
                place,
                flags,
            })
        };
        self.binds.iter().map(step).collect()
    }

    /// Lets go of what QEMU has read and needs no more: it maps the initramfs alone.
    pub(crate) fn forget_files(self) {
        for name in [KERNEL, CONFIG] {
            if let Err(error) = fs::remove_file(self.within(Path::new(name))) {
                tracing::warn!(name, %error, "stays in memory while its guest lives");
            }
        }
    }
}

fn empty_file_system() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", "omerta-jail")?;
    fsconfig_set_string(context.as_fd(), "mode", "0755")?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}
