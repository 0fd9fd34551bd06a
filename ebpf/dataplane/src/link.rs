//! A pinned TCX link, asked where it is and what it runs. aya tells the program alone.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use omerta_verdict::Direction;

use crate::bpf::{bpf, bpf_open};
use crate::hook::has_tcx;

// enum bpf_cmd in include/uapi/linux/bpf.h.
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_CREATE: libc::c_int = 28;
// enum bpf_attach_type, likewise.
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
/// `BPF_F_BEFORE` all others.
const FIRST: u32 = 1 << 3;

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

/// `struct { ... } query` of `union bpf_attr`, up to what is asked for here.
#[repr(C)]
struct QueryRequest {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    padding: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// The head of `struct bpf_prog_info`.
#[derive(Default)]
#[repr(C)]
struct ProgramInfo {
    kind: u32,
    id: u32,
}

/// `union bpf_attr` of `BPF_LINK_CREATE`, up to what is said here (include/uapi/linux/bpf.h).
#[repr(C)]
struct LinkRequest {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    padding: u32,
    expected_revision: u64,
}

/// Has `program` run on an interface, by a link of that type.
pub fn create(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut request = LinkRequest {
        program: program.as_raw_fd() as u32,
        ifindex,
        attach_type,
        flags,
        relative: 0,
        padding: 0,
        expected_revision: 0,
    };
    // SAFETY: the kernel reads `request`, which outlives the call.
    unsafe { bpf_open(BPF_LINK_CREATE, &mut request) }
}

/// Has `program` run on the TCX hook of `direction`, before all that are there.
pub fn first(program: BorrowedFd<'_>, ifindex: u32, direction: Direction) -> io::Result<OwnedFd> {
    create(program, ifindex, attach_type(direction), FIRST)
}

/// What the guest sends enters the host by the interface's ingress hook, and the other way round.
const fn attach_type(direction: Direction) -> u32 {
    match direction {
        Direction::Egress => BPF_TCX_INGRESS,
        Direction::Ingress => BPF_TCX_EGRESS,
    }
}

/// The id of the program pinned at `pin`.
pub fn program_id(pin: &Path) -> io::Result<u32> {
    program_id_of(&open(pin)?)
}

/// The id of an open program.
pub fn program_id_of(program: &OwnedFd) -> io::Result<u32> {
    Ok(object_info::<ProgramInfo>(program)?.id)
}

/// Asks the link pinned at `pin`.
pub fn info(pin: &Path) -> io::Result<LinkInfo> {
    info_of(&open(pin)?)
}

/// Opens what is pinned at `pin`.
pub fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut request = GetRequest {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `request` and the string that it points to; both outlive the call.
    unsafe { bpf_open(BPF_OBJ_GET, &mut request) }
}

/// Pins an open object at `pin`.
pub fn pin(object: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut request = GetRequest {
        path: path.as_ptr() as u64,
        fd: object.as_raw_fd() as u32,
        flags: 0,
    };
    // SAFETY: as in [`open`].
    unsafe { bpf(BPF_OBJ_PIN, &mut request) }.map(drop)
}

/// Asks an open link.
pub fn info_of(link: &OwnedFd) -> io::Result<LinkInfo> {
    object_info(link)
}

/// What the kernel tells of an object.
///
/// # Safety
/// `repr(C)`, integers only, without padding: the kernel may write any bytes to it.
pub unsafe trait ObjectInfo: Default {}
// SAFETY: as asked for.
unsafe impl ObjectInfo for LinkInfo {}
// SAFETY: as asked for.
unsafe impl ObjectInfo for ProgramInfo {}

/// Asks for it.
pub fn object_info<T: ObjectInfo>(object: &impl AsRawFd) -> io::Result<T> {
    let mut info = T::default();
    let mut request = InfoRequest {
        fd: object.as_raw_fd() as u32,
        length: size_of::<T>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel reads `request` and writes at most `length` bytes to `info`; both outlive
    // the call, and every bit pattern of `info` is valid.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut request) }?;
    Ok(info)
}

/// Whether a program is on the TCX hook of `direction`, where the kernel has TCX.
pub fn has_any(ifindex: u32, direction: Direction) -> io::Result<bool> {
    Ok(has_tcx()? && first_on(ifindex, direction)?.program_id.is_some())
}

/// A TCX hook, as it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HookState {
    /// The id of the first program; `None` where there is none.
    pub program_id: Option<u32>,
    /// Counts every change of what is on the hook: programs that come, go, move or are exchanged in their
    /// links (`bpf_mprog_commit` in include/linux/bpf_mprog.h).
    pub revision: u64,
}

/// The hook of `direction` on the interface of that index in this thread's network namespace.
pub fn first_on(ifindex: u32, direction: Direction) -> io::Result<HookState> {
    let mut first = 0u32;
    let mut request = QueryRequest {
        target_ifindex: ifindex,
        attach_type: attach_type(direction),
        query_flags: 0,
        attach_flags: 0,
        program_ids: (&raw mut first) as u64,
        count: 1,
        padding: 0,
        program_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: the kernel reads and writes `request`, and writes at most `count` ids to `first`;
    // both outlive the call.
    match unsafe { bpf(BPF_PROG_QUERY, &mut request) } {
        // Where there are more programs than were asked for, all is written all the same
        // (`bpf_mprog_query` in kernel/bpf/mprog.c).
        Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => {
            if error.raw_os_error() == Some(libc::ENOENT) {
                return Ok(HookState::default());
            }
            Err(error)
        }
        _ => Ok(HookState {
            program_id: Some(first).filter(|id| *id != 0),
            revision: request.revision,
        }),
    }
}
