//! bpf(2), where aya does not reach.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

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

const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// `union bpf_attr` of the commands on many elements (include/uapi/linux/bpf.h).
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Some of a map's elements at once.
pub struct Found {
    /// How many there are.
    pub count: usize,
    /// Where to go on; `None` where these are the last.
    pub position: Option<u32>,
}

/// Reads elements of `map` into `keys` and `values`, from `position` on, or from its beginning: as many as
/// `keys` has room for.
///
/// # Safety
/// A key of the map is a `K`. Each has as many `V` among `values` as make up the map's value (one of each
/// possible CPU, where it has such), and every bit pattern of both is valid.
pub unsafe fn lookup_batch<K, V>(
    map: BorrowedFd<'_>,
    position: Option<u32>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<Found> {
    let mut next = 0_u32;
    let mut request = Batch {
        in_batch: position.as_ref().map_or(0, |at| ptr::from_ref(at) as u64),
        out_batch: &raw mut next as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: the buffers hold `count` keys and values by the caller's promise and outlive the call, as
    // the two positions do.
    let position = match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut request) } {
        Ok(_) => Some(next),
        // The last of them, perhaps none.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        Err(error) => return Err(error),
    };
    Ok(Found {
        count: request.count as usize,
        position,
    })
}
