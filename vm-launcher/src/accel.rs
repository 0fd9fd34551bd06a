//! Which accelerator works here. `/dev/kvm` can open, and even create virtual machines, and still
//! hang every guest, so the only proof is a guest that ran.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;
use tokio::time::timeout;

use crate::Accel;
use crate::command::{QEMU, SANDBOX};
use crate::memory_file::MemoryFile;

/// How long the probe guest may take; where KVM works it needs a few tenths of a second.
const DEADLINE: Duration = Duration::from_secs(3);

/// What the probe guest writes to the exit port; QEMU then exits with twice that plus one.
const EXIT_VALUE: u8 = 0x2a;
const EXIT_CODE: i32 = EXIT_VALUE as i32 * 2 + 1;

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccelReport {
    /// What to run guests with.
    pub accel: Accel,
    /// Why, in one line.
    pub why: String,
}

/// Finds out whether KVM runs a guest here, and falls back to TCG if not. Takes at most a few
/// seconds; ask once and keep the answer.
pub async fn probe_accel() -> AccelReport {
    let tcg = |why: String| AccelReport {
        accel: Accel::Tcg,
        why: format!("{why}; emulating (TCG)"),
    };
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return tcg(format!("/dev/kvm cannot be opened ({error})"));
    }
    let started = Instant::now();
    match run_probe(Accel::Kvm, DEADLINE).await {
        Ok(Outcome::Ran) => AccelReport {
            accel: Accel::Kvm,
            why: format!(
                "KVM ran a test guest in {} ms",
                started.elapsed().as_millis()
            ),
        },
        Ok(Outcome::Hung) => tcg(format!(
            "/dev/kvm opens but a test guest did not get through its firmware in {} s",
            DEADLINE.as_secs()
        )),
        Ok(Outcome::Failed(said)) => tcg(format!("KVM does not run guests here ({said})")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tcg(format!("KVM could not be tried: {QEMU} is not installed"))
        }
        Err(error) => tcg(format!("KVM could not be tried ({error})")),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Ran,
    Hung,
    Failed(String),
}

/// Boots the probe guest: SeaBIOS, QEMU's multiboot loader, then our few instructions.
async fn run_probe(accel: Accel, deadline: Duration) -> io::Result<Outcome> {
    let kernel = MemoryFile::copy_of(probe_kernel().as_slice(), c"omerta-probe")?;
    let child = Command::new(QEMU)
        .args(arguments(accel, &kernel.path()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let Ok(output) = timeout(deadline, child.wait_with_output()).await else {
        return Ok(Outcome::Hung);
    };
    let output = output?;
    if output.status.code() == Some(EXIT_CODE) {
        return Ok(Outcome::Ran);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said
        .lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(200)
        .collect::<String>();
    Ok(Outcome::Failed(
        match (said.is_empty(), output.status.signal()) {
            (false, _) => said,
            (true, Some(signal)) => format!("{QEMU} died of signal {signal}"),
            (true, None) => format!("{QEMU} ended with {}", output.status),
        },
    ))
}

fn arguments(accel: Accel, kernel: &Path) -> Vec<OsString> {
    let cpu = match accel {
        Accel::Kvm => "host",
        Accel::Tcg => "max",
    };
    [
        "-no-user-config",
        "-nodefaults",
        "-sandbox",
        SANDBOX,
        "-machine",
        "q35",
        "-accel",
        accel.word(),
        "-cpu",
        cpu,
        "-m",
        "32M",
        "-display",
        "none",
        "-no-reboot",
        "-device",
        "isa-debug-exit,iobase=0x501,iosize=4",
        "-kernel",
    ]
    .into_iter()
    .map(OsString::from)
    .chain([kernel.into()])
    .collect()
}

/// A multiboot kernel (Multiboot Specification 0.6.96, section 3.1, address fields) whose whole
/// program is to write [`EXIT_VALUE`] to port 0x501.
fn probe_kernel() -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const MAGIC: u32 = 0x1bad_b002;
    const ADDRESSES_GIVEN: u32 = 1 << 16;
    const HEADER_BYTES: u32 = 32;
    let program = [
        0xba, 0x01, 0x05, 0x00, 0x00, // mov edx, 0x501
        0xb0, EXIT_VALUE, // mov al, EXIT_VALUE
        0xee,       // out dx, al
        0xf4,       // hlt
        0xeb, 0xfd, // jmp to the hlt
    ];
    let end = LOAD + HEADER_BYTES + program.len() as u32;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES_GIVEN);
    let header = [
        MAGIC,
        ADDRESSES_GIVEN,
        checksum,
        LOAD,
        LOAD,
        end,
        end,
        LOAD + HEADER_BYTES,
    ];
    let mut kernel: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.extend_from_slice(&program);
    kernel
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The probe's guest must itself be sound, or a hang would prove nothing of KVM.
    #[tokio::test]
    async fn the_probe_guest_runs_where_a_guest_can_run() {
        let outcome = run_probe(Accel::Tcg, Duration::from_secs(60)).await;
        assert_eq!(outcome.unwrap(), Outcome::Ran);
    }

    #[tokio::test]
    async fn a_guest_that_does_not_get_through_in_time_is_reported_as_hung() {
        let outcome = run_probe(Accel::Tcg, Duration::from_millis(1)).await;
        assert_eq!(outcome.unwrap(), Outcome::Hung);
    }
}
