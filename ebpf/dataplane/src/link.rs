//! A pinned TCX link, asked where it is and what it runs. aya tells the program alone.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

// enum bpf_cmd in include/uapi/linux/bpf.h.
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// The head of `struct bpf_link_info`, with the `tcx` member of its union.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct LinkInfo {
    kind: u32,
    /// The link's number, which the kernel gives to no other while it runs (until it wraps).
    pub id: u32,
    /// The program that the link runs.
    pub program_id: u32,
    padding: u32,
    /// The interface that the link is attached to, in whichever network namespace that is now; 0
    /// where the interface is gone (`tcx_link_fill_info` in kernel/bpf/tcx.c).
    pub ifindex: u32,
    attach_type: u32,
}

/// Members of `union bpf_attr`.
#[repr(C)]
struct GetRequest {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoRequest {
    fd: u32,
    length: u32,
    info: u64,
}

/// Asks the link pinned at `pin`.
pub fn info(pin: &Path) -> io::Result<LinkInfo> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let request = GetRequest {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `request` and the string that it points to; both outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET,
            &raw const request,
            size_of::<GetRequest>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    let link = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    let mut info = LinkInfo::default();
    let request = InfoRequest {
        fd: link.as_raw_fd() as u32,
        length: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel reads `request` and writes at most `length` bytes to `info`; both outlive
    // the call, and every bit pattern of `info` is valid.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET_INFO_BY_FD,
            &raw const request,
            size_of::<InfoRequest>(),
        )
    };
    if result == 0 {
        Ok(info)
    } else {
        Err(io::Error::last_os_error())
    }
}
