//! What is known when a guest is gone.

use crate::ExitStatus;

/// A guest that is no more: QEMU reaped, guard detached, tap and run directory removed, save what
/// [`Ended::leftovers`] lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How QEMU ended; `None` if it could not be found out.
    pub status: Option<ExitStatus>,
    /// When QEMU was gone: CLOCK_MONOTONIC, in nanoseconds.
    pub ended_at_ns: u64,
    /// When the tap was gone: CLOCK_MONOTONIC, in nanoseconds.
    pub tap_removed_at_ns: u64,
    /// What could not be removed and why, one line each; empty when all went well.
    pub leftovers: Vec<String>,
}
