//! What an interface receives, frame by frame, taken from the host's stack by a consumer in userspace: a
//! forwarder, which judges each by `omerta_verdict::egress`.
//!
//! By AF_XDP, or `recvmmsg` with a program behind it that drops. AF_XDP redirects frames ahead of the
//! stack, and so ahead of the guard at TC; a capture, which must change nothing, takes copies instead
//! (`omerta_dataplane::Copies`).
//!
//! Which back end takes is measured when the reader is opened, on a tap of a namespace of its own
//! ([`cost_ns`]), and told by [`Reader::choice`]. AF_XDP reads queue 0 alone, which is all that a guest's
//! tap has; what comes by another is dropped. Nothing taken passes when a reader falls behind or
//! dies half-way: frames without room are dropped, and when the reader's programs go, the guard judges
//! again as it did before.

mod bpf;
mod error;
mod packet;
mod probe;
mod scratch;
mod taking;
mod xdp;

use std::os::fd::{AsFd, BorrowedFd};

pub use error::FramesError;
pub use probe::cost_ns;

use packet::PacketSocket;
use taking::{BlockedStack, ifindex};
use xdp::XdpSocket;

/// Frames that one [`Reader::read`] hands over at most.
pub const BATCH: usize = 64;

/// How frames reach the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackEnd {
    /// AF_PACKET, [`BATCH`] frames a system call.
    Recvmmsg,
    /// AF_XDP: rings in shared memory, no system call where there are frames.
    AfXdp,
}

/// Why a reader has its back end.
#[derive(Debug)]
pub enum Choice {
    /// It was named.
    Named,
    /// What each cost when the reader was opened, nanoseconds of processor time a frame of 64 bytes.
    Measured {
        /// AF_PACKET.
        recvmmsg_ns: f64,
        /// AF_XDP.
        afxdp_ns: f64,
    },
    /// AF_XDP does not work here.
    NoAfXdp(FramesError),
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named => f.write_str("as asked for"),
            Self::Measured {
                recvmmsg_ns,
                afxdp_ns,
            } => {
                let faster = if afxdp_ns < recvmmsg_ns {
                    "AF_XDP"
                } else {
                    "recvmmsg"
                };
                write!(
                    f,
                    "{faster}: recvmmsg took {recvmmsg_ns:.0} ns a frame, AF_XDP {afxdp_ns:.0} ns"
                )
            }
            Self::NoAfXdp(error) => write!(f, "recvmmsg: {error}"),
        }
    }
}

/// Reads what one interface of the current network namespace receives. Can then be used from any.
#[derive(Debug)]
pub struct Reader {
    source: Source,
    choice: Choice,
}

#[derive(Debug)]
enum Source {
    Packet(
        PacketSocket,
        #[expect(dead_code, reason = "blocks while it lives")] BlockedStack,
    ),
    Xdp(Box<XdpSocket>),
}

impl Reader {
    /// Takes what `interface`, a tap, receives away from the stack, by whichever back end costs less.
    ///
    /// # Errors
    /// As [`Reader::take_by`], where `recvmmsg` cannot be had either.
    pub fn take_from(interface: &str) -> Result<Self, FramesError> {
        let measured = cost_ns(BackEnd::Recvmmsg)
            .and_then(|recvmmsg_ns| Ok((recvmmsg_ns, cost_ns(BackEnd::AfXdp)?)));
        let choice = match measured {
            Ok((recvmmsg_ns, afxdp_ns)) if afxdp_ns < recvmmsg_ns => {
                match Self::take_by(interface, BackEnd::AfXdp) {
                    Ok(reader) => {
                        return Ok(Self {
                            choice: Choice::Measured {
                                recvmmsg_ns,
                                afxdp_ns,
                            },
                            ..reader
                        });
                    }
                    Err(error) => Choice::NoAfXdp(error),
                }
            }
            Ok((recvmmsg_ns, afxdp_ns)) => Choice::Measured {
                recvmmsg_ns,
                afxdp_ns,
            },
            Err(error) => Choice::NoAfXdp(error),
        };
        Ok(Self {
            choice,
            ..Self::take_by(interface, BackEnd::Recvmmsg)?
        })
    }

    /// As [`Reader::take_from`], by the back end that is named.
    ///
    /// # Errors
    /// Where there is no such interface or it has an XDP program already, the kernel has no TCX hooks
    /// (`recvmmsg`: before Linux 6.6), or without root.
    pub fn take_by(interface: &str, back_end: BackEnd) -> Result<Self, FramesError> {
        let source = match back_end {
            BackEnd::Recvmmsg => {
                // The socket first: what comes between the two is seen, and judged by the guard.
                let socket = PacketSocket::open(interface)?;
                Source::Packet(socket, BlockedStack::behind(interface)?)
            }
            BackEnd::AfXdp => {
                Source::Xdp(Box::new(XdpSocket::open(interface, ifindex(interface)?)?))
            }
        };
        Ok(Self {
            source,
            choice: Choice::Named,
        })
    }

    /// How frames reach this reader.
    pub fn back_end(&self) -> BackEnd {
        match self.source {
            Source::Packet(..) => BackEnd::Recvmmsg,
            Source::Xdp(_) => BackEnd::AfXdp,
        }
    }

    /// Why.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Hands the frames that have come, [`BATCH`] at most and oldest first, to `each`, without
    /// waiting. Returns how many they were. The descriptor is readable while there are some.
    ///
    /// # Errors
    /// Where the interface is gone.
    pub fn read(&mut self, each: impl FnMut(&[u8])) -> Result<usize, FramesError> {
        match &mut self.source {
            Source::Packet(socket, _) => socket.read(each),
            Source::Xdp(socket) => Ok(socket.read(each)),
        }
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.source {
            Source::Packet(socket, _) => socket.as_fd(),
            Source::Xdp(socket) => socket.as_fd(),
        }
    }
}
