//! How guards are put before a frame's way, by what the kernel has.

use std::io;

use aya::util::KernelVersion;

use crate::GuardError;

/// A kind of hook at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Links on TCX hooks (Linux 6.6 and later): they are pinned, follow their interface to other
    /// network namespaces, and take their place in the order of programs by themselves.
    Tcx,
    /// Filters of a clsact qdisc (Linux 5.15 to 6.5): the same verdicts, held by the interface.
    Clsact,
}

impl Hook {
    /// The hook that guards use on this kernel.
    ///
    /// # Errors
    /// Where the kernel is too old for either.
    pub fn of_this_kernel() -> Result<Self, GuardError> {
        Self::of(KernelVersion::current().ok()).ok_or_else(|| {
            let release = nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_else(|_| "unknown release".to_owned());
            GuardError::KernelTooOld { release }
        })
    }

    fn of(version: Option<KernelVersion>) -> Option<Self> {
        let version = version?;
        if version >= KernelVersion::new(6, 6, 0) {
            Some(Self::Tcx)
        } else if version >= KernelVersion::new(5, 15, 0) {
            Some(Self::Clsact)
        } else {
            None
        }
    }

    /// The word used in messages.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Tcx => "TCX",
            Self::Clsact => "clsact",
        }
    }
}

/// Whether the kernel knows TCX, for questions that it would otherwise not understand.
pub fn has_tcx() -> io::Result<bool> {
    Hook::of_this_kernel()
        .map(|hook| hook == Hook::Tcx)
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kernel_has_its_hook() {
        let of = |major, minor, patch| Hook::of(Some(KernelVersion::new(major, minor, patch)));
        assert_eq!(of(6, 6, 0), Some(Hook::Tcx));
        assert_eq!(of(7, 0, 0), Some(Hook::Tcx));
        assert_eq!(of(6, 5, 13), Some(Hook::Clsact));
        assert_eq!(of(5, 15, 0), Some(Hook::Clsact));
        assert_eq!(of(5, 14, 21), None);
        assert_eq!(of(2, 6, 78), None);
        assert_eq!(Hook::of(None), None);
    }
}
