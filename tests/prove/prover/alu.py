"""Arithmetic of the BPF instruction set, on words and on pointers."""

from __future__ import annotations

import z3

from . import bits
from .bits import Word
from .elf import Instruction, Unmodelled
from .state import Lost, Pointer, State, Value

ALU = {
    0: "add", 1: "sub", 2: "mul", 3: "div", 4: "or", 5: "and", 6: "lsh", 7: "rsh", 8: "neg",
    9: "mod", 10: "xor", 11: "mov", 12: "arsh", 13: "end",
}  # fmt: skip


def _source(state: State, i: Instruction, width: int) -> Value:
    if i.opcode & 8:
        return state.registers[i.src]
    return i.imm & bits.mask(width)


def alu(state: State, i: Instruction, width: int) -> None:
    op = ALU.get(i.opcode >> 4)
    if op is None:
        raise Unmodelled(f"opcode {i.opcode:#04x} at {state.pc}")
    value = state.registers[i.dst]
    if op == "end":
        state.registers[i.dst] = _end(state, i, value)
        return
    other = _source(state, i, width)
    if op == "mov":
        state.registers[i.dst] = _move(state, i, other, width)
        return
    if op in ("div", "mod") and i.offset:
        raise Unmodelled(f"signed division at {state.pc}")
    if isinstance(value, Pointer) or isinstance(other, Pointer):
        state.registers[i.dst] = _pointer_arithmetic(state, op, value, other, width)
        return
    a = bits.low(word(state, value), width)
    if op == "neg":
        result = bits.arithmetic("sub", 0, a, width)
    else:
        b = bits.low(word(state, other), width)
        result = bits.arithmetic(op, a, b, width)
    state.registers[i.dst] = bits.widen(result, 64)


def _move(state: State, i: Instruction, value: Value, width: int) -> Value:
    if not isinstance(value, (int, z3.BitVecRef)):
        if width == 64 and not i.offset:
            return value
        if isinstance(value, Lost):
            return value
        raise Unmodelled(f"part of a pointer is moved at {state.pc}")
    if i.offset and i.opcode & 8:
        return bits.widen(bits.sign_extend(value, i.offset, width), 64)
    if width == 64 and not i.opcode & 8:
        return bits.sign_extend(i.imm & 0xFFFF_FFFF, 32, 64)
    return bits.widen(bits.low(value, width), 64)


def _end(state: State, i: Instruction, value: Value) -> Word:
    whole = word(state, value)
    always = i.opcode & 7 == 7
    if i.imm not in (16, 32, 64):
        raise Unmodelled(f"byte swap of {i.imm} bits at {state.pc}")
    # Objects are little-endian: to big-endian swaps, to little-endian only cuts.
    if always or i.opcode & 8:
        return bits.widen(bits.swap(whole, i.imm), 64)
    return bits.widen(bits.low(whole, i.imm), 64)


def _pointer_arithmetic(state: State, op: str, value: Value, other: Value, width: int) -> Value:
    if width == 64 and op == "add":
        if isinstance(value, Pointer) and isinstance(other, (int, z3.BitVecRef)):
            return Pointer(value.region, bits.arithmetic("add", value.offset, other, 64))
        if isinstance(other, Pointer) and isinstance(value, (int, z3.BitVecRef)):
            return Pointer(other.region, bits.arithmetic("add", other.offset, value, 64))
    if width == 64 and op == "sub" and isinstance(value, Pointer):
        if isinstance(other, (int, z3.BitVecRef)):
            return Pointer(value.region, bits.arithmetic("sub", value.offset, other, 64))
        if isinstance(other, Pointer) and other.region == value.region:
            return bits.arithmetic("sub", value.offset, other.offset, 64)
    raise Unmodelled(f"{op} of a pointer at {state.pc}")


def word(state: State, value: Value) -> Word:
    if isinstance(value, (int, z3.BitVecRef)):
        return value
    raise Unmodelled(f"{value} is used as a number at {state.pc}")
