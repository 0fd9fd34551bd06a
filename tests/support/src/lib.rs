//! A stage for tests and for the demo: network namespaces, taps, veth pairs, captures, raw frames
//! and processes that do not outlive their owner.
//!
//! Everything here needs root. Everything is removed when it is dropped, so that a test that fails
//! half-way leaves no interface, namespace or process behind.

mod bare_guest;
mod capture;
mod cgroup;
mod error;
mod frame_sender;
mod grip;
mod injector;
mod interface;
mod namespace;
mod orphans;
mod process;
mod tap;
mod veth;

pub use bare_guest::{CHATTER, IDLE, PANIC, POWER_OFF, RESET, write_bare_guest};
pub use capture::{Capture, CapturedFrame, Travel};
pub use cgroup::Cgroup;
pub use error::StageError;
pub use frame_sender::FrameSender;
pub use grip::Grip;
pub use injector::Injector;
pub use interface::{bring_up, index_of, ip, mac_of};
pub use namespace::Namespace;
pub use orphans::Orphans;
pub use process::Process;
pub use tap::Tap;
pub use veth::Veth;
