//! The table of flows, as userspace looks at it.

use std::io;
use std::os::fd::AsFd;

use aya::maps::{HashMap, MapData, MapError};
use omerta_verdict::{FLOWS, Flow};

use crate::bpf::lookup_batch;
use crate::store::Value;

/// When the guest last sent on each flow, in nanoseconds.
pub type FlowMap = HashMap<MapData, Value<Flow>, u64>;

/// Every flow that is in the table from the call's beginning to its end, and some of the others. (Asked
/// key by key, the kernel begins again whenever the guest has a key replaced.)
pub fn all(map: &MapData) -> io::Result<Vec<Flow>> {
    let (mut keys, mut values) = (
        vec![Flow::from_words([0; 5]); FLOWS as usize],
        vec![0_u64; FLOWS as usize],
    );
    let (mut flows, mut position) = (Vec::new(), None);
    loop {
        let map = map.fd().as_fd();
        // SAFETY: the map's keys are flows, its values words.
        let found = unsafe { lookup_batch(map, position, &mut keys, &mut values) }?;
        flows.extend(keys.iter().take(found.count).copied());
        position = found.position;
        if position.is_none() {
            return Ok(flows);
        }
    }
}

/// Takes `flow` out of the table, where it is in it.
pub fn remove(map: &mut FlowMap, flow: Flow) -> Result<(), MapError> {
    match map.remove(&Value(flow)) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}
