//! Maps as bpf(2) makes and holds them: those of one guard, and the tables in which the programs find
//! them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::bpf::{bpf, bpf_open};
use crate::link::{ObjectInfo, object_info};

// include/uapi/linux/bpf.h.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_FD_BY_ID: libc::c_int = 14;
pub const BPF_MAP_TYPE_HASH: u32 = 1;
pub const BPF_MAP_TYPE_ARRAY: u32 = 2;
pub const BPF_MAP_TYPE_PROG_ARRAY: u32 = 3;
pub const BPF_MAP_TYPE_PERCPU_ARRAY: u32 = 6;
pub const BPF_MAP_TYPE_RINGBUF: u32 = 27;
pub const BPF_F_MMAPABLE: u32 = 1 << 10;
pub const BPF_F_INNER_MAP: u32 = 1 << 12;

/// How long what is not in its place yet is left alone.
const LOOK_AGAIN: Duration = Duration::from_micros(20);

/// What a map is made as.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// As the kernel shows it.
    pub name: &'static str,
    pub map_type: u32,
    /// Bytes of a key.
    pub key: usize,
    /// Bytes of a value.
    pub value: usize,
    pub entries: u32,
    pub flags: u32,
}

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

/// The member of `union bpf_attr` that commands on one element take.
#[repr(C)]
struct ElementRequest {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The head of `struct bpf_map_info`.
#[derive(Default)]
#[repr(C)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}
// SAFETY: as asked for.
unsafe impl ObjectInfo for MapInfo {}

#[repr(C)]
struct IdRequest {
    id: u32,
    next: u32,
    flags: u32,
}

/// A new map, without type information.
pub fn create(shape: &Shape) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    for (byte, given) in name[..15].iter_mut().zip(shape.name.bytes()) {
        *byte = given;
    }
    let mut request = CreateRequest {
        map_type: shape.map_type,
        key_size: u32::try_from(shape.key).map_err(io::Error::other)?,
        value_size: u32::try_from(shape.value).map_err(io::Error::other)?,
        max_entries: shape.entries,
        map_flags: shape.flags,
        inner_map_fd: 0,
        numa_node: 0,
        name,
    };
    // SAFETY: the kernel reads `request`, which outlives the call.
    unsafe { bpf_open(BPF_MAP_CREATE, &mut request) }
}

/// Carries out `command` on element `number` of `map`, an array of descriptors: reads (then it is an id)
/// or writes (then it is a descriptor) its value.
fn element(command: libc::c_int, map: BorrowedFd<'_>, number: u32, value: u32) -> io::Result<u32> {
    let mut value = value;
    let mut request = ElementRequest {
        map: map.as_raw_fd() as u32,
        padding: 0,
        key: (&raw const number) as u64,
        value: match command {
            BPF_MAP_DELETE_ELEM => 0,
            _ => (&raw mut value) as u64,
        },
        flags: 0,
    };
    // SAFETY: the kernel reads `request` and the key, and reads or writes the value, a word each; all
    // outlive the call.
    unsafe { bpf(command, &mut request) }?;
    Ok(value)
}

/// Writes the descriptor of a map or program to element `number` of `map`. Of a table this waits for all
/// programs that run (`maybe_wait_bpf_programs` in kernel/bpf/syscall.c).
pub fn set(map: BorrowedFd<'_>, number: u32, of: BorrowedFd<'_>) -> io::Result<()> {
    element(BPF_MAP_UPDATE_ELEM, map, number, of.as_raw_fd() as u32).map(drop)
}

/// The id of what is in element `number` of `table`, where something is.
pub fn id_in(table: BorrowedFd<'_>, number: u32) -> io::Result<Option<u32>> {
    match element(BPF_MAP_LOOKUP_ELEM, table, number, 0) {
        Ok(id) => Ok(Some(id)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The map in element `number` of `table`, where one is.
pub fn map_in(table: BorrowedFd<'_>, number: u32) -> io::Result<Option<OwnedFd>> {
    let Some(id) = id_in(table, number)? else {
        return Ok(None);
    };
    let mut request = IdRequest {
        id,
        next: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `request`, which outlives the call.
    match unsafe { bpf_open(BPF_MAP_GET_FD_BY_ID, &mut request) } {
        Ok(map) => Ok(Some(map)),
        // It went meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The id of a map.
pub fn id(map: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(object_info::<MapInfo>(&map)?.id)
}

/// How many entries a map has room for.
pub fn entries(map: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(object_info::<MapInfo>(&map)?.max_entries)
}

/// Puts a map in element `number` of a table.
pub struct Put<'a> {
    pub table: BorrowedFd<'a>,
    pub number: u32,
    pub map: BorrowedFd<'a>,
}

/// Puts all of these in their places. Returns when programs find them there, which is at once. The
/// kernel's calls end only when no program reads what was there before any more (tens of
/// milliseconds), and what nobody here waits for. So a thread waits in each.
pub fn put(all: &[Put<'_>]) -> io::Result<()> {
    let mut writing = Vec::with_capacity(all.len());
    for one in all {
        let (table, map, number) = (
            one.table.try_clone_to_owned()?,
            one.map.try_clone_to_owned()?,
            one.number,
        );
        let thread = thread::Builder::new().name("omerta-table".into());
        let begun = thread.spawn(move || set(table.as_fd(), number, map.as_fd()));
        let waiting = match begun {
            Ok(waiting) => Some(waiting),
            Err(_) => {
                set(one.table, number, one.map)?;
                None
            }
        };
        writing.push(Writing {
            put: one,
            wanted: id(one.map)?,
            waiting,
        });
    }
    let mut first = Ok(());
    for one in writing {
        // What is still to be written must not come after what the next change writes, so all are awaited,
        // also after one has failed.
        let done = one.done();
        first = first.and(done);
    }
    first
}

struct Writing<'a> {
    put: &'a Put<'a>,
    wanted: u32,
    waiting: Option<JoinHandle<io::Result<()>>>,
}

impl Writing<'_> {
    fn done(mut self) -> io::Result<()> {
        loop {
            let is_over = self.waiting.as_ref().is_none_or(JoinHandle::is_finished);
            match id_in(self.put.table, self.put.number) {
                Ok(Some(found)) if found == self.wanted => return Ok(()),
                Err(error) => {
                    let _ = self.waiting.take().map(JoinHandle::join);
                    return Err(error);
                }
                Ok(_) if is_over => {
                    return match self.waiting.take().map(JoinHandle::join) {
                        Some(Ok(Err(error))) => Err(error),
                        _ => Err(io::Error::other("it is not found there")),
                    };
                }
                Ok(_) => thread::sleep(LOOK_AGAIN),
            }
        }
    }
}

/// Takes what is there out of these elements of tables. Returns when no program reads it any more.
pub fn take_out(all: &[(BorrowedFd<'_>, u32)]) -> io::Result<()> {
    let remove = |table, number| match element(BPF_MAP_DELETE_ELEM, table, number, 0) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    // Each waits for the same grace period.
    thread::scope(|scope| {
        let removing: Vec<_> = all
            .iter()
            .map(|(table, number)| scope.spawn(move || remove(*table, *number)))
            .collect();
        removing.into_iter().try_for_each(|one| {
            one.join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread died")))
        })
    })
}
