//! The wire types of omertad's API: HTTP/1.1 with JSON bodies on a unix socket.
//!
//! Requests refuse unknown fields; answers may gain fields in later versions, so readers of
//! answers ignore what they do not know. `openapi.yaml` beside this crate describes the same API
//! and a test holds the two together.
#![forbid(unsafe_code)]

mod error;
mod event;
mod guest;
mod peer;
pub mod route;
mod secret_text;
mod version;

pub use error::{ApiError, ErrorKind};
pub use event::{Event, EventsQuery, Occurrence};
pub use guest::{
    Ended, Guest, GuestLimits, GuestList, GuestsQuery, Limits, RunRequest, StopRequest,
};
pub use omerta_engine::{Cause, Freshness, GuestState, OnSilence, OnViolation, Witness};
pub use peer::{Peer, PeerList, PeerRequest, PeerTunnel};
pub use secret_text::SecretText;
pub use version::Version;
