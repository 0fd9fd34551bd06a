//! Which accelerator works here. `/dev/kvm` can open, create virtual machines and run a few
//! instructions, and still stop every real guest at an instruction that its host cannot carry out,
//! so the only proof is a kernel that booted.

use std::ffi::OsString;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use crate::command::{QEMU, SANDBOX};
use crate::error::report;
use crate::image::{Image, ImageError};
use crate::jail::kvm_groups;
use crate::memory_file::MemoryFile;
use crate::process::{ProcessError, QemuProcess};
use crate::{Accel, ExitStatus, MachineType};

/// How long the probe guest may take; where KVM works it needs a few tenths of a second.
const DEADLINE: Duration = Duration::from_secs(8);
/// How long a Linux may take to find that it has no root; where KVM works it needs a second.
const KERNEL_DEADLINE: Duration = Duration::from_secs(15);
/// The most that is read of what a probe prints, in bytes.
const MAX_SAID: usize = 256 << 10;

/// What the probe guest writes to the exit port; QEMU then exits with twice that plus one.
const EXIT_VALUE: u8 = 0x2a;
const EXIT_CODE: i32 = EXIT_VALUE as i32 * 2 + 1;

/// How QEMU begins to say that KVM gave up on a guest (accel/kvm/kvm-all.c). The guest then stands
/// still for good.
const GAVE_UP: &str = "KVM internal error";
/// What a Linux says that has come up far enough to look for its root.
const CAME_UP: &str = "Kernel panic - not syncing: VFS";
/// How a Linux lists a device of virtio's vendor on its PCI bus.
const VIRTIO: &str = ": [1af4:";

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
    // The probe is root, and guests' QEMUs are not.
    if let Err(error) = kvm_groups() {
        return tcg(error.to_string());
    }
    let started = Instant::now();
    match run_tiny(Accel::Kvm, DEADLINE).await {
        Ok(Outcome::Exited(ExitStatus::Code(EXIT_CODE), _)) => AccelReport {
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
        Ok(Outcome::Heard { line, .. }) => tcg(format!("KVM does not run guests here ({line})")),
        Ok(Outcome::Exited(status, said)) => tcg(format!(
            "KVM does not run guests here ({})",
            end(status, &said)
        )),
        Err(ProcessError::QemuMissing) => {
            tcg(format!("KVM could not be tried: {QEMU} is not installed"))
        }
        Err(error) => tcg(format!("KVM could not be tried ({})", report(&error))),
    }
}

/// What KVM makes of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelProbe {
    /// It came up.
    Runs,
    /// KVM does not run it: what to use instead, for this kernel and any other.
    Fails(AccelReport),
    /// It could not be found out, and why: this is no Linux, or QEMU did not start.
    Unknown(String),
}

/// What becomes of a kernel on [`MachineType::Microvm`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MicrovmProbe {
    /// It came up and found its devices.
    Runs,
    /// It does not come up or finds no devices, and how that showed.
    Fails(String),
}

/// Boots the image's kernel under KVM, without a root. Takes about a second where KVM works, 15 s at
/// most.
///
/// # Errors
/// When the kernel cannot be read.
pub async fn probe_kernel(image: &Image) -> Result<KernelProbe, ImageError> {
    let kernel = image.copy_kernel()?;
    if !is_linux(&kernel.path()) {
        return Ok(KernelProbe::Unknown("it is no Linux".to_owned()));
    }
    let arguments = kernel_arguments(MachineType::Q35, &kernel.path());
    let why = match run(&arguments, &[GAVE_UP, CAME_UP], KERNEL_DEADLINE).await {
        Ok(Outcome::Heard { line, .. }) if line.contains(CAME_UP) => return Ok(KernelProbe::Runs),
        Ok(Outcome::Heard { line, .. }) => line,
        Ok(Outcome::StillRuns) => {
            format!("it did not come up in {} s", KERNEL_DEADLINE.as_secs())
        }
        // A triple fault, which resets.
        Ok(Outcome::Exited(ExitStatus::Code(0), _)) => "it was reset before it came up".to_owned(),
        Ok(Outcome::Exited(status @ ExitStatus::Signal(_), said)) => end(status, &said),
        // It refuses the kernel, or lacks memory: that says nothing of KVM.
        Ok(Outcome::Exited(status, said)) => return Ok(KernelProbe::Unknown(end(status, &said))),
        Err(error) => return Ok(KernelProbe::Unknown(report(&error))),
    };
    let kernel = image.kernel.display();
    Ok(KernelProbe::Fails(AccelReport::tcg(&format!(
        "KVM runs a few instructions but not {kernel} ({why})"
    ))))
}

/// Whether the image's kernel comes up under KVM on [`MachineType::Microvm`] and finds what is on its
/// PCI bus. Takes as long as [`probe_kernel`].
///
/// # Errors
/// When the kernel cannot be read.
pub async fn probe_microvm(image: &Image) -> Result<MicrovmProbe, ImageError> {
    let kernel = image.copy_kernel()?;
    if !is_linux(&kernel.path()) {
        return Ok(MicrovmProbe::Fails("it is no Linux".to_owned()));
    }
    let arguments = kernel_arguments(MachineType::Microvm, &kernel.path());
    let why = match run(&arguments, &[GAVE_UP, CAME_UP], KERNEL_DEADLINE).await {
        Ok(Outcome::Heard { line, found_virtio }) if line.contains(CAME_UP) => {
            if found_virtio {
                return Ok(MicrovmProbe::Runs);
            }
            "it finds no virtio device".to_owned()
        }
        Ok(Outcome::Heard { line, .. }) => line,
        Ok(Outcome::Exited(status, said)) => end(status, &said),
        Ok(Outcome::StillRuns) => {
            format!("it did not come up in {} s", KERNEL_DEADLINE.as_secs())
        }
        Err(error) => report(&error),
    };
    Ok(MicrovmProbe::Fails(why))
}

/// Whether the file has the magic number of Linux's boot protocol
/// (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
fn is_linux(kernel: &Path) -> bool {
    let mut head = [0; 0x206];
    let read = std::fs::File::open(kernel).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && head.ends_with(b"HdrS")
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// QEMU ended, and the first line it printed.
    Exited(ExitStatus, String),
    /// The line that was listened for, and whether PCI's virtio devices were listed before it.
    Heard {
        line: String,
        found_virtio: bool,
    },
    StillRuns,
}

fn end(status: ExitStatus, said: &str) -> String {
    if said.is_empty() {
        format!("{QEMU} ended with {status}")
    } else {
        said.to_owned()
    }
}

/// Boots the probe guest: SeaBIOS, QEMU's multiboot loader, then our few instructions.
async fn run_tiny(accel: Accel, deadline: Duration) -> Result<Outcome, ProcessError> {
    let kernel = MemoryFile::copy_of(tiny_kernel().as_slice(), c"omerta-probe")
        .map_err(ProcessError::Spawn)?;
    run(&tiny_arguments(accel, &kernel.path()), &[GAVE_UP], deadline).await
}

/// Runs QEMU, confined as for a guest, until it prints one of `words`, ends, or `deadline` has passed.
/// Nothing of it is left.
async fn run(
    arguments: &[OsString],
    words: &[&str],
    deadline: Duration,
) -> Result<Outcome, ProcessError> {
    let (said, output) = io::pipe().map_err(ProcessError::Spawn)?;
    let said = pipe::Receiver::from_owned_fd(said.into()).map_err(ProcessError::Spawn)?;
    let process = QemuProcess::spawn_probe(arguments, output.into())?;
    let watched = async {
        match hear(said, words).await {
            Heard::Word { line, found_virtio } => Ok(Outcome::Heard { line, found_virtio }),
            Heard::End(first) => Ok(Outcome::Exited(process.wait().await?, first)),
        }
    };
    timeout(deadline, watched)
        .await
        .unwrap_or(Ok(Outcome::StillRuns))
}

enum Heard {
    /// The line with the word, and whether PCI's virtio devices were listed before it.
    Word { line: String, found_virtio: bool },
    /// Nothing more follows; the first line.
    End(String),
}

/// Reads what is printed until a line has one of `words`, or to the end. What is beyond
/// [`MAX_SAID`] is read and not looked at.
async fn hear(mut said: impl AsyncRead + Unpin, words: &[&str]) -> Heard {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = said.read(&mut buffer).await {
        let kept = length.min(MAX_SAID.saturating_sub(text.len()));
        text.extend_from_slice(buffer.get(..kept).unwrap_or_default());
        let lines = String::from_utf8_lossy(&text);
        let whole = lines.rfind('\n').and_then(|end| lines.get(..end));
        let found = whole
            .unwrap_or_default()
            .lines()
            .find(|line| words.iter().any(|word| line.contains(word)));
        if let Some(line) = found {
            return Heard::Word {
                line: printable(line),
                found_virtio: lines.contains(VIRTIO),
            };
        }
    }
    let lines = String::from_utf8_lossy(&text);
    Heard::End(printable(lines.lines().next().unwrap_or_default()))
}

fn printable(line: &str) -> String {
    line.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn common_arguments(accel: Accel, machine: MachineType) -> Vec<OsString> {
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
        machine.argument(),
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
    let mut arguments = common_arguments(accel, MachineType::Q35);
    arguments.extend(own.map(OsString::from));
    arguments.push(kernel.into());
    arguments
}

/// A Linux that finds no root panics, and so reboots at once, which here ends QEMU.
fn kernel_arguments(machine: MachineType, kernel: &Path) -> Vec<OsString> {
    let own = [
        "-m",
        "256M",
        "-serial",
        "stdio",
        "-device",
        "virtio-rng-pci",
        "-append",
        "console=ttyS0 panic=-1",
        "-kernel",
    ];
    let mut arguments = common_arguments(Accel::Kvm, machine);
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
        let expected = ExitStatus::Code(EXIT_CODE);
        assert!(
            matches!(&outcome, Outcome::Exited(status, _) if *status == expected),
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
        let hearing = hear(said, &[GAVE_UP]);
        let heard = timeout(Duration::from_secs(60), hearing).await.unwrap();
        let Heard::Word { line, found_virtio } = heard else {
            panic!("not heard");
        };
        assert_eq!(line, "KVM internal error. Suberror: 1");
        assert!(!found_virtio);
    }

    #[tokio::test]
    async fn a_flood_is_read_to_its_end_and_its_first_line_told() {
        let (mut qemu, said) = tokio::io::duplex(1024);
        let flood = async move {
            let mut text = b"first\n".to_vec();
            text.resize(2 * MAX_SAID, b'x');
            tokio::io::AsyncWriteExt::write_all(&mut qemu, &text)
                .await
                .unwrap();
        };
        let (heard, ()) = tokio::join!(hear(said, &[GAVE_UP]), flood);
        assert!(matches!(heard, Heard::End(line) if line == "first"));
    }

    /// An image that is at fault itself says nothing of KVM.
    #[tokio::test]
    async fn what_is_no_linux_is_not_tried() {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in [("vmlinuz", vec![7; 5000]), ("initrd.img", vec![0; 1])] {
            std::fs::write(directory.path().join(name), bytes).unwrap();
        }
        let image = Image::open(directory.path()).unwrap();
        let probe = probe_kernel(&image).await.unwrap();
        assert!(matches!(probe, KernelProbe::Unknown(_)), "{probe:?}");
    }
}
