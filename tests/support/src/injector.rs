//! Frames as if an interface had received them: of a guest whose end of its tap QEMU has.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::interface::{failed, index_of, ip};
use crate::{FrameSender, StageError, Veth};

// include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_EGRESS: u32 = 47;
/// `bpf_redirect`, and that it is to the way in.
const REDIRECT: u64 = 23;
const INGRESS: u64 = 1;

#[repr(C)]
#[derive(Default)]
struct ProgramAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    unused: [u32; 24],
}

#[repr(C)]
#[derive(Default)]
struct LinkAttributes {
    program: u32,
    ifindex: u32,
    hook: u32,
    flags: u32,
    unused: [u64; 6],
}

/// Puts frames before an interface's receive path, by a veth whose program redirects what it sends.
#[derive(Debug)]
pub struct Injector {
    sender: FrameSender,
    veth: Veth,
    _link: OwnedFd,
}

impl Injector {
    /// Into `interface` of the current namespace, by a pair of veths that lasts as long as it; one in each
    /// namespace.
    ///
    /// # Errors
    /// Where there is no such interface, on kernels before 6.6, or without root.
    pub fn into(interface: &str) -> Result<Self, StageError> {
        Self::by("inject", interface)
    }

    /// The same, by a pair whose names begin with `pair`: several may be in one namespace.
    ///
    /// # Errors
    /// As [`Injector::into`], and where there is such a pair.
    pub fn by(pair: &str, interface: &str) -> Result<Self, StageError> {
        let failed = |error: io::Error| {
            let errno = error
                .raw_os_error()
                .map_or(nix::Error::EIO, nix::Error::from_raw);
            failed("redirect to", interface)(errno)
        };
        let target = index_of(interface)?;
        let veth = Veth::pair(&format!("{pair}0"), &format!("{pair}1"))?;
        // The stack sends nothing of its own by it.
        for end in [&veth.near, &veth.far] {
            ip(&format!("link set {end} addrgenmode none"))?;
        }
        veth.up()?;
        let instructions = [
            0xb7 | 1 << 8 | u64::from(target) << 32,
            0xb7 | 2 << 8 | INGRESS << 32,
            0x85 | REDIRECT << 32,
            0x95,
        ];
        let program = ProgramAttributes {
            kind: BPF_PROG_TYPE_SCHED_CLS,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            ..ProgramAttributes::default()
        };
        // SAFETY: the request is of this command, and the instructions outlive the call.
        let program = unsafe { open(BPF_PROG_LOAD, &program) }.map_err(failed)?;
        let link = LinkAttributes {
            program: program.as_raw_fd() as u32,
            ifindex: index_of(&veth.near)?,
            hook: BPF_TCX_EGRESS,
            ..LinkAttributes::default()
        };
        // SAFETY: the request is of this command and points nowhere.
        let link = unsafe { open(BPF_LINK_CREATE, &link) }.map_err(failed)?;
        Ok(Self {
            sender: FrameSender::open(&veth.near)?,
            veth,
            _link: link,
        })
    }

    /// Has the interface receive a frame, Ethernet header included.
    ///
    /// # Errors
    /// Where the way there is gone.
    pub fn inject(&self, frame: &[u8]) -> Result<(), StageError> {
        self.sender.send(frame)
    }

    /// The same frame so many times, by as few system calls as that takes.
    ///
    /// # Errors
    /// As [`Injector::inject`].
    pub fn inject_times(&self, frame: &[u8], times: usize) -> Result<(), StageError> {
        self.sender.send_times(frame, times)
    }

    /// Removes its veths, for whoever makes many in one namespace, which must be the current one.
    ///
    /// # Errors
    /// Where they are gone.
    pub fn remove(self) -> Result<(), StageError> {
        self.veth.remove()
    }
}

/// bpf(2) of a command that makes a descriptor.
///
/// # Safety
/// `request` must be what the kernel takes for `command`, and what it points to must outlive the call.
unsafe fn open<T>(command: libc::c_int, request: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(request),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as libc::c_int) })
}
