//! AF_PACKET, read by `recvmmsg`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt::RcvBufForce,
};

use crate::taking::ifindex;
use crate::{BATCH, FramesError};

/// 64 KiB and an Ethernet header with a VLAN tag.
const LONGEST_FRAME: usize = 65_536 + 18;
/// Room for what arrives between two reads, in bytes.
const BACKLOG: usize = 16 << 20;
/// `PACKET_IGNORE_OUTGOING` (include/uapi/linux/if_packet.h, Linux 4.20).
const IGNORE_OUTGOING: libc::c_int = 23;

/// A socket that gets a copy of what one interface receives.
#[derive(Debug)]
pub struct PacketSocket {
    interface: String,
    socket: OwnedFd,
    /// [`BATCH`] frames. Only what was written of it takes memory.
    frames: Vec<u8>,
}

impl PacketSocket {
    pub fn open(interface: &str) -> Result<Self, FramesError> {
        let index = ifindex(interface)?;
        // Protocol 0 receives nothing until the socket is bound to its one interface.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .map_err(FramesError::system("capture on", interface))?;
        setsockopt(&socket, RcvBufForce, &BACKLOG)
            .map_err(FramesError::system("make room for frames of", interface))?;
        let one: libc::c_int = 1;
        // SAFETY: the kernel reads an int, which outlives the call.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                IGNORE_OUTGOING,
                (&raw const one).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        nix::Error::result(done)
            .map_err(FramesError::system("leave out what is sent by", interface))?;
        // SAFETY: all zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as libc::c_int;
        // SAFETY: the kernel reads the address, whose length is given and which outlives the call.
        let done = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        nix::Error::result(done).map_err(FramesError::system("capture on", interface))?;
        Ok(Self {
            interface: interface.to_owned(),
            socket,
            frames: vec![0; BATCH * LONGEST_FRAME],
        })
    }

    pub fn read(&mut self, mut each: impl FnMut(&[u8])) -> Result<usize, FramesError> {
        // SAFETY: all zero is a valid value of both: no buffers, no addresses.
        let (mut parts, mut messages): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        for ((part, message), frame) in parts
            .iter_mut()
            .zip(&mut messages)
            .zip(self.frames.chunks_exact_mut(LONGEST_FRAME))
        {
            part.iov_base = frame.as_mut_ptr().cast();
            part.iov_len = frame.len();
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: each message names one buffer of its own, as long as it says; buffers, parts and
        // messages outlive the call, and nothing else uses them meanwhile.
        let count = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        let count = match nix::Error::result(count) {
            Ok(count) => count as usize,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => 0,
            Err(errno) => {
                return Err(FramesError::system("read the frames of", &self.interface)(
                    errno,
                ));
            }
        };
        for (message, frame) in messages
            .iter()
            .zip(self.frames.chunks_exact(LONGEST_FRAME))
            .take(count)
        {
            each(frame.get(..message.msg_len as usize).unwrap_or(frame));
        }
        Ok(count)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
