//! A tap whose other end is the test.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

use crate::{StageError, interface};

/// The longest frame that a tap hands out: 64 KiB and an Ethernet header with a VLAN tag.
const LONGEST_FRAME: usize = 65_536 + 18;

/// How long a descriptor that is held elsewhere may take to be closed.
const REMOVAL: Duration = Duration::from_secs(5);

/// A tap of the namespace in which it was created: what is sent here, the kernel receives on the
/// interface; what the kernel sends there, is received here. Frames are bare, without packet
/// information, and without vnet header unless it was asked for. The kernel removes the interface on drop.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queue: File,
    control: OwnedFd,
}

impl Tap {
    /// Creates the tap, down, in the current namespace.
    ///
    /// # Errors
    /// Where the name is taken or longer than 15 bytes, `/dev/net/tun` is missing, or without root.
    pub fn create(name: &str) -> Result<Self, StageError> {
        Self::create_with(name, 0)
    }

    /// As [`Tap::create`], but every frame sent and received begins with a `struct
    /// virtio_net_hdr` of 10 bytes (include/uapi/linux/virtio_net.h), as hypervisors ask for.
    ///
    /// # Errors
    /// As [`Tap::create`].
    pub fn create_with_offload_header(name: &str) -> Result<Self, StageError> {
        Self::create_with(name, libc::IFF_VNET_HDR)
    }

    fn create_with(name: &str, flags: libc::c_int) -> Result<Self, StageError> {
        let failed = |source| StageError::Interface {
            action: "create tap",
            name: name.to_owned(),
            source,
        };
        let queue = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(failed)?;
        let mut request = interface::request(name)?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | flags) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes the request, which outlives the call.
        if unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(Self {
            name: name.to_owned(),
            queue,
            control: interface::control_socket(name)?,
        })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets the interface up, from whichever namespace.
    ///
    /// # Errors
    /// Where the interface is gone.
    pub fn up(&self) -> Result<(), StageError> {
        interface::bring_up_by(&self.control, &self.name)
    }

    /// Lets the interface go and waits until it has: a process that another thread is just starting may
    /// hold the descriptor until its program begins. To be called in the interface's namespace.
    pub fn remove(self) {
        let name = self.name.clone();
        drop(self);
        let end = Instant::now() + REMOVAL;
        while interface::index_of(&name).is_ok() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Gives the kernel one frame, as if it had arrived on the interface.
    ///
    /// # Errors
    /// Where the interface is down, or the frame shorter than an Ethernet header.
    pub fn send(&self, frame: &[u8]) -> Result<(), StageError> {
        write(&self.queue, frame).map_err(interface::failed("send on", &self.name))?;
        Ok(())
    }

    /// Takes the next frame that the kernel sent out of the interface; `None` when none came in
    /// time.
    ///
    /// # Errors
    /// Where the interface is gone.
    pub fn recv(&self, timeout: Duration) -> Result<Option<Vec<u8>>, StageError> {
        let deadline = Instant::now() + timeout;
        let mut frame = vec![0; LONGEST_FRAME];
        loop {
            match read(&self.queue, &mut frame) {
                Ok(length) => {
                    frame.truncate(length);
                    return Ok(Some(frame));
                }
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(errno) => return Err(interface::failed("receive on", &self.name)(errno)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let wait =
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(self.queue.as_fd(), PollFlags::POLLIN)],
                wait,
            ) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(interface::failed("wait on", &self.name)(errno)),
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.queue.as_fd()
    }
}
