//! One bank of an allowlist: a BPF array of buckets, of the size that the allowlist needs.
//!
//! It is filled and read in place, through a mapping. The kernel enters all of a bank's pages when it is
//! mapped (and has cleared them when it was made), so none of them faults.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;
use std::{io, mem, slice, thread};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use omerta_verdict::Bucket;

use crate::bpf::{bpf, bpf_open};

// include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_F_INNER_MAP: u32 = 1 << 12;

/// The member of `union bpf_attr` that `BPF_MAP_CREATE` takes, up to the map's name.
#[repr(C)]
struct CreateRequest {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// How long a bank that is not in its place yet is left alone.
const LOOK_AGAIN: Duration = Duration::from_micros(20);

/// The member of `union bpf_attr` that `BPF_MAP_LOOKUP_ELEM` and `BPF_MAP_UPDATE_ELEM` take.
#[repr(C)]
struct ElementRequest {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct InfoRequest {
    fd: u32,
    length: u32,
    info: u64,
}

/// Makes `bank` the one of `number` in `banks`. Returns when programs find it there, which is at once. The
/// kernel's call ends only when none reads the bank before it any more (`maybe_wait_bpf_programs` in
/// kernel/bpf/syscall.c, tens of milliseconds), and what nobody here waits for: programs find out by
/// the generation. So a thread waits in it.
pub fn put(banks: &OwnedFd, number: u32, bank: OwnedFd) -> io::Result<()> {
    let wanted = id(&bank)?;
    let (map, theirs) = (banks.try_clone()?, bank.try_clone()?);
    let write = move |map: &OwnedFd, bank: &OwnedFd| {
        element(BPF_MAP_UPDATE_ELEM, map, number, bank.as_raw_fd() as u32).map(drop)
    };
    let thread = thread::Builder::new().name("omerta-bank".into());
    let Ok(waiting) = thread.spawn(move || write(&map, &theirs)) else {
        return write(banks, &bank);
    };
    loop {
        let done = waiting.is_finished();
        let found = element(BPF_MAP_LOOKUP_ELEM, banks, number, 0);
        match found {
            Ok(found) if found == wanted => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // What is still to be written must not come after what the next commit writes.
                let _ = waiting.join();
                return Err(error);
            }
            _ if done => {
                return match waiting.join() {
                    Ok(Err(error)) => Err(error),
                    _ => Err(io::Error::other("it is not found there")),
                };
            }
            _ => thread::sleep(LOOK_AGAIN),
        }
    }
}

/// Reads (then it is a bank's id) or writes (then it is a bank's descriptor) element `number` of `banks`.
fn element(command: libc::c_int, banks: &OwnedFd, number: u32, value: u32) -> io::Result<u32> {
    let mut value = value;
    let mut request = ElementRequest {
        map: banks.as_raw_fd() as u32,
        padding: 0,
        key: (&raw const number) as u64,
        value: (&raw mut value) as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads `request` and the key, and reads or writes the value, a word each; all
    // outlive the call.
    unsafe { bpf(command, &mut request) }?;
    Ok(value)
}

/// The id of a bank.
fn id(bank: &OwnedFd) -> io::Result<u32> {
    // The head of `struct bpf_map_info`: type and id.
    let mut info = [0_u32; 2];
    let mut request = InfoRequest {
        fd: bank.as_raw_fd() as u32,
        length: size_of_val(&info) as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the kernel reads `request` and writes at most `length` bytes to `info`; both outlive
    // the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut request) }?;
    Ok(info[1])
}

/// A new bank of `count` empty buckets that is in no table yet. Its flags are those that the programs
/// declare for the maps in RULES (ebpf/programs/src/state.rs).
pub fn create(count: usize) -> io::Result<OwnedFd> {
    let mut request = CreateRequest {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<Bucket>() as u32,
        max_entries: u32::try_from(count).map_err(io::Error::other)?,
        map_flags: BPF_F_MMAPABLE | BPF_F_INNER_MAP,
        inner_map_fd: 0,
        numa_node: 0,
        name: *b"BANK\0\0\0\0\0\0\0\0\0\0\0\0",
    };
    // SAFETY: the kernel reads `request`, which outlives the call.
    unsafe { bpf_open(BPF_MAP_CREATE, &mut request) }
}

/// The first buckets of a bank that nobody writes, mapped.
pub struct Mapped {
    start: NonNull<Bucket>,
    count: usize,
}

impl Mapped {
    pub fn of(bank: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        Self::map(bank, count, ProtFlags::PROT_READ)
    }

    fn map(bank: BorrowedFd<'_>, count: usize, protection: ProtFlags) -> io::Result<Self> {
        let bytes = NonZeroUsize::new(count * size_of::<Bucket>())
            .ok_or_else(|| io::Error::other("a bank without buckets"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice, which overlaps nothing. The
        // kernel refuses it where the map is shorter (`array_map_mmap` in kernel/bpf/arraymap.c).
        let start = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, bank, 0)? };
        Ok(Self {
            start: start.cast(),
            count,
        })
    }
}

impl Deref for Mapped {
    type Target = [Bucket];

    fn deref(&self) -> &[Bucket] {
        // SAFETY: mapped with this length; the kernel aligns it to a page and strides it by the value's
        // size, which is that of `Bucket`, of which every bit pattern is valid. Under the guard's lock,
        // nobody writes a bank but its `Spare`.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<Bucket>();
        // SAFETY: mapped with this length; no reference outlives `self`. A failure leaves it mapped.
        let _ = unsafe { munmap(self.start.cast(), bytes) };
    }
}

/// The first buckets of the bank that is not in force, to be filled. Programs that read it meanwhile
/// find that its slot is no longer in force, and throw away what they made of it.
pub struct Spare {
    mapped: Mapped,
    is_empty: bool,
}

impl Spare {
    /// `is_empty` where the bank was never written.
    pub fn of(bank: BorrowedFd<'_>, count: usize, is_empty: bool) -> io::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        Ok(Self {
            mapped: Mapped::map(bank, count, protection)?,
            is_empty,
        })
    }

    /// The buckets, all empty.
    pub fn empty(&mut self) -> &mut [Bucket] {
        // SAFETY: as in `Mapped::deref`; mapped to be written, and borrowed with `self`.
        let buckets =
            unsafe { slice::from_raw_parts_mut(self.mapped.start.as_ptr(), self.mapped.count) };
        if !mem::replace(&mut self.is_empty, false) {
            buckets.fill(Bucket::EMPTY);
        }
        buckets
    }
}
