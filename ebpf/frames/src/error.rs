//! What can go wrong.

use std::io;

use thiserror::Error;

/// Why frames cannot be read.
#[derive(Debug, Error)]
pub enum FramesError {
    /// The kernel refused.
    #[error("cannot {action} {interface}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The interface.
        interface: String,
        /// Why not.
        source: io::Error,
    },
    /// AF_XDP could not be set up.
    #[error("cannot set AF_XDP up on {interface}: {why}")]
    AfXdp {
        /// The interface.
        interface: String,
        /// What it said.
        why: String,
    },
    /// A measurement went wrong.
    #[error("{back_end:?} gave {got} of {sent} frames back when it was measured")]
    Lost {
        /// What was measured.
        back_end: crate::BackEnd,
        /// Frames that came.
        got: usize,
        /// Frames that were sent.
        sent: usize,
    },
}

impl FramesError {
    pub(crate) fn system<E: Into<io::Error>>(
        action: &'static str,
        interface: &str,
    ) -> impl FnOnce(E) -> Self {
        let interface = interface.to_owned();
        move |source| Self::System {
            action,
            interface,
            source: source.into(),
        }
    }

    pub(crate) fn xdp(interface: &str, why: impl ToString) -> Self {
        Self::AfXdp {
            interface: interface.to_owned(),
            why: why.to_string(),
        }
    }
}
