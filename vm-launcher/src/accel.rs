//! Which accelerator works here. `/dev/kvm` can open, create virtual machines and run a few
//! instructions, and still stop every real guest at an instruction that its host cannot carry out,
//! so the only proof is a kernel that booted.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

use crate::Accel;
use crate::command::{QEMU, SANDBOX};
use crate::image::{Image, ImageError};
use crate::memory_file::MemoryFile;

/// How long the probe guest may take; where KVM works it needs a few tenths of a second.
const DEADLINE: Duration = Duration::from_secs(3);
/// How long a kernel may take to find that it has no root. One that is no Linux never does.
const KERNEL_DEADLINE: Duration = Duration::from_secs(4);

/// What the probe guest writes to the exit port; QEMU then exits with twice that plus one.
const EXIT_VALUE: u8 = 0x2a;
const EXIT_CODE: i32 = EXIT_VALUE as i32 * 2 + 1;

/// How QEMU begins to say that KVM gave up on a guest (accel/kvm/kvm-all.c). The guest then stands
/// still for good.
const GAVE_UP: &str = "KVM internal error";

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccelReport {
    /// What to run guests with.
    pub accel: Accel,
    /// Why, in one line.
    pub why: String,
}

impl AccelReport {
    fn tcg(why: &str) -> Self {
        Self {
            accel: Accel::Tcg,
            why: format!("{why}; emulating (TCG)"),
        }
    }
}

/// Finds out whether KVM runs a guest here, and falls back to TCG if not. Takes at most a few
/// seconds; ask once and keep the answer. [`probe_kernel`] then asks the same of a real kernel.
pub async fn probe_accel() -> AccelReport {
    let tcg = |why: String| AccelReport::tcg(&why);
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return tcg(format!("/dev/kvm cannot be opened ({error})"));
    }
    let started = Instant::now();
    match run_tiny(Accel::Kvm, DEADLINE).await {
        Ok(Outcome::Exited(status, _)) if status.code() == Some(EXIT_CODE) => AccelReport {
            accel: Accel::Kvm,
            why: format!(
                "KVM ran a test guest in {} ms",
                started.elapsed().as_millis()
            ),
        },
        Ok(Outcome::StillRuns) => tcg(format!(
            "/dev/kvm opens but a test guest did not get through its firmware in {} s",
            DEADLINE.as_secs()
        )),
        Ok(Outcome::GaveUp(said)) => tcg(format!("KVM does not run guests here ({said})")),
        Ok(Outcome::Exited(status, said)) => tcg(format!(
            "KVM does not run guests here ({})",
            end(status, &said)
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tcg(format!("KVM could not be tried: {QEMU} is not installed"))
        }
        Err(error) => tcg(format!("KVM could not be tried ({error})")),
    }
}

/// Boots the image's kernel under KVM, without a root, and tells what to use instead where KVM does
/// not run it: `None` where it does, or where nothing speaks against it (a kernel that is no Linux
/// does not end by itself). Takes under a second where KVM works, 4 s at most.
///
/// # Errors
/// When the kernel cannot be read.
pub async fn probe_kernel(image: &Image) -> Result<Option<AccelReport>, ImageError> {
    let kernel = image.copy_kernel()?;
    let why = match run(kernel_arguments(&kernel.path()), KERNEL_DEADLINE).await {
        Ok(Outcome::StillRuns) => return Ok(None),
        Ok(Outcome::Exited(status, _)) if status.success() => return Ok(None),
        Ok(Outcome::Exited(status, said)) => end(status, &said),
        Ok(Outcome::GaveUp(said)) => said,
        Err(error) => error.to_string(),
    };
    let kernel = image.kernel.display();
    Ok(Some(AccelReport::tcg(&format!(
        "KVM runs a few instructions but not {kernel} ({why})"
    ))))
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// QEMU ended, and the first line it printed.
    Exited(ExitStatus, String),
    /// KVM gave up, in QEMU's words.
    GaveUp(String),
    StillRuns,
}

fn end(status: ExitStatus, said: &str) -> String {
    match (said.is_empty(), status.signal()) {
        (false, _) => said.to_owned(),
        (true, Some(signal)) => format!("{QEMU} died of signal {signal}"),
        (true, None) => format!("{QEMU} ended with {status}"),
    }
}

/// Boots the probe guest: SeaBIOS, QEMU's multiboot loader, then our few instructions.
async fn run_tiny(accel: Accel, deadline: Duration) -> io::Result<Outcome> {
    let kernel = MemoryFile::copy_of(tiny_kernel().as_slice(), c"omerta-probe")?;
    run(tiny_arguments(accel, &kernel.path()), deadline).await
}

async fn run(arguments: Vec<OsString>, deadline: Duration) -> io::Result<Outcome> {
    let mut child = Command::new(QEMU)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let said = child.stderr.take();
    let watched = async {
        let first = match said {
            Some(said) => match hear(said).await? {
                Heard::GaveUp(line) => return Ok(Outcome::GaveUp(line)),
                Heard::End(first) => first,
            },
            None => String::new(),
        };
        Ok(Outcome::Exited(child.wait().await?, first))
    };
    timeout(deadline, watched)
        .await
        .unwrap_or(Ok(Outcome::StillRuns))
}

enum Heard {
    /// The line that says so.
    GaveUp(String),
    /// Nothing more follows; the first line.
    End(String),
}

/// Reads what QEMU prints until it says that KVM gave up, or ends.
async fn hear(said: impl AsyncRead + Unpin) -> io::Result<Heard> {
    let mut lines = BufReader::new(said).lines();
    let mut first = None;
    while let Some(line) = lines.next_line().await? {
        let line: String = line.chars().filter(|c| !c.is_control()).take(200).collect();
        if line.starts_with(GAVE_UP) {
            return Ok(Heard::GaveUp(line));
        }
        first.get_or_insert(line);
    }
    Ok(Heard::End(first.unwrap_or_default()))
}

fn common_arguments(accel: Accel) -> Vec<OsString> {
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
        "-display",
        "none",
        "-no-reboot",
    ]
    .map(OsString::from)
    .into()
}

fn tiny_arguments(accel: Accel, kernel: &Path) -> Vec<OsString> {
    let own = [
        "-m",
        "32M",
        "-device",
        "isa-debug-exit,iobase=0x501,iosize=4",
        "-kernel",
    ];
    let mut arguments = common_arguments(accel);
    arguments.extend(own.map(OsString::from));
    arguments.push(kernel.into());
    arguments
}

/// A Linux that finds no root panics, and so reboots at once, which here ends QEMU.
fn kernel_arguments(kernel: &Path) -> Vec<OsString> {
    let own = ["-m", "256M", "-append", "panic=-1 quiet", "-kernel"];
    let mut arguments = common_arguments(Accel::Kvm);
    arguments.extend(own.map(OsString::from));
    arguments.push(kernel.into());
    arguments
}

/// A multiboot kernel (Multiboot Specification 0.6.96, section 3.1, address fields) whose whole
/// program is to write [`EXIT_VALUE`] to port 0x501.
fn tiny_kernel() -> Vec<u8> {
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
        let outcome = run_tiny(Accel::Tcg, Duration::from_secs(60)).await.unwrap();
        assert!(
            matches!(&outcome, Outcome::Exited(status, _) if status.code() == Some(EXIT_CODE)),
            "{outcome:?}"
        );
    }

    #[tokio::test]
    async fn a_guest_that_does_not_get_through_in_time_is_told_from_one_that_ended() {
        let outcome = run_tiny(Accel::Tcg, Duration::from_millis(1)).await;
        assert_eq!(outcome.unwrap(), Outcome::StillRuns);
    }

    /// What QEMU printed where KVM on a paravirtual host met an instruction that it does not emulate.
    #[tokio::test]
    async fn kvm_that_gives_up_on_a_guest_is_heard_while_qemu_runs_on() {
        let (mut qemu, said) = tokio::io::duplex(1024);
        let text =
            b"qemu: warning: \x1b[31mred\nKVM internal error. Suberror: 1\nemulation failure\n";
        tokio::io::AsyncWriteExt::write_all(&mut qemu, text)
            .await
            .unwrap();
        let heard = timeout(Duration::from_secs(60), hear(said)).await.unwrap();
        let Ok(Heard::GaveUp(line)) = heard else {
            panic!("not heard");
        };
        assert_eq!(line, "KVM internal error. Suberror: 1");
    }
}
