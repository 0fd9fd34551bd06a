//! What `make soak` does without end, and the tests for a moment.

pub mod parity;
mod storm;

pub use storm::{Storm, flip_without_end};
