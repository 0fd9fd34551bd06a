//! An AF_XDP socket on queue 0 of one interface.
//!
//! A frame longer than [`FRAME_BYTES`] less the driver's headroom has no room in a frame of the ring and
//! is dropped: guests' taps have no offloads, so theirs are of the MTU's size.

use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use xsk_rs::config::{BindFlags, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig};
use xsk_rs::{FillQueue, FrameDesc, RxQueue, Socket, TxQueue, Umem};

use crate::{BATCH, FramesError, bpf};

/// Frames that the kernel may fill before they are read; a power of two. A tap without vhost brings
/// them one by one.
const FRAMES: u32 = 4096;
/// xsk-rs' own.
#[cfg(doc)]
const FRAME_BYTES: usize = 4096;

/// The socket with its memory. Fields are dropped in this order: frames stop before their memory goes.
#[derive(Debug)]
pub struct XdpSocket {
    _link: OwnedFd,
    received: RxQueue,
    fill: FillQueue,
    _send: TxQueue,
    umem: Umem,
    /// What the last read brought, to be given back to the kernel.
    batch: [FrameDesc; BATCH],
}

impl XdpSocket {
    pub fn open(interface: &str, ifindex: u32) -> Result<Self, FramesError> {
        let size = |frames| QueueSize::new(frames).map_err(|e| FramesError::xdp(interface, e));
        let memory = UmemConfig::builder()
            .fill_queue_size(size(FRAMES)?)
            .build()
            .map_err(|e| FramesError::xdp(interface, e))?;
        let frames = NonZeroU32::MIN.saturating_add(FRAMES - 1);
        let (umem, descriptors) =
            Umem::new(memory, frames, false).map_err(|e| FramesError::xdp(interface, e))?;
        let config = SocketConfig::builder()
            .rx_queue_size(size(FRAMES)?)
            // No program of libxdp's, which passes what it has no socket for; and none of its pins.
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(BindFlags::empty())
            .build();
        let name: Interface = interface
            .parse()
            .map_err(|e| FramesError::xdp(interface, e))?;
        // SAFETY: the memory is this socket's alone, and libxdp loads no program.
        let (send, received, queues) = unsafe { Socket::new(config, &umem, &name, 0) }
            .map_err(|e| FramesError::xdp(interface, whole(&e)))?;
        let Some((mut fill, _)) = queues else {
            return Err(FramesError::xdp(interface, "the memory is in use"));
        };
        // SAFETY: the descriptors are of this memory, and none was given to the kernel before.
        let given = unsafe { fill.produce(&descriptors) };
        if given != descriptors.len() {
            return Err(FramesError::xdp(
                interface,
                "the ring has no room for its frames",
            ));
        }
        // SAFETY: the socket owns the descriptor and outlives this.
        let socket = unsafe { BorrowedFd::borrow_raw(received.fd().as_raw_fd()) };
        let link = bpf::redirect_to(socket, ifindex).map_err(|e| FramesError::xdp(interface, e))?;
        Ok(Self {
            _link: link,
            received,
            fill,
            _send: send,
            umem,
            batch: [FrameDesc::default(); BATCH],
        })
    }

    pub fn read(&mut self, mut each: impl FnMut(&[u8])) -> usize {
        // SAFETY: the descriptors that it writes name frames of this memory.
        let count = unsafe { self.received.consume(&mut self.batch) };
        for descriptor in &self.batch[..count] {
            // SAFETY: the descriptor has just come from the kernel, which does not write its frame until
            // it is given back.
            let data = unsafe { self.umem.data(descriptor) };
            each(data.contents());
        }
        // SAFETY: as many as there are frames find room in the ring, and nobody reads them any more.
        // What would not fit is never more than the kernel lacks: it drops frames then.
        unsafe { self.fill.produce(&self.batch[..count]) };
        count
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket owns the descriptor and outlives the borrow of it.
        unsafe { BorrowedFd::borrow_raw(self.received.fd().as_raw_fd()) }
    }
}

/// An error with what caused it, in one line.
fn whole(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
