//! Runs the real `omerta`: what it prints, how it ends, and what it leaves behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod capture;
mod console;
mod daemon;
mod doctor;
mod fence;
mod guard;
mod guard_refusals;
mod image;
mod incident;
mod manual;
mod memory;
mod omertad;
mod peer;
mod run;
mod upgrade;
mod usage;
mod watch;
