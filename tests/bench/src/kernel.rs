//! The floor that guards are measured against: kernel programs of a few instructions, and running
//! any program on a frame in a loop (`bpf(2)`: aya loads ELF objects only).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_LINK_CREATE: libc::c_int = 28;
/// `BPF_ALU64 | BPF_MOV | BPF_K`, register 0.
const MOVE_TO_R0: u64 = 0xb7;
/// The same, register 1 and 2.
const MOVE_TO_R1: u64 = 0x1b7;
const MOVE_TO_R2: u64 = 0x2b7;
/// `BPF_JMP | BPF_CALL`.
const CALL: u64 = 0x85;
/// `BPF_JMP | BPF_EXIT`.
const EXIT: u64 = 0x95;

/// What a program of one constant is for (`enum bpf_prog_type`).
#[derive(Clone, Copy)]
pub enum Kind {
    /// `BPF_PROG_TYPE_SCHED_CLS`.
    Classifier = 3,
    /// `BPF_PROG_TYPE_XDP`.
    Xdp = 6,
}

/// `union bpf_attr` of BPF_PROG_LOAD, as far as it is used (include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    unused: [u32; 24],
}

/// `union bpf_attr` of BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestAttributes {
    program: u32,
    return_value: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    /// Nanoseconds a run, the kernel's own mean over the repeats.
    duration: u32,
    unused: [u64; 5],
}

/// `union bpf_attr` of BPF_LINK_CREATE for XDP and TCX.
#[repr(C)]
#[derive(Default)]
struct LinkAttributes {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    unused: [u64; 6],
}

/// `union bpf_attr` of BPF_MAP_UPDATE_BATCH.
#[repr(C)]
#[derive(Default)]
struct BatchAttributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// `bpf(2)`.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is one of the structures above: plain integers in the layout of
    // `union bpf_attr`, of which the kernel reads and writes exactly the size given. Whatever
    // their addresses point to is borrowed by the callers for the length of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn descriptor(number: libc::c_long) -> Result<OwnedFd> {
    let number = i32::try_from(number).context("the kernel's descriptor")?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else holds it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A program that only returns `value`.
pub fn constant(kind: Kind, value: i32) -> Result<OwnedFd> {
    load(kind, &[MOVE_TO_R0 | (value as u32 as u64) << 32, EXIT])
}

/// How a program sends a frame on, past the stack (`enum bpf_func_id`).
#[derive(Clone, Copy)]
pub enum SendOn {
    /// `bpf_redirect`: out of the interface.
    Out = 23,
    /// `bpf_redirect_peer`: into the namespace of the interface's peer.
    IntoPeer = 155,
}

/// A classifier that looks at nothing and sends every frame on by the interface of index `to`.
pub fn redirect(to: u32, how: SendOn) -> Result<OwnedFd> {
    let instructions = [
        MOVE_TO_R1 | u64::from(to) << 32,
        MOVE_TO_R2,
        CALL | (how as u64) << 32,
        EXIT,
    ];
    load(Kind::Classifier, &instructions)
}

fn load(kind: Kind, instructions: &[u64]) -> Result<OwnedFd> {
    let license: &CStr = c"GPL";
    let mut attributes = LoadAttributes {
        kind: kind as u32,
        instruction_count: u32::try_from(instructions.len())?,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..LoadAttributes::default()
    };
    descriptor(bpf(BPF_PROG_LOAD, &mut attributes).context("load a program of a few instructions")?)
}

/// Where a program is attached (`enum bpf_attach_type`).
#[derive(Clone, Copy)]
pub enum Hook {
    /// `BPF_XDP`, in driver mode.
    Xdp = 37,
    /// `BPF_TCX_INGRESS`.
    TcxIngress = 46,
}

/// Attaches a program to an interface for as long as the descriptor lives.
pub fn attach(program: impl AsFd, ifindex: u32, hook: Hook) -> Result<OwnedFd> {
    /// include/uapi/linux/if_link.h.
    const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    let mut attributes = LinkAttributes {
        program: program.as_fd().as_raw_fd() as u32,
        ifindex,
        attach_type: hook as u32,
        flags: match hook {
            Hook::Xdp => XDP_FLAGS_DRV_MODE,
            Hook::TcxIngress => 0,
        },
        ..LinkAttributes::default()
    };
    descriptor(bpf(BPF_LINK_CREATE, &mut attributes).context("attach a program")?)
}

/// Runs `program` on `frame` `repeat` times: what it returned last, and nanoseconds a run.
pub fn test_run(program: impl AsFd, frame: &[u8], repeat: u32) -> Result<(i32, f64)> {
    let mut attributes = TestAttributes {
        program: program.as_fd().as_raw_fd() as u32,
        data_size_in: u32::try_from(frame.len())?,
        data_in: frame.as_ptr() as u64,
        repeat,
        ..TestAttributes::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attributes).context("BPF_PROG_TEST_RUN")?;
    Ok((
        attributes.return_value as i32,
        f64::from(attributes.duration),
    ))
}

/// Writes `keys` with their `values` into `map`, whose keys and values these are in size.
pub fn fill<K: aya::Pod, V: aya::Pod>(map: impl AsFd, keys: &[K], values: &[V]) -> Result<()> {
    let mut attributes = BatchAttributes {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: u32::try_from(keys.len().min(values.len()))?,
        map: map.as_fd().as_raw_fd() as u32,
        ..BatchAttributes::default()
    };
    bpf(BPF_MAP_UPDATE_BATCH, &mut attributes).context("fill a map")?;
    Ok(())
}
