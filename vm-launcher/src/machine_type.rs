//! The machine that QEMU emulates around a guest.

use std::fmt;
use std::str::FromStr;

/// A machine of QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineType {
    /// What every kernel for PCs runs on.
    Q35,
    /// A small machine without a chipset, with PCI Express for the same devices. It comes up sooner.
    /// Of the clocks of old PCs it has the interval timer alone, by which an emulated kernel on a busy
    /// host does not find its speed, and then hangs: it is for KVM, which gives kernels a clock.
    Microvm,
}

impl MachineType {
    /// The word that the configuration and QEMU use.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    /// The machine as QEMU's option, with nothing on it that guests do not need.
    pub(crate) const fn argument(self) -> &'static str {
        match self {
            Self::Q35 => "q35,usb=off,vmport=off",
            Self::Microvm => "microvm,acpi=on,pcie=on,rtc=on,isa-serial=on,usb=off",
        }
    }
}

impl fmt::Display for MachineType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that names no machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no machine: write auto, q35 or microvm", .0.escape_default())]
pub struct MachineTypeError(String);

impl FromStr for MachineType {
    type Err = MachineTypeError;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "q35" => Ok(Self::Q35),
            "microvm" => Ok(Self::Microvm),
            other => Err(MachineTypeError(other.to_owned())),
        }
    }
}
