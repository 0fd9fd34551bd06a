//! Copies of the frames that cross one interface, for a capture.
//!
//! By AF_PACKET and `recvmmsg`: every frame goes on as before. What the guest sends is seen before any
//! TC program, and so before the guard; what is sent to it after all of them, so only what the guard let
//! pass.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use omerta_verdict::{Direction, Frame, PendingChecksum, Segments};

use crate::{GuardError, interface};

/// Frames that one [`Copies::read`] hands over at most.
pub const BATCH: usize = 64;
/// As much of a frame as the verdict may look at, whatever is kept of it.
const SHORTEST_ROOM: usize = 2048;
/// Room for what arrives between two reads, in bytes.
const BACKLOG: usize = 16 << 20;
/// `struct virtio_net_hdr`, which stands before each frame.
const OFFLOAD_BYTES: usize = 10;
/// `SO_RCVMARK` (include/uapi/asm-generic/socket.h, Linux 5.19).
const RECEIVE_MARK: libc::c_int = 75;
/// `PACKET_VNET_HDR` (include/uapi/linux/if_packet.h).
const OFFLOAD_HEADER: libc::c_int = 15;
/// Room for a time, `struct tpacket_auxdata` and a mark, each with its header.
const CONTROL_WORDS: usize = 16;

/// One frame that crossed the interface, with what the kernel keeps beside its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Copy<'a> {
    /// Which way it went.
    pub direction: Direction,
    /// When the kernel saw it: the time since 1970.
    pub at: Duration,
    /// Its bytes from the Ethernet header on, as far as they are kept; without [`Copy::tag`].
    pub bytes: &'a [u8],
    /// Its whole length, without the tag.
    pub length: u32,
    /// The VLAN tag that travels beside it: protocol and control information.
    pub tag: Option<[u16; 2]>,
    /// Whether somebody on this host has marked it, which no guest can.
    pub is_marked: bool,
    mtu: u32,
    offload: [u8; OFFLOAD_BYTES],
}

impl Copy<'_> {
    fn word(&self, at: usize) -> u32 {
        let bytes = [self.offload[at], self.offload[at + 1]];
        u32::from(u16::from_le_bytes(bytes))
    }
}

impl Frame for Copy<'_> {
    fn length(&self) -> u32 {
        self.length
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn is_tagged(&self) -> bool {
        self.tag.is_some()
    }

    fn segment_size(&self) -> u32 {
        match self.offload[1] {
            0 => 0,
            // A kind that is named without a size is not left whole.
            _ => self.word(4).max(1),
        }
    }

    fn is_cut_into(&self, kind: Segments) -> bool {
        // VIRTIO_NET_HDR_GSO_TCPV4, _TCPV6 and _UDP_L4; the highest bit is _ECN.
        let wanted = match kind {
            Segments::TcpV4 => 1,
            Segments::TcpV6 => 4,
            Segments::Udp => 5,
        };
        self.offload[1] & 0x7f == wanted
    }

    fn pending_checksum(&self) -> Option<PendingChecksum> {
        // VIRTIO_NET_HDR_F_NEEDS_CSUM.
        (self.offload[0] & 1 != 0).then(|| PendingChecksum {
            start: self.word(6),
            field: self.word(6) + self.word(8),
        })
    }

    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        self.bytes.bytes(offset)
    }
}

/// A socket that gets a copy of what one interface of the current network namespace receives and sends.
/// Can then be read from any.
pub struct Copies {
    interface: String,
    socket: OwnedFd,
    mtu: u32,
    /// [`BATCH`] frames of `room` bytes. Only what was written of it takes memory.
    frames: Vec<u8>,
    room: usize,
    lost: u64,
}

impl Copies {
    /// Copies from now on, of each frame `kept` bytes.
    ///
    /// # Errors
    /// Where there is no such interface, or without root.
    pub fn open(interface: &str, kept: usize) -> Result<Self, GuardError> {
        let index = interface::index(interface)?;
        let failed = |action| failed(action, interface);
        let mtu = interface::mtu(interface).map_err(failed("read the MTU"))?;
        // Protocol 0 receives nothing until the socket is bound to its one interface.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .map_err(|e| failed("open a capture")(e.into()))?;
        setsockopt(&socket, sockopt::RcvBufForce, &BACKLOG)
            .map_err(|e| failed("make room for frames")(e.into()))?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)
            .map_err(|e| failed("ask for the times of frames")(e.into()))?;
        for option in [libc::PACKET_AUXDATA, OFFLOAD_HEADER] {
            switch_on(&socket, libc::SOL_PACKET, option)
                .map_err(failed("ask for what travels beside frames"))?;
        }
        // Where the kernel does not tell, an answer of the guard is known by its content alone.
        let _ = switch_on(&socket, libc::SOL_SOCKET, RECEIVE_MARK);
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
        if done < 0 {
            return Err(failed("open a capture")(io::Error::last_os_error()));
        }
        let room = OFFLOAD_BYTES + kept.max(SHORTEST_ROOM);
        Ok(Self {
            interface: interface.to_owned(),
            socket,
            mtu,
            frames: vec![0; BATCH * room],
            room,
            lost: 0,
        })
    }

    /// Hands the frames that have come, [`BATCH`] at most and oldest first, to `each`, without
    /// waiting. Returns how many they were. The descriptor is readable while there are some.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn read(&mut self, mut each: impl FnMut(Copy<'_>)) -> Result<usize, GuardError> {
        // SAFETY: all zero is a valid value of all: no buffers, no addresses.
        let (mut parts, mut messages, mut senders): (
            [libc::iovec; BATCH],
            [libc::mmsghdr; BATCH],
            [libc::sockaddr_ll; BATCH],
        ) = unsafe { std::mem::zeroed() };
        let mut controls = [[0_u64; CONTROL_WORDS]; BATCH];
        let buffers = self.frames.chunks_exact_mut(self.room);
        for ((((part, message), sender), control), frame) in parts
            .iter_mut()
            .zip(&mut messages)
            .zip(&mut senders)
            .zip(&mut controls)
            .zip(buffers)
        {
            part.iov_base = frame.as_mut_ptr().cast();
            part.iov_len = frame.len();
            let header = &mut message.msg_hdr;
            header.msg_iov = part;
            header.msg_iovlen = 1;
            header.msg_name = (&raw mut *sender).cast();
            header.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of_val(control) as _;
        }
        // SAFETY: each message names a buffer, an address and a control buffer of its own, as long as it
        // says; all of them outlive the call, and nothing else uses them meanwhile.
        let count = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                BATCH as libc::c_uint,
                // With the length of the whole frame.
                (libc::MSG_DONTWAIT | libc::MSG_TRUNC) as _,
                std::ptr::null_mut(),
            )
        };
        let count = match nix::Error::result(count) {
            Ok(count) => count as usize,
            // That the interface went down is told once, ahead of the frames.
            Err(nix::Error::EAGAIN | nix::Error::EINTR | nix::Error::ENETDOWN) => 0,
            // A frame that the host is to cut in a way that the header has no word for.
            Err(nix::Error::EINVAL) => {
                self.lost += 1;
                0
            }
            Err(errno) => return Err(failed("read the capture", &self.interface)(errno.into())),
        };
        for ((message, sender), buffer) in messages
            .iter()
            .zip(&senders)
            .zip(self.frames.chunks_exact(self.room))
            .take(count)
        {
            let beside = Beside::of(&message.msg_hdr);
            let Some((offload, bytes)) = buffer.split_first_chunk() else {
                continue;
            };
            let length = message.msg_len as usize - OFFLOAD_BYTES.min(message.msg_len as usize);
            each(Copy {
                direction: match sender.sll_pkttype {
                    libc::PACKET_OUTGOING => Direction::Ingress,
                    _ => Direction::Egress,
                },
                at: beside.at,
                bytes: bytes.get(..length).unwrap_or(bytes),
                length: length as u32,
                tag: beside.tag,
                is_marked: beside.mark != 0,
                mtu: self.mtu,
                offload: *offload,
            });
        }
        Ok(count)
    }

    /// Frames that the kernel could not hand over so far: for want of room, or of words.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn lost(&mut self) -> Result<u64, GuardError> {
        let mut statistics = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes into the statistics, which outlive the call.
        let done = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        if done < 0 {
            return Err(failed("read the capture's losses", &self.interface)(
                io::Error::last_os_error(),
            ));
        }
        // The kernel counts anew after each question.
        self.lost += u64::from(statistics.tp_drops);
        Ok(self.lost)
    }
}

impl AsFd for Copies {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What the kernel tells beside a frame.
#[derive(Default)]
struct Beside {
    at: Duration,
    tag: Option<[u16; 2]>,
    mark: u32,
}

impl Beside {
    fn of(header: &libc::msghdr) -> Self {
        let mut beside = Self::default();
        // SAFETY: the kernel has filled the header's control buffer and set its length; the macros stay
        // within it, and each payload is read as the type that its level and kind name.
        unsafe {
            let mut next = libc::CMSG_FIRSTHDR(header);
            while let Some(control) = next.as_ref() {
                let data = libc::CMSG_DATA(control);
                match (control.cmsg_level, control.cmsg_type) {
                    (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                        let time = data.cast::<libc::timespec>().read_unaligned();
                        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
                        beside.at = Duration::from_secs(seconds)
                            + Duration::from_nanos(time.tv_nsec as u64);
                    }
                    (libc::SOL_PACKET, libc::PACKET_AUXDATA) => {
                        let told = data.cast::<libc::tpacket_auxdata>().read_unaligned();
                        if told.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                            beside.tag = Some([told.tp_vlan_tpid, told.tp_vlan_tci]);
                        }
                    }
                    (libc::SOL_SOCKET, libc::SO_MARK) => {
                        beside.mark = data.cast::<u32>().read_unaligned();
                    }
                    _ => {}
                }
                next = libc::CMSG_NXTHDR(header, control);
            }
        }
        beside
    }
}

fn switch_on(socket: &OwnedFd, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let one: libc::c_int = 1;
    // SAFETY: the kernel reads an int, which outlives the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const one).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn failed(action: &'static str, interface: &str) -> impl FnOnce(io::Error) -> GuardError {
    let interface = interface.to_owned();
    move |source| GuardError::System {
        action,
        interface,
        source,
    }
}
