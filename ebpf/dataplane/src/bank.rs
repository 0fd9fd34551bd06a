//! One bank of an allowlist: a BPF array of buckets, of the size that the allowlist needs.
//!
//! It is written and read through a mapping, which for 100,000 endpoints takes a hundredth of the
//! time that system calls for each bucket do.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use omerta_verdict::Bucket;

use crate::bpf::bpf_open;

// include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_int = 0;
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

/// A new bank that holds `buckets` and is in no table yet. Its flags are those that the programs
/// declare for the maps in RULES (ebpf/programs/src/state.rs).
pub fn create(buckets: &[Bucket]) -> io::Result<OwnedFd> {
    let mut request = CreateRequest {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<Bucket>() as u32,
        max_entries: u32::try_from(buckets.len()).map_err(io::Error::other)?,
        map_flags: BPF_F_MMAPABLE | BPF_F_INNER_MAP,
        inner_map_fd: 0,
        numa_node: 0,
        name: *b"BANK\0\0\0\0\0\0\0\0\0\0\0\0",
    };
    // SAFETY: the kernel reads `request`, which outlives the call.
    let map = unsafe { bpf_open(BPF_MAP_CREATE, &mut request) }?;
    write(map.as_fd(), buckets)?;
    Ok(map)
}

/// Writes `buckets` to the start of a bank. Programs that read it meanwhile find that its slot is no
/// longer in force.
pub fn write(map: BorrowedFd<'_>, buckets: &[Bucket]) -> io::Result<()> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    with_mapping(map, buckets.len(), protection, |mapping| {
        // SAFETY: the mapping is as long as `buckets` and apart from it; the kernel aligns it to a
        // page and strides it by the value's size, which is that of `Bucket`.
        unsafe { ptr::copy_nonoverlapping(buckets.as_ptr(), mapping.as_ptr(), buckets.len()) }
    })
}

/// The `count` buckets of a bank that nobody writes.
pub fn read(map: BorrowedFd<'_>, count: usize) -> io::Result<Vec<Bucket>> {
    let mut buckets = vec![Bucket::EMPTY; count];
    with_mapping(map, count, ProtFlags::PROT_READ, |mapping| {
        // SAFETY: as in `write`; every bit pattern of a bucket is valid.
        unsafe { ptr::copy_nonoverlapping(mapping.as_ptr(), buckets.as_mut_ptr(), count) }
    })?;
    Ok(buckets)
}

fn with_mapping(
    map: BorrowedFd<'_>,
    count: usize,
    protection: ProtFlags,
    work: impl FnOnce(NonNull<Bucket>),
) -> io::Result<()> {
    let bytes = NonZeroUsize::new(count * size_of::<Bucket>())
        .ok_or_else(|| io::Error::other("a bank without buckets"))?;
    // SAFETY: a fresh mapping at an address of the kernel's choice, which overlaps nothing. The
    // kernel refuses it where the map is shorter (`array_map_mmap` in kernel/bpf/arraymap.c).
    let mapping = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, map, 0)? };
    work(mapping.cast());
    // SAFETY: made above with this length; `work` has given the pointer back.
    unsafe { munmap(mapping, bytes.get())? };
    Ok(())
}
