//! What the demo needs of the machine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::Arguments;

/// Where everything is.
pub struct Requirements {
    pub omerta: PathBuf,
    pub omertad: PathBuf,
    pub image_dir: PathBuf,
    pub image_name: String,
}

/// Finds everything, or says what is missing and how to get it.
pub fn find(arguments: &Arguments) -> Result<Requirements> {
    if !Uid::effective().is_root() {
        bail!("network namespaces and taps need root: run `sudo make demo`");
    }
    for tool in ["ip", "wg", "qemu-system-x86_64"] {
        if !on_path(tool) {
            bail!("{tool} is not on PATH: run `make setup`");
        }
    }
    let own =
        std::env::current_exe().context("cannot tell where this program is: give --bin-dir")?;
    let bin_dir = match &arguments.bin_dir {
        Some(directory) => directory.clone(),
        None => own.parent().map(Path::to_path_buf).unwrap_or_default(),
    };
    let binary = |name: &str| {
        let path = bin_dir.join(name);
        path.canonicalize()
            .with_context(|| format!("{} is missing: run `cargo build --release`", path.display()))
    };
    let image = &arguments.image_dir;
    for part in ["vmlinuz", "initrd.img"] {
        let path = image.join(part);
        if !path.is_file() {
            bail!("{} is missing: run `make image`", path.display());
        }
    }
    let image = image
        .canonicalize()
        .with_context(|| format!("cannot resolve {}", image.display()))?;
    let (Some(image_dir), Some(image_name)) = (image.parent(), image.file_name()) else {
        bail!(
            "{} cannot be an image: give a directory below another",
            image.display()
        );
    };
    Ok(Requirements {
        omerta: binary("omerta")?,
        omertad: binary("omertad")?,
        image_dir: image_dir.to_owned(),
        image_name: image_name.to_string_lossy().into_owned(),
    })
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}
