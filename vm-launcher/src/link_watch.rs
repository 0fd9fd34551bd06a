//! Notices at once that the kernel changes an interface.
//!
//! What is told is only *that* something happened: a notification may be lost (the socket's buffer
//! overflows, and the kernel says so), so whoever is told looks at the interface as it is.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes of the largest notification by far; what is longer is cut off, and taken for ours.
const LARGEST: usize = 16 << 10;
/// `struct nlmsghdr` and the head of `struct ifinfomsg` (rtnetlink(7)), in bytes.
const HEADER: usize = 16;
const INDEX: std::ops::Range<usize> = HEADER + 4..HEADER + 8;

/// A subscription to what happens to one interface of the network namespace of the thread that
/// made it.
#[derive(Debug)]
pub(crate) struct LinkWatch {
    socket: AsyncFd<OwnedFd>,
    index: u32,
}

impl LinkWatch {
    /// Subscribes; what happens from here on is told.
    pub(crate) fn open(index: u32) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        bind(
            socket.as_raw_fd(),
            &NetlinkAddr::new(0, libc::RTMGRP_LINK as u32),
        )?;
        // SAFETY: an OwnedFd keeps one descriptor open until it is dropped, which here is with the
        // AsyncFd, and always gives the same number.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self { socket, index })
    }

    /// Waits until something has happened to the interface, or may have. Safe to cancel.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.socket.readable().await?;
            match told(ready.get_inner(), self.index) {
                Ok(true) => return Ok(()),
                Ok(false) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => ready.clear_ready(),
                // Notifications were lost.
                Err(Errno::ENOBUFS) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Whether the next datagram is about the interface. Its buffer is on the stack for this long alone, and
/// not among what each guest holds while nothing happens.
fn told(socket: &OwnedFd, index: u32) -> Result<bool, Errno> {
    let mut buffer = [0u8; LARGEST];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    let length = recv(socket.as_raw_fd(), &mut buffer, flags)?;
    Ok(concerns(&buffer, length, index))
}

/// Whether any message of a datagram of `length` bytes is about the interface. What cannot be read
/// is.
fn concerns(buffer: &[u8], length: usize, index: u32) -> bool {
    let Some(mut rest) = buffer.get(..length) else {
        return true;
    };
    let number = |bytes: Option<&[u8]>| {
        bytes
            .and_then(|b| b.try_into().ok())
            .map(u32::from_ne_bytes)
    };
    while !rest.is_empty() {
        let (Some(length), Some(about)) = (number(rest.get(..4)), number(rest.get(INDEX))) else {
            return true;
        };
        if about == index {
            return true;
        }
        let aligned = (length as usize).next_multiple_of(4);
        if aligned < HEADER {
            return true;
        }
        rest = rest.get(aligned..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use omerta_test_support::{Namespace, Tap, index_of, ip};
    use std::time::Duration;
    use tokio::time::timeout;

    fn in_a_namespace<F: Future<Output = ()>>(work: impl FnOnce() -> F + Send) {
        let namespace = Namespace::new("lw").unwrap();
        namespace
            .enter(|| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap()
                    .block_on(work());
            })
            .unwrap();
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn change_of_the_interface_is_told_and_of_another_is_not() {
        in_a_namespace(|| async {
            let _ours = Tap::create("ours").unwrap();
            let _other = Tap::create("other").unwrap();
            let mut watch = LinkWatch::open(index_of("ours").unwrap()).unwrap();
            ip("link set other mtu 1400").unwrap();
            let told = timeout(Duration::from_millis(200), watch.changed()).await;
            assert!(told.is_err(), "{told:?}");
            ip("link set ours name mine").unwrap();
            timeout(SOON, watch.changed()).await.unwrap().unwrap();
        });
    }

    #[test]
    fn removal_is_told() {
        in_a_namespace(|| async {
            let ours = Tap::create("ours").unwrap();
            let mut watch = LinkWatch::open(index_of("ours").unwrap()).unwrap();
            drop(ours);
            timeout(SOON, watch.changed()).await.unwrap().unwrap();
        });
    }

    #[test]
    fn lost_notifications_are_told() {
        in_a_namespace(|| async {
            let _ours = Tap::create("ours").unwrap();
            let _other = Tap::create("other").unwrap();
            let mut watch = LinkWatch::open(index_of("ours").unwrap()).unwrap();
            let smallest = nix::sys::socket::sockopt::RcvBuf;
            nix::sys::socket::setsockopt(watch.socket.get_ref(), smallest, &1).unwrap();
            // None of them is about our interface.
            for mtu in 1300..1320 {
                ip(&format!("link set other mtu {mtu}")).unwrap();
            }
            timeout(SOON, watch.changed()).await.unwrap().unwrap();
        });
    }

    #[test]
    fn what_cannot_be_read_is_taken_for_ours() {
        assert!(concerns(&[0; 64], 65, 7), "cut off");
        assert!(concerns(&[0; 64], 64, 7), "a length of nothing");
        assert!(concerns(&[9; 10], 10, 7), "too short");
        assert!(!concerns(&[], 0, 7));
    }
}
