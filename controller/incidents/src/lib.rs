//! The record of incidents: who did what, who saw it, what was done and how long that took.
//!
//! A directory of segments, each a file of lines of JSON ([`Entry`]). Every line holds the SHA-256 of the
//! line before it, so that no byte of any but the last can change, no line can go and no two change places
//! without [`verify`] seeing it; the file `head` holds number and hash of the last. When the record has
//! become too long its oldest segment goes, and a line says up to which number and with which hash.
//!
//! No key is in it: whoever may write the directory can write another record. Keep the hash that
//! `omerta incident verify` prints elsewhere, and what was recorded up to it is certain.
#![forbid(unsafe_code)]

mod book;
mod chain;
mod entry;
mod read;

pub use book::{Book, BookError, Bounds};
pub use chain::{Digest, DigestParseError};
pub use entry::{Deed, Entry, Frame, Incident, Outcome, What, Witness};
pub use read::{Fault, Problem, Verified, read, verify};
