//! Paused → Guarded → Running, each a type, each owning all that exists of the guest.

mod adopted;
mod agent_watch;
mod attaching;
mod control;
mod ended;
mod guarded;
mod logs;
mod machine;
mod paused;
mod prepared;
mod rounds;
mod running;
mod watcher;

pub use adopted::{Traces, Unwound, unwind};
pub use control::Control;
pub use ended::Ended;
pub use guarded::Guarded;
pub use paused::Paused;
pub use prepared::Prepared;
pub use running::Running;
pub use watcher::GuestEvent;
