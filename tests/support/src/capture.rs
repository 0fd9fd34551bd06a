//! What an interface saw.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, SystemTime};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockType, recvmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;

use crate::interface::{failed, index_of};
use crate::{StageError, frame_sender::bind_packet_socket};

/// Room for what arrives between two drains, in bytes.
const BACKLOG: usize = 16 << 20;
const LONGEST_FRAME: usize = 65_536 + 18;

/// Whether the interface received a frame or sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Travel {
    /// The interface received it, before any TC program saw it.
    Incoming,
    /// The interface sent it, after all TC programs had let it pass.
    Outgoing,
}

/// One frame that an interface saw.
#[derive(Clone, Debug)]
pub struct CapturedFrame {
    /// Which way it went.
    pub travel: Travel,
    /// When the kernel saw it, by the wall clock.
    pub at: SystemTime,
    /// Its bytes, from the Ethernet header on. A VLAN tag that the kernel took off is missing.
    pub bytes: Vec<u8>,
}

/// An AF_PACKET socket on one interface, which sees all frames in both directions from
/// [`Capture::open`] on.
#[derive(Debug)]
pub struct Capture {
    interface: String,
    socket: OwnedFd,
}

impl Capture {
    /// Starts to capture on an interface of the current namespace. The capture can then be read
    /// from any namespace.
    ///
    /// # Errors
    /// Where there is no such interface, or without root.
    pub fn open(interface: &str) -> Result<Self, StageError> {
        let failed = |errno| failed("capture on", interface)(errno);
        let index = index_of(interface)?;
        // Protocol 0 receives nothing until the socket is bound to its one interface.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None).map_err(failed)?;
        setsockopt(&socket, sockopt::RcvBufForce, &BACKLOG).map_err(failed)?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).map_err(failed)?;
        bind_packet_socket(&socket, index, libc::ETH_P_ALL as u16).map_err(failed)?;
        Ok(Self {
            interface: interface.to_owned(),
            socket,
        })
    }

    /// The interface's name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Takes out all frames seen since the last call, oldest first, without waiting. What an
    /// interface saw before it went down or was removed can still be taken.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn frames(&self) -> Result<Vec<CapturedFrame>, StageError> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; LONGEST_FRAME];
        let mut control = nix::cmsg_space!(TimeSpec);
        loop {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let received = recvmsg::<LinkAddr>(
                self.socket.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::empty(),
            );
            let message = match received {
                Ok(message) => message,
                Err(nix::Error::EAGAIN) => return Ok(frames),
                // That the interface went down is told once, ahead of the frames.
                Err(nix::Error::EINTR | nix::Error::ENETDOWN) => continue,
                Err(errno) => return Err(failed("read the capture on", &self.interface)(errno)),
            };
            let outgoing = message
                .address
                .is_some_and(|from| from.pkttype() == libc::PACKET_OUTGOING);
            let mut at = SystemTime::now();
            for part in message.cmsgs().into_iter().flatten() {
                if let ControlMessageOwned::ScmTimestampns(time) = part {
                    at = SystemTime::UNIX_EPOCH + Duration::from(time);
                }
            }
            let length = message.bytes;
            frames.push(CapturedFrame {
                travel: if outgoing {
                    Travel::Outgoing
                } else {
                    Travel::Incoming
                },
                at,
                bytes: buffer.get(..length).unwrap_or_default().to_vec(),
            });
        }
    }

    /// How many frames the kernel could not keep since the last call, for want of room. A capture
    /// that lost frames proves nothing.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn lost(&self) -> Result<u32, StageError> {
        let mut statistics = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes into the statistics, which outlive the
        // call.
        let answer = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        if answer < 0 {
            return Err(
                failed("read the losses of the capture on", &self.interface)(nix::Error::last()),
            );
        }
        Ok(statistics.tp_drops)
    }
}
