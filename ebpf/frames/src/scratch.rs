//! A tap in a network namespace of its own, to measure with: nothing of it is seen from outside.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::write;

use crate::FramesError;

/// The tap's name in its namespace.
pub const NAME: &str = "probe";

/// The guest's end of a tap, set up as QEMU does: one queue, no wait, no limit of what is sent.
pub struct ScratchTap {
    queue: File,
}

impl ScratchTap {
    /// Moves the calling thread into a new namespace and makes the tap there.
    pub fn in_new_namespace() -> Result<Self, FramesError> {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(FramesError::system("make a namespace for", NAME))?;
        let queue = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(FramesError::system("make the tap", NAME))?;
        // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes the request, which outlives the call.
        let done = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        checked(done, "make the tap")?;
        let unlimited = libc::c_int::MAX;
        // SAFETY: TUNSETSNDBUF reads an int, which outlives the call.
        let done =
            unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETSNDBUF, &raw const unlimited) };
        checked(done, "set up the tap")?;
        let control: OwnedFd = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(FramesError::system("set up", NAME))?;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        // SAFETY: SIOCSIFFLAGS reads the request, which outlives the call.
        let done =
            unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
        checked(done, "set up")?;
        Ok(Self { queue })
    }

    /// Sends `frame` as a guest would.
    pub fn send(&self, frame: &[u8]) -> Result<(), FramesError> {
        write(&self.queue, frame).map_err(FramesError::system("send on", NAME))?;
        Ok(())
    }
}

fn checked(done: libc::c_int, action: &'static str) -> Result<(), FramesError> {
    if done < 0 {
        return Err(FramesError::system(action, NAME)(io::Error::last_os_error()));
    }
    Ok(())
}
