//! bpf(2), where aya does not reach.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// bpf(2). Some commands answer in the request.
///
/// # Safety
/// `request` must be what the kernel takes for `command`, and what it points to must outlive the
/// call.
pub unsafe fn bpf<T>(command: libc::c_int, request: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(request),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as libc::c_int)
}

/// bpf(2), for commands that make a descriptor.
///
/// # Safety
/// As [`bpf`].
pub unsafe fn bpf_open<T>(command: libc::c_int, request: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, request) }?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
