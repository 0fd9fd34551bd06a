//! The agent in a guest tells its host, every few seconds and by a key of its own, that it is alive and that
//! firewall, routes and tunnel are what they were when it started. This library is the protocol, for both
//! sides; the program is the guest's.
//!
//! A guest is its consumer's, who may be root in it and do what he likes: what an agent says proves that
//! whoever has its key says so. That it falls silent, comes twice or says something else is what the host
//! acts on.

pub mod heartbeat;
pub mod message;
