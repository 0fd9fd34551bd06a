//! Runs one guest under QEMU, from a validated [`Spec`] to nothing left behind.
//!
//! The lifecycle is a typestate: [`Paused`] (QEMU exists, no instruction has run, the tap is
//! down) → [`Guarded`] (the guard is attached, verified and proven by a canary frame, the tap is
//! up) → [`Running`]. Only [`Guarded`] can resume a guest, so a guest that was never guarded
//! cannot run. Whatever fails, and also when a future is dropped half-way, everything made so far
//! is undone in reverse order: QEMU killed and reaped, guard detached, tap closed, files removed.
//!
//! Everything happens in the network namespace of the calling thread. QEMU itself runs in a jail:
//! its only ways out are the descriptors that it is given.

mod accel;
mod canary;
mod clock;
mod command;
mod console_log;
mod console_watch;
mod control_port;
mod disk;
mod error;
mod guard_alarm;
mod guest_name;
mod host_look;
mod image;
mod jail;
mod lifecycle;
mod link_watch;
mod lock_file;
mod machine_type;
mod memory_file;
mod process;
mod qmp;
mod qmp_lines;
mod run_dir;
mod seed;
mod spec;
mod ssh_public_key;
mod standstill;
mod tap;

pub use accel::{AccelReport, KernelProbe, MicrovmProbe, probe_accel, probe_kernel, probe_microvm};
pub use canary::CanaryError;
pub use console_log::ConsoleLog;
pub use console_watch::ConsoleReport;
pub use control_port::{ControlPort, GuestTunnel, Report};
pub use disk::{DiskError, LayerSpec, Scrubbed};
pub use error::LaunchError;
pub use guest_name::{GuestName, GuestNameError};
pub use host_look::{HostLook, Whereabouts};
pub use image::{Image, ImageError, Stored, StoredDisk};
pub use jail::{
    Jail, JailError, Part, PartError, Step, UidRange, UidRangeError, lacking_parts, qemu_program,
    sweep_jails,
};
pub use lifecycle::{
    Control, Ended, Guarded, GuestEvent, Paused, Prepared, Running, Traces, Unwound, unwind,
};
pub use lock_file::{LockError, LockFile, PathError};
pub use machine_type::{MachineType, MachineTypeError};
pub use omerta_agent::heartbeat::{Finding as AgentFinding, Timing as AgentTiming};
pub use omerta_agent::message::{Changes as AgentChanges, Key as AgentKey};
pub use omerta_tunnel::{PublicKey as WgPublicKey, PublicKeyError as WgPublicKeyError};
pub use process::{ExitStatus, ProcessError, begin_to_spawn};
pub use qmp::{Found, QmpError};
pub use run_dir::RunDirError;
pub use spec::{Accel, Consumer, Spec, SpecError, Tunnel};
pub use ssh_public_key::{SshPublicKey, SshPublicKeyError};
pub use tap::TapError;
