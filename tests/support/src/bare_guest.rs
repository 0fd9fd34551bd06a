//! Guests of a few instructions, which QEMU boots in an instant.

use std::path::Path;
use std::{fs, io};

/// Instructions after which a processor does nothing more, interrupts being off.
pub const IDLE: &[u8] = &[0xf4, 0xeb, 0xfd];
/// Resets the machine by the chipset's reset register.
pub const RESET: &[u8] = &[0xba, 0xf9, 0x0c, 0, 0, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd];
/// Reports a panic by pvpanic's port.
pub const PANIC: &[u8] = &[0xba, 0x05, 0x05, 0, 0, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd];
/// Turns the power off by ACPI's PM1a control register.
pub const POWER_OFF: &[u8] = &[
    0xba, 0x04, 0x06, 0, 0, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, 0xf4, 0xeb, 0xfd,
];
/// Writes `A` to the serial console without end.
pub const CHATTER: &[u8] = &[0xba, 0xf8, 0x03, 0, 0, 0xb0, 0x41, 0xee, 0xeb, 0xfd];

/// Makes `directory` a guest image whose kernel is `program` and nothing else.
///
/// # Errors
/// Where it cannot be written.
pub fn write_bare_guest(directory: &Path, program: &[u8]) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    fs::write(directory.join("vmlinuz"), multiboot(program))?;
    fs::write(directory.join("initrd.img"), b"none")
}

/// A multiboot kernel (Multiboot Specification 0.6.96, 3.1.3).
fn multiboot(program: &[u8]) -> Vec<u8> {
    let load = 0x10_0000u32;
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let end = load + 32 + program.len() as u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let header = [magic, flags, checksum, load, load, end, end, load + 32];
    let mut kernel: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.extend_from_slice(program);
    kernel
}
