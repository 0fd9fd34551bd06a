//! A kernel of the distribution and the modules that the tests take.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::package;

/// What the tests make or attach to; what these depend on comes along.
const MODULES: [&str; 8] = [
    "tun",
    "veth",
    "dummy",
    "bridge",
    "sch_ingress",
    "cls_bpf",
    "act_mirred",
    "wireguard",
];

/// A kernel that is ready to boot.
pub struct Kernel {
    /// As in `6.12`.
    pub series: String,
    /// As uname tells it.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// The modules to load, in order, with what they hold.
    pub modules: Vec<(String, Vec<u8>)>,
    /// A static busybox, for the machine's own programs.
    pub busybox: PathBuf,
}

impl Kernel {
    /// The distribution's newest kernel of `series`, or none where it has none.
    pub fn fetch(series: &str, cache: &Path) -> Result<Option<Self>> {
        let names = package::run(Command::new("apt-cache").args(["pkgnames", "linux-image-"]))?;
        let Some(package) = newest(series, &String::from_utf8_lossy(&names)) else {
            return Ok(None);
        };
        let busybox = package::unpacked("busybox-static", cache)?;
        let busybox = ["bin/busybox", "usr/bin/busybox"]
            .map(|path| busybox.join(path))
            .into_iter()
            .find(|path| path.exists())
            .context("busybox-static holds no busybox")?;
        let root = package::unpacked(&package, cache)?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        let image = root.join("boot").join(format!("vmlinuz-{release}"));
        let tree = ["lib", "usr/lib"]
            .map(|lib| root.join(lib).join("modules").join(&release))
            .into_iter()
            .find(|path| path.exists())
            .with_context(|| format!("{package} holds no modules"))?;
        let mut files = Vec::new();
        collect(&tree, &mut files)?;
        let mut modules = Vec::new();
        for name in MODULES {
            add_module(name, &files, &busybox, &mut modules)?;
        }
        Ok(Some(Self {
            series: series.to_owned(),
            release,
            image,
            modules,
            busybox,
        }))
    }
}

/// Among package names, the newest `linux-image-SERIES.…-cloud-amd64`.
fn newest(series: &str, names: &str) -> Option<String> {
    let numbers = |name: &str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect()
    };
    let prefix = format!("linux-image-{series}.");
    names
        .lines()
        .filter(|name| name.starts_with(&prefix) && name.ends_with("-cloud-amd64"))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Adds the module behind those that it depends on. One that is no file is built in.
fn add_module(
    name: &str,
    files: &[PathBuf],
    busybox: &Path,
    modules: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    if modules.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let is_it = |path: &&PathBuf| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = file.split(".ko").next().unwrap_or_default();
        file.contains(".ko") && stem.replace('-', "_") == name
    };
    let Some(path) = files.iter().find(is_it) else {
        return Ok(());
    };
    let bytes = if path.extension().is_some_and(|ending| ending == "xz") {
        package::run(Command::new(busybox).arg("xzcat").arg(path))?
    } else {
        fs::read(path)?
    };
    for needed in dependencies(&bytes) {
        add_module(&needed.replace('-', "_"), files, busybox, modules)?;
    }
    modules.push((name.to_owned(), bytes));
    Ok(())
}

/// A module names what it depends on in a string of its own, `depends=a,b`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_compares_numbers_and_keeps_to_the_series() {
        let names = "linux-image-6.1.0-9-cloud-amd64\nlinux-image-6.1.0-56-cloud-amd64\n\
                     linux-image-6.1.0-57-amd64\nlinux-image-6.12.9+deb12-cloud-amd64\n\
                     linux-image-6.12.117+deb12-cloud-amd64";
        let of = |series| newest(series, names);
        assert_eq!(of("6.1").unwrap(), "linux-image-6.1.0-56-cloud-amd64");
        assert_eq!(
            of("6.12").unwrap(),
            "linux-image-6.12.117+deb12-cloud-amd64"
        );
        assert_eq!(of("6.6"), None);
    }

    #[test]
    fn dependencies_are_read_from_the_module() {
        assert_eq!(dependencies(b"x\0depends=stp,llc\0y"), ["stp", "llc"]);
        assert!(dependencies(b"x\0depends=\0y").is_empty());
        assert!(dependencies(b"no module").is_empty());
    }
}
