//! The recipes of the project's images, carried along so that `omerta image build` needs no source tree.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The recipes' files by their paths below `vm-launcher/image`.
macro_rules! files {
    ($($path:literal),+ $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../image/", $path)))),+]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "agent.sh",
    "build.sh",
    "debian.sh",
    "debian/initrd/init",
    "debian/modules",
    "debian/packages",
    "debian/rootfs/etc/cloud/cloud.cfg.d/90_omerta.cfg",
    "debian/rootfs/etc/modules-load.d/omerta.conf",
    "debian/rootfs/etc/systemd/network/10-cloud-init-eth0.network.d/omerta.conf",
    "debian/rootfs/etc/systemd/system/omerta-agent.service",
    "debian/rootfs/etc/systemd/system/omerta-console.service",
    "debian/rootfs/etc/systemd/system/omerta-firewall.service",
    "debian/rootfs/etc/systemd/system/omerta-tunnel.service",
    "debian/rootfs/usr/lib/omerta/console",
    "debian/rootfs/usr/lib/omerta/firewall",
    "debian/rootfs/usr/lib/omerta/tunnel",
    "kernel.sh",
    "modules",
    "rootfs/etc/acpi/PWRF/00000080",
    "rootfs/etc/group",
    "rootfs/etc/inittab",
    "rootfs/etc/omerta/firewall-host.nft",
    "rootfs/etc/omerta/firewall.nft",
    "rootfs/etc/passwd",
    "rootfs/etc/profile",
    "rootfs/init",
    "rootfs/usr/lib/omerta/facts",
    "rootfs/usr/lib/omerta/follow",
    "rootfs/usr/lib/omerta/network",
    "rootfs/usr/lib/omerta/report",
];

/// Where the recipes have been unpacked to; gone when it is dropped.
#[derive(Debug)]
pub struct Recipe {
    directory: tempfile::TempDir,
}

/// The recipes cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", path.display())]
pub struct RecipeError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Recipe {
    /// Unpacks them.
    ///
    /// # Errors
    /// When there is no room.
    pub fn unpack() -> Result<Self, RecipeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RecipeError { path, source }
        };
        let directory = tempfile::tempdir().map_err(failed(&std::env::temp_dir()))?;
        for (name, bytes) in FILES {
            let path = directory.path().join(name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(failed(parent))?;
            }
            fs::write(&path, bytes).map_err(failed(&path))?;
            let mode = if bytes.starts_with(b"#!") {
                0o755
            } else {
                0o644
            };
            fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(failed(&path))?;
        }
        Ok(Self { directory })
    }

    /// The path of one of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn walk(directory: &Path, root: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, root, found);
            } else {
                found.insert(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }

    #[test]
    fn what_is_carried_along_is_the_recipes_whole() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../image");
        let mut there = BTreeSet::new();
        walk(&root, &root, &mut there);
        let carried: BTreeSet<_> = FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(carried, there);
        let recipe = Recipe::unpack().unwrap();
        let script = fs::metadata(recipe.path("build.sh")).unwrap();
        assert_eq!(script.permissions().mode() & 0o777, 0o755);
    }
}
