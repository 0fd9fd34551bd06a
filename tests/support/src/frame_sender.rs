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

    /// Sends one frame so many times, by as few system calls as that takes.
    ///
    /// # Errors
    /// As [`FrameSender::send`].
    pub fn send_times(&self, frame: &[u8], times: usize) -> Result<(), StageError> {
        let bytes = libc::iovec {
            // Only read from.
            iov_base: frame.as_ptr().cast_mut().cast(),
            iov_len: frame.len(),
        };
        // SAFETY: mmsghdr is plain data, for which all zeroes is a valid value.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = (&raw const bytes).cast_mut();
        message.msg_hdr.msg_iovlen = 1;
        // The kernel takes no more by one call.
        let mut messages = vec![message; times.min(1024)];
        let mut left = times;
        while left > 0 {
            let count = left.min(messages.len());
            // SAFETY: there are `count` messages, each of which points to `bytes`, and both outlive the call.
            let sent = unsafe {
                libc::sendmmsg(
                    self.socket.as_raw_fd(),
                    messages.as_mut_ptr(),
                    count as libc::c_uint,
                    0,
                )
            };
            match usize::try_from(sent) {
                Ok(sent) => left -= sent.min(left),
                Err(_) => return Err(failed("send on", &self.interface)(nix::Error::last())),
            }
        }
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
