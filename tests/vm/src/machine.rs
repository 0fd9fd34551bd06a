//! One emulated machine, from power on to power off.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// No device but the serial console: the machine has no network that is not its own.
const ARGUMENTS: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-serial",
    "stdio",
    "-machine",
    "q35",
    "-accel",
    "tcg",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-m",
    "2G",
];
const KERNEL_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off";

/// Boots the kernel with the initramfs; all that it says on its console until it powers off, or
/// until `deadline`, when it is killed.
pub fn run(kernel: &Path, initramfs: &Path, deadline: Duration) -> Result<String> {
    let mut machine = Command::new("qemu-system-x86_64")
        .args(ARGUMENTS)
        .args(["-append", KERNEL_LINE])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run qemu-system-x86_64: run 'make setup'")?;
    let console = machine.stdout.take().context("QEMU has no console")?;
    let (sender, lines) = mpsc::channel();
    let reader = thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let end = Instant::now() + deadline;
    let mut said = String::new();
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                said += String::from_utf8_lossy(&line).trim_end();
                said.push('\n');
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                said += "vm: the machine hung and was stopped\n";
                let _ = machine.kill();
                break;
            }
        }
    }
    machine.wait().context("cannot wait for QEMU")?;
    drop(lines);
    let _ = reader.join();
    Ok(said)
}
