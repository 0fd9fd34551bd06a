//! Puts loads from the kernel's own structures in the place of two helpers that every frame would
//! call: see [`ReadInPlace`]. What is loaded is what the helpers read.

use omerta_verdict::ReadInPlace;

use crate::btf::{Btf, Field};

const PROBE_READ_KERNEL: i32 = 113;
const CHECK_MTU: i32 = 163;
/// `src_reg` of a call by the number of a kernel function's type (`BPF_PSEUDO_KFUNC_CALL`).
const KERNEL_FUNCTION: u8 = 2;

/// An instruction (Documentation/bpf/standardization/instruction-set.rst).
type Instruction = [u8; 8];

const fn instruction(code: u8, registers: u8, offset: i16, constant: i32) -> Instruction {
    let [c, d] = offset.to_ne_bytes();
    let [e, f, g, h] = constant.to_ne_bytes();
    [code, registers, c, d, e, f, g, h]
}

const fn set(register: u8, constant: i32) -> Instruction {
    instruction(0xb7, register, 0, constant)
}

const fn copy(to: u8, from: u8) -> Instruction {
    instruction(0xbf, from << 4 | to, 0, 0)
}

const fn call(helper: i32) -> Instruction {
    instruction(0x85, 0, 0, helper)
}

/// `r0 = *(r0 + offset)`, of the width that `code` says.
const fn load(code: u8, offset: i16) -> Instruction {
    instruction(code, 0, offset, 0)
}

const LOAD_BYTE: u8 = 0x71;
const LOAD_WORD: u8 = 0x61;
const LOAD_POINTER: u8 = 0x79;

const SUMMED: [Instruction; 4] = [
    set(0, ReadInPlace::SUMMED),
    set(0, ReadInPlace::SUMMED),
    call(PROBE_READ_KERNEL),
    copy(0, 0),
];
const MTU: [Instruction; 4] = [
    set(0, ReadInPlace::MTU),
    call(CHECK_MTU),
    set(0, 0),
    copy(0, 0),
];

/// `object` with its reads in place; `None` where the kernel of `types` cannot have them so.
pub fn read_in_place(object: &[u8], types: &Btf<'_>) -> Option<Vec<u8>> {
    // The order of registers within an instruction is another on big-endian machines.
    if cfg!(target_endian = "big") {
        return None;
    }
    let cast = i32::try_from(types.function("bpf_rdonly_cast")?).ok()?;
    let cast = instruction(0x85, KERNEL_FUNCTION << 4, 0, cast);
    let buffer = set(2, i32::try_from(types.structure("sk_buff")?).ok()?);
    let [summed, device] = types.fields("sk_buff", ["ip_summed", "dev"])?;
    let [mtu] = types.fields("net_device", ["mtu"])?;
    let offset = |field: Field| i16::try_from(field.bit_offset / 8).ok();
    let reads_summed = [copy(1, 4), buffer, cast, load(LOAD_BYTE, offset(summed)?)];
    let reads_mtu = [
        buffer,
        cast,
        load(LOAD_POINTER, offset(device)?),
        load(LOAD_WORD, offset(mtu)?),
    ];
    let mut object = object.to_vec();
    replace(
        &mut object,
        SUMMED.as_flattened(),
        reads_summed.as_flattened(),
    );
    replace(&mut object, MTU.as_flattened(), reads_mtu.as_flattened());
    Some(object)
}

/// Writes `new` over each `old` that begins at an instruction's place; how many there were.
fn replace(object: &mut [u8], old: &[u8], new: &[u8]) -> usize {
    let mut count = 0;
    let mut at = 0;
    while let Some(window) = object.get_mut(at..at + old.len()) {
        if window == old {
            window.copy_from_slice(new);
            count += 1;
        }
        at += size_of::<Instruction>();
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiled_programs_have_what_is_to_be_replaced() {
        let mut object = crate::object::OBJECT.to_vec();
        let marks = |mark: i32| {
            let mark = set(0, mark);
            let object = crate::object::OBJECT.chunks_exact(8);
            object.filter(|eight| *eight == mark).count()
        };
        let (summed, mtu) = (marks(ReadInPlace::SUMMED), marks(ReadInPlace::MTU));
        assert!(summed > 0 && mtu > 0);
        assert_eq!(
            2 * replace(&mut object, SUMMED.as_flattened(), &[0; 32]),
            summed
        );
        assert_eq!(replace(&mut object, MTU.as_flattened(), &[0; 32]), mtu);
    }

    #[test]
    fn only_whole_instructions_are_replaced() {
        let mut bytes = [1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 3];
        assert_eq!(replace(&mut bytes, &[2, 1, 2, 1, 2, 1, 2, 1], &[0; 8]), 0);
        assert_eq!(replace(&mut bytes, &[1, 2, 1, 2, 1, 2, 1, 2], &[0; 8]), 2);
        assert_eq!(bytes[15..], [0, 3]);
    }
}
