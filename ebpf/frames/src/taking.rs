//! Keeping an interface's frames from the stack.

use std::os::fd::OwnedFd;

use nix::net::if_::if_nametoindex;

use crate::{FramesError, bpf};

/// The index of `interface`.
pub fn ifindex(interface: &str) -> Result<u32, FramesError> {
    if_nametoindex(interface).map_err(FramesError::system("find", interface))
}

/// While it lives, the stack gets nothing that the interface receives; the programs that were on the
/// hook before it, a guard's too, judge and count as ever.
#[derive(Debug)]
pub struct BlockedStack {
    _link: OwnedFd,
}

impl BlockedStack {
    /// Blocks the stack behind `interface`.
    pub fn behind(interface: &str) -> Result<Self, FramesError> {
        let link = bpf::drop_all(ifindex(interface)?)
            .map_err(FramesError::system("keep the stack from", interface))?;
        Ok(Self { _link: link })
    }
}
