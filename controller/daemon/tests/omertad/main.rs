//! omertad as a process: how it starts, refuses, answers and ends. Needs root, as omertad does.
// Helpers outside of test functions may fail the test, too.
#![allow(clippy::unwrap_used, clippy::panic)]

mod agents;
mod api;
mod broken_rows;
mod connections;
mod daemon;
mod faults;
mod guests;
mod honest;
mod host_tunnel;
mod images;
mod incidents;
mod metrics;
mod names;
mod peers;
mod recovery;
mod red_team;
mod redirect;
mod start;
mod steering;
mod stuck;
mod uplink;
