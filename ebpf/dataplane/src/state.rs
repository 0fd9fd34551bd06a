//! The guard's `STATE`, mapped: what the programs judge by is read and written without a system
//! call, and without the grace period that one would wait for.
//!
//! A commit writes the slot that is not in force, then the generation, which puts it in force. A
//! program that still reads the slot, because it began before the last commit, finds another
//! generation when it has judged, and judges anew (ebpf/programs/src/state.rs).

use std::io;
use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use omerta_verdict::{Slot, State};

const LENGTH: NonZeroUsize = NonZeroUsize::MIN.saturating_add(size_of::<State>() - 1);

/// A mapping of one guard's state. Whoever writes holds the guard's lock.
#[derive(Debug)]
pub struct StateMap {
    state: NonNull<State>,
}

// SAFETY: the mapping belongs to no thread; what programs and other processes may read or write
// meanwhile is accessed atomically, the rest only under the guard's lock.
unsafe impl Send for StateMap {}
// SAFETY: as above.
unsafe impl Sync for StateMap {}

impl StateMap {
    pub fn of(map: impl AsFd) -> io::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, which overlaps nothing. The
        // kernel refuses it where the map's value is shorter, in pages.
        let state = unsafe { mmap(None, LENGTH, protection, MapFlags::MAP_SHARED, map, 0)? };
        Ok(Self {
            state: state.cast(),
        })
    }

    /// The generation in force.
    pub fn generation(&self) -> u64 {
        self.word(offset_of!(State, generation))
            .load(Ordering::Acquire)
    }

    /// When the lease ends, nanoseconds of `CLOCK_MONOTONIC`; 0 where there is none.
    pub fn lease_until_ns(&self) -> u64 {
        self.word(offset_of!(State, lease_until_ns))
            .load(Ordering::Acquire)
    }

    /// Renews or ends the lease. One word, and nothing hangs on it: it needs no lock.
    pub fn set_lease_until_ns(&self, until: u64) {
        self.word(offset_of!(State, lease_until_ns))
            .store(until, Ordering::Release);
    }

    /// Fixes what the programs on the interface name the guard by, before they are there.
    pub fn set_token(&mut self, token: u32) {
        // SAFETY: the word lies within the mapping, and no program knows of the guard yet.
        unsafe { (&raw mut (*self.state.as_ptr()).token).write(token) };
    }

    /// The number of the slot in force.
    pub fn number(&self) -> u32 {
        (self.generation() & 1) as u32
    }

    /// The slot in force, which nobody writes while the guard's lock is held.
    pub fn slot(&self) -> Slot {
        let slot = self.generation() & 1;
        // SAFETY: the slot lies within the mapping; every bit pattern of it is valid.
        unsafe { (&raw const (*self.state.as_ptr()).slots[slot as usize]).read() }
    }

    /// The number of the slot that the next commit writes.
    pub fn next_number(&self) -> u32 {
        (self.generation().wrapping_add(1) & 1) as u32
    }

    /// Puts `slot` in force: with the last store, one word, and not before.
    pub fn commit(&mut self, slot: &Slot) {
        let next = self.generation().wrapping_add(1);
        // The generation that retired the slot is seen before anything that is now written to it.
        fence(Ordering::SeqCst);
        // SAFETY: the slot lies within the mapping, and `slot` apart from it.
        unsafe { (&raw mut (*self.state.as_ptr()).slots[(next & 1) as usize]).write(*slot) };
        self.word(offset_of!(State, generation))
            .store(next, Ordering::Release);
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: callers give the offset of an aligned word of the mapping, which lives as long as
        // `self`.
        unsafe { AtomicU64::from_ptr(self.state.as_ptr().byte_add(offset).cast()) }
    }
}

impl Drop for StateMap {
    fn drop(&mut self) {
        // SAFETY: mapped with this length; no reference outlives `self`. A failure leaves it mapped.
        let _ = unsafe { munmap(self.state.cast(), LENGTH.get()) };
    }
}
