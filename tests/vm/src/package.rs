//! Packages of the distribution, downloaded and verified by apt-get, unpacked and not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

/// The files of `package`, below `cache`.
pub fn unpacked(package: &str, cache: &Path) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let root = cache.join(package);
    if root.exists() {
        return Ok(root);
    }
    let work = cache.join(format!("{package}.part"));
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    if !download(package, &work) {
        // Lists older than the archive name files that are gone.
        run(Command::new("apt-get").args(["-qq", "update"]))?;
        if !download(package, &work) {
            bail!("apt-get cannot download {package}: check /etc/apt/sources.list and the network");
        }
    }
    let archive = fs::read_dir(&work)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ending| ending == "deb"))
        .with_context(|| format!("apt-get left no {package} in {}", work.display()))?;
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&work))?;
    fs::remove_file(&archive)?;
    fs::rename(&work, &root).with_context(|| format!("cannot make {}", root.display()))?;
    Ok(root)
}

fn download(package: &str, directory: &Path) -> bool {
    Command::new("apt-get")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(directory)
        .output()
        .is_ok_and(|output| output.status.success())
}

/// What the command prints, or why it failed.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{name} failed: {}",
            complaint.lines().last().unwrap_or_default()
        );
    }
    Ok(output.stdout)
}
