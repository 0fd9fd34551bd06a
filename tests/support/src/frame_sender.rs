//! Frames sent as they are.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socket};

use crate::StageError;
use crate::interface::{failed, index_of};

/// Sends raw frames out of one interface, past the stack.
#[derive(Debug)]
pub struct FrameSender {
    interface: String,
    socket: OwnedFd,
}

impl FrameSender {
    /// Opens the way out of an interface of the current namespace; usable from any namespace then.
    ///
    /// # Errors
    /// Where there is no such interface, or without root.
    pub fn open(interface: &str) -> Result<Self, StageError> {
        let failed = |errno| failed("open a raw socket on", interface)(errno);
        let index = index_of(interface)?;
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(failed)?;
        // Protocol 0: the socket sends and never receives.
        bind_packet_socket(&socket, index, 0).map_err(failed)?;
        Ok(Self {
            interface: interface.to_owned(),
            socket,
        })
    }

    /// Sends one frame, Ethernet header included.
    ///
    /// # Errors
    /// Where the interface is down or gone, or the frame longer than its MTU allows.
    pub fn send(&self, frame: &[u8]) -> Result<(), StageError> {
        send(self.socket.as_raw_fd(), frame, MsgFlags::empty())
            .map_err(failed("send on", &self.interface))?;
        Ok(())
    }
}

/// Binds a packet socket to one interface, for frames of one EtherType.
pub(crate) fn bind_packet_socket(
    socket: &impl AsFd,
    index: u32,
    ethertype: u16,
) -> Result<(), nix::Error> {
    // SAFETY: sockaddr_ll is plain data, for which all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex = i32::try_from(index).map_err(|_| nix::Error::EINVAL)?;
    // SAFETY: the address is a whole sockaddr_ll of the length given, and outlives the call.
    let answer = unsafe {
        libc::bind(
            socket.as_fd().as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if answer < 0 {
        Err(nix::Error::last())
    } else {
        Ok(())
    }
}
