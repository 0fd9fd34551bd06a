//! Loads the guard's programs, attaches them to one interface, keeps its policy and reads its
//! counters and events.
//!
//! Everything that a guard is lives in the kernel and is pinned under bpffs, so it outlives the
//! process that made it: [`Guard`] is a handle, and dropping it changes nothing. All functions
//! act on the network namespace of the calling thread.

mod attach;
mod bank;
mod bpf;
mod bpffs;
mod btf;
mod buckets;
mod clsact;
mod config;
mod constants;
mod copies;
mod count;
mod counters;
mod diagnostics;
mod edit;
mod entry;
mod error;
mod events;
mod failure_line;
mod flows;
mod guard;
mod hold;
mod hook;
mod in_place;
mod interface;
mod layout;
mod lease;
mod lease_time;
mod link;
pub mod links;
mod living;
mod lock;
mod map;
mod netlink;
mod note_text;
mod notes;
mod object;
mod observer;
mod own;
mod owner;
mod pinned;
mod pins;
mod random;
mod redirect;
mod rules;
mod shared;
mod standing;
mod state;
mod status;
mod store;
mod upgrade;
mod uplink;
mod watch;

pub use bpffs::outer_process;
pub use config::{GuardConfig, Limits};
pub use copies::{Copies, Copy};
pub use counters::{Count, CounterReader, Counters, DirectionCounters};
pub use diagnostics::{Diagnostic, DiagnosticStream};
pub use error::{ErrorKind, GuardError};
pub use events::{EventStream, FrameEvent, describe};
pub use guard::{Guard, Inspection};
pub use hold::HeldGuard;
pub use hook::Hook;
pub use lease::Lease;
pub use lease_time::{LeaseTime, LeaseTimeError};
pub use object::Programs;
pub use observer::{Basis, Judgement, Observer};
pub use owner::{Owner, OwnerParseError};
pub use pinned::PinnedGuard;
pub use redirect::RedirectStatus;
pub use rules::MAX_ENDPOINTS;
pub use shared::Prepared;
pub use standing::Standing;
pub use status::{DirectionLimits, DirectionStatus, GuardStatus};
pub use store::PolicyStore;
pub use upgrade::Counting;
pub use uplink::{AtUplink, Uplink, UplinkHook};
pub use watch::{GuardWatch, Occasions};
