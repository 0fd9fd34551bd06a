//! Which omertad answers.

use serde::{Deserialize, Serialize};

/// Answer of `GET /v1/version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// The daemon's process id.
    pub pid: u32,
    /// How guests are accelerated: `kvm` or `tcg`.
    pub accel: String,
    /// Why that acceleration was chosen.
    pub accel_why: String,
    /// On which of QEMU's machines the kernel that was tried last runs, and why.
    pub machine_why: String,
}
