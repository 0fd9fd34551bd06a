//! The state of guests and of their rogue traffic: events in, actions out.
#![forbid(unsafe_code)]

mod cause;
mod policy;
mod state;

pub use cause::Cause;
pub use policy::{OnViolation, OnViolationParseError};
pub use state::GuestState;
