//! The table of flows, as userspace looks at it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::{HashMap, MapData, MapError};
use omerta_verdict::Flow;

use crate::bpf::bpf;
use crate::store::Value;

/// Flows that one guest may have open in conntrack mode; a power of two.
pub const FLOWS: u32 = 4096;

/// When the guest last sent on each flow, in nanoseconds.
pub type FlowMap<M> = HashMap<M, Value<Flow>, u64>;

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

/// Every flow that is in the table from the call's beginning to its end, and some of the others. (Asked
/// key by key, the kernel begins again whenever the guest has a key replaced.)
pub fn all(map: &MapData) -> io::Result<Vec<Flow>> {
    let (mut keys, mut values) = (
        vec![Flow::from_words([0; 5]); FLOWS as usize],
        vec![0_u64; FLOWS as usize],
    );
    let (mut flows, mut position) = (Vec::new(), None::<u32>);
    loop {
        let mut next = 0_u32;
        let mut request = Batch {
            in_batch: position
                .as_ref()
                .map_or(0, |at| std::ptr::from_ref(at) as u64),
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: FLOWS,
            map_fd: map.fd().as_fd().as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the buffers hold `count` keys and values of the map's sizes and outlive the call, as
        // the two positions do.
        let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut request) };
        let ended = match result {
            Ok(_) => false,
            // The last of them, perhaps none.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        flows.extend(keys.iter().take(request.count as usize).copied());
        if ended {
            return Ok(flows);
        }
        position = Some(next);
    }
}

/// Takes `flow` out of the table, where it is in it.
pub fn remove(
    map: &mut FlowMap<impl std::borrow::BorrowMut<MapData>>,
    flow: Flow,
) -> Result<(), MapError> {
    match map.remove(&Value(flow)) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}
