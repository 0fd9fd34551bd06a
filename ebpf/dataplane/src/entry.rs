//! The programs on a guest's interface: ten instructions each, which name the guard and go on with the
//! program that judges for all guards. Only what is written into them tells whose frames these are, so
//! it stays so whatever the interface is called and wherever it is moved.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use omerta_verdict::Direction;

use crate::bpf::bpf_open;

// include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_FUNC_TAIL_CALL: i32 = 12;
const BPF_PSEUDO_MAP_FD: u8 = 1;
/// Offset of `cb[0]` in `struct __sk_buff`.
const CONTROL_BLOCK: i16 = 48;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The member of `union bpf_attr` that `BPF_PROG_LOAD` takes, up to the program's name.
#[repr(C)]
struct LoadRequest {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// The name of the program on the interface, as the kernel shows it.
pub const fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "tap_egress",
        Direction::Ingress => "tap_ingress",
    }
}

/// Loads the program of `direction` for the guard of `place` and `token`, which goes on with that element
/// of `judges`. Where there is none, what comes is dropped.
pub fn load(
    judges: BorrowedFd<'_>,
    direction: Direction,
    place: u32,
    token: u32,
) -> io::Result<OwnedFd> {
    const R0: u8 = 0;
    const R1: u8 = 1;
    const R2: u8 = 2;
    const R3: u8 = 3;
    let one = |code, destination: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: if cfg!(target_endian = "big") {
            destination << 4 | source
        } else {
            source << 4 | destination
        },
        offset,
        immediate,
    };
    // BPF_MOV | BPF_K of 64 bits; BPF_STX and BPF_MEM of a word; BPF_LD | BPF_IMM | BPF_DW; BPF_CALL; BPF_EXIT
    // (Documentation/bpf/standardization/instruction-set.rst).
    let (mov, mov32, store, load_map, call, exit) = (0xb7, 0xb4, 0x63, 0x18, 0x85, 0x95);
    let instructions = [
        one(mov32, R2, 0, 0, place as i32),
        one(store, R1, R2, CONTROL_BLOCK, 0),
        one(mov32, R2, 0, 0, token as i32),
        one(store, R1, R2, CONTROL_BLOCK + 4, 0),
        one(load_map, R2, BPF_PSEUDO_MAP_FD, 0, judges.as_raw_fd()),
        one(0, 0, 0, 0, 0),
        one(mov, R3, 0, 0, direction as i32),
        one(call, 0, 0, 0, BPF_FUNC_TAIL_CALL),
        one(mov, R0, 0, 0, SHOT),
        one(exit, 0, 0, 0, 0),
    ];
    let mut name_bytes = [0; 16];
    name_bytes[..name(direction).len()].copy_from_slice(name(direction).as_bytes());
    let mut request = LoadRequest {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: name_bytes,
    };
    // SAFETY: the kernel reads `request`, the instructions and the license, which outlive the call.
    unsafe { bpf_open(BPF_PROG_LOAD, &mut request) }
}
