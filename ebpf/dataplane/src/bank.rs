//! One bank of an allowlist: a BPF array of buckets, of the size that the allowlist needs.
//!
//! It is filled and read in place, through a mapping. The kernel enters all of a bank's pages when it is
//! mapped (and has cleared them when it was made), so none of them faults.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::{io, mem, slice};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use omerta_verdict::Bucket;

use crate::map::{self, BPF_F_INNER_MAP, BPF_F_MMAPABLE, BPF_MAP_TYPE_ARRAY, Shape};

/// A new bank of `count` empty buckets that is in no table yet. Its flags are those that the programs
/// declare for the maps in RULES (ebpf/programs/src/state.rs).
pub fn create(count: usize) -> io::Result<OwnedFd> {
    map::create(&Shape {
        name: "BANK",
        map_type: BPF_MAP_TYPE_ARRAY,
        key: size_of::<u32>(),
        value: size_of::<Bucket>(),
        entries: u32::try_from(count).map_err(io::Error::other)?,
        flags: BPF_F_MMAPABLE | BPF_F_INNER_MAP,
    })
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
