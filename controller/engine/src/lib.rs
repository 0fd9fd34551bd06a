//! The state of guests and of their rogue traffic: events in, actions out.
//!
//! The engine does no I/O and reads no clock: [`Engine::handle`] is told what happened and when,
//! and answers what to do. Whoever executes the actions tells the engine how they went.
#![forbid(unsafe_code)]

mod action;
mod agent;
mod attempt;
mod cause;
mod console;
mod engine;
mod event;
mod frame;
mod guest;
mod monotonic;
mod policy;
mod silence;
mod state;
mod tally;
mod threshold;
mod transition;
mod tunnel;

pub use action::{Action, Ending, Record, Refusal};
pub use agent::AgentReport;
pub use attempt::{Attempt, GuestNetwork, Inference, Target};
pub use cause::Cause;
pub use console::ConsoleReport;
pub use engine::{ENDED_KEPT, Engine};
pub use event::{Event, Fate, Found, GuestEvent, GuestId};
pub use frame::{Incident, RogueFrame};
pub use guest::Guest;
pub use monotonic::Monotonic;
pub use policy::{OnViolation, OnViolationParseError};
pub use silence::OnSilence;
pub use state::GuestState;
pub use threshold::{MOST_FRAMES, MOST_SECONDS, Threshold, ThresholdError, Thresholds};
pub use tunnel::{Freshness, Tunnel, TunnelReport, Witness};
