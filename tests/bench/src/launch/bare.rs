//! The same QEMU command as a guest of omertad's has, run by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use omerta_test_support::ip;

use super::provider::Provider;

/// The tap of the bare guest, which is there before it.
const TAP: &str = "bare0";

/// What the guest image reads before it sets up its network.
const FACTS: &str = "hostname=bare
address=10.77.0.2
gateway=10.77.0.1
consumer_key=BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=
consumer_address=192.0.2.10
consumer_port=51820
tunnel_address=10.66.0.2/24
tunnel_peer=10.66.0.1
console=log
";

/// A command line that starts the guest without jail, guard or controller.
pub struct Bare<'a> {
    provider: &'a Provider,
    arguments: Vec<String>,
    directory: tempfile::TempDir,
}

impl<'a> Bare<'a> {
    /// As omertad has just started one of `image`, but that descriptors are paths and it does not wait.
    pub fn like(provider: &'a Provider, image: &str, memory_mib: u32) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a directory")?;
        let guest = provider.run(image, memory_mib)?;
        let proc = PathBuf::from(format!("/proc/{}", guest.qemu()?));
        let command = fs::read(proc.join("cmdline")).context("cannot read QEMU's command")?;
        // What QEMU was given of it is gone from its jail once it has started.
        let facts = directory.path().join("guest.conf");
        fs::write(&facts, FACTS).context("cannot write what the guest is told")?;
        let images = provider.images().join(image);
        let of = |file: &str| images.join(file).display().to_string();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let mut arguments = Vec::new();
        let mut words = command
            .split(|byte| *byte == 0)
            .skip(1)
            .map(|word| String::from_utf8_lossy(word).into_owned());
        while let Some(word) = words.next() {
            match word.as_str() {
                "" | "-S" => continue,
                "-add-fd" => {
                    words.next();
                    continue;
                }
                _ => {}
            }
            let word = word
                .replace("/boot/kernel", &of("vmlinuz"))
                .replace("/boot/initrd", &of("initrd.img"))
                .replace("/boot/guest.conf", &facts.display().to_string())
                .replace("/dev/fdset/1", &path("console.log"));
            let word = match word.split_once(",fd=") {
                Some((head, tail)) => {
                    let rest = tail.trim_start_matches(|c: char| c.is_ascii_digit());
                    if head.starts_with("tap,") {
                        format!("{head},ifname={TAP},script=no,downscript=no{rest}")
                    } else {
                        let id = head.rsplit_once("id=").map_or("socket", |(_, id)| id);
                        format!("{head},path={}{rest}", path(id))
                    }
                }
                None => word,
            };
            arguments.push(word);
        }
        provider.enter(|| -> Result<()> {
            // A tap from a former image may be there.
            let _ = ip(&format!("tuntap add dev {TAP} mode tap"));
            ip(&format!("link set {TAP} up"))?;
            Ok(())
        })??;
        Ok(Self {
            provider,
            arguments,
            directory,
        })
    }

    /// Starts one.
    pub fn start(&self) -> Result<BareGuest> {
        let log = self.directory.path().join("console.log");
        let _ = fs::remove_file(&log);
        let mut command: Command = self.provider.command("qemu-system-x86_64");
        let child = command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start QEMU")?;
        let qmp = self.directory.path().join("qmp");
        Ok(BareGuest { child, log, qmp })
    }
}

/// One that runs; killed on drop.
pub struct BareGuest {
    child: Child,
    log: PathBuf,
    qmp: PathBuf,
}

impl BareGuest {
    /// Where its console is written.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The socket of its monitor, once it listens.
    pub fn qmp(&self) -> &Path {
        &self.qmp
    }
}

impl Drop for BareGuest {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
