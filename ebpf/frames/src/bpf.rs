//! bpf(2) for two programs of a few instructions: one hands frames to an AF_XDP socket, one drops.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

// include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_TCX_INGRESS: u32 = 46;
const XDP_DROP: u64 = 1;
const TC_ACT_SHOT: u64 = 2;
/// `bpf_redirect_map`.
const REDIRECT_MAP: u64 = 51;
/// `BPF_PSEUDO_MAP_FD`.
const MAP_DESCRIPTOR: u64 = 1;

#[repr(C)]
#[derive(Default)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    unused: [u32; 12],
}

#[repr(C)]
#[derive(Default)]
struct ElementAttributes {
    map: u64,
    key: u64,
    value: u64,
    flags: u64,
}

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

/// bpf(2).
///
/// # Safety
/// `request` must be what the kernel takes for `command`, and what it points to must outlive the
/// call.
unsafe fn bpf<T>(command: libc::c_int, request: &T) -> io::Result<libc::c_int> {
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
    Ok(result as libc::c_int)
}

/// # Safety
/// As [`bpf`], of a command that makes a descriptor.
unsafe fn bpf_open<T>(command: libc::c_int, request: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the kernel has just made the descriptor, and nobody else has it.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, request)?)) }
}

fn load(kind: u32, instructions: &[u64]) -> io::Result<OwnedFd> {
    let request = ProgramAttributes {
        kind,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..ProgramAttributes::default()
    };
    // SAFETY: the request is of this command, and the instructions outlive the call.
    unsafe { bpf_open(BPF_PROG_LOAD, &request) }
}

fn attach(program: &OwnedFd, ifindex: u32, hook: u32, flags: u32) -> io::Result<OwnedFd> {
    let request = LinkAttributes {
        program: program.as_raw_fd() as u32,
        ifindex,
        hook,
        flags,
        ..LinkAttributes::default()
    };
    // SAFETY: the request is of this command and points nowhere.
    unsafe { bpf_open(BPF_LINK_CREATE, &request) }
}

/// Hands every frame that queue 0 of the interface receives to `socket`, and drops the others: those
/// of other queues, and those for which the socket has no room. Lasts as long as the descriptor.
pub fn redirect_to(socket: impl AsFd, ifindex: u32) -> io::Result<OwnedFd> {
    /// include/uapi/linux/if_link.h: in the driver, where frames are not socket buffers yet.
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    let map = MapAttributes {
        kind: BPF_MAP_TYPE_XSKMAP,
        key_size: 4,
        value_size: 4,
        entries: 1,
        ..MapAttributes::default()
    };
    // SAFETY: the request is of this command and points nowhere.
    let map = unsafe { bpf_open(BPF_MAP_CREATE, &map) }?;
    let (key, value) = (0_u32, socket.as_fd().as_raw_fd());
    let element = ElementAttributes {
        map: map.as_raw_fd() as u64,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: the request is of this command; key and value are as long as the map says and outlive
    // the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &element) }?;
    let program = load(
        BPF_PROG_TYPE_XDP,
        &[
            // r2 = ctx->rx_queue_index
            0x61 | 2 << 8 | 1 << 12 | 16 << 16,
            // r1 = map, in two words
            0x18 | 1 << 8 | MAP_DESCRIPTOR << 12 | (map.as_raw_fd() as u64) << 32,
            0,
            // r3 = what becomes of a frame without a socket
            0xb7 | 3 << 8 | XDP_DROP << 32,
            // r0 = bpf_redirect_map(r1, r2, r3)
            0x85 | REDIRECT_MAP << 32,
            // return r0
            0x95,
        ],
    )?;
    // The program keeps the map, the link the program.
    attach(&program, ifindex, BPF_XDP, XDP_FLAGS_DRV_MODE)
}

/// Drops whatever the interface receives, behind all programs that are on its hook now. Lasts as long
/// as the descriptor.
pub fn drop_all(ifindex: u32) -> io::Result<OwnedFd> {
    let program = load(BPF_PROG_TYPE_SCHED_CLS, &[0xb7 | TC_ACT_SHOT << 32, 0x95])?;
    attach(&program, ifindex, BPF_TCX_INGRESS, 0)
}
