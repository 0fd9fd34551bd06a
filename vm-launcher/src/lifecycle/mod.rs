//! Paused → Guarded → Running, each a type, each owning all that exists of the guest.

mod control;
mod ended;
mod guarded;
mod machine;
mod paused;
mod running;
mod watcher;

pub use control::Control;
pub use ended::Ended;
pub use guarded::Guarded;
pub use paused::Paused;
pub use running::Running;
pub use watcher::GuestEvent;
