"""Atomic operations of the BPF instruction set."""

from __future__ import annotations

import z3

from . import bits
from .elf import Instruction, Unmodelled
from .memory import Memories
from .state import Pointer, State, Value

_ARITHMETIC = {0x00: "add", 0x40: "or", 0x50: "and", 0xA0: "xor"}


def atomic(memory: Memories, state: State, pointer: Pointer, size: int, i: Instruction) -> None:
    region = memory.regions[pointer.region]
    if region.kind not in ("private", "shared", "stack") or not memory.within(state, pointer, size):
        raise Unmodelled(f"an atomic operation on {pointer.region} at {state.pc}")
    operand = state.registers[i.src]
    if not isinstance(operand, (int, z3.BitVecRef)):
        raise Unmodelled(f"an atomic operation with {operand} at {state.pc}")
    operand = bits.low(operand, 8 * size)
    old: Value = memory.machine.fresh(region.map, 8 * size)
    if region.kind != "shared":
        assert isinstance(pointer.offset, int)
        old = memory.load_cells(state, pointer.region, pointer.offset, size)
    if not isinstance(old, (int, z3.BitVecRef)):
        raise Unmodelled(f"an atomic operation on {old} at {state.pc}")
    result: int | None = i.src if i.imm & 1 else None
    if i.imm & ~1 in _ARITHMETIC:
        new = bits.arithmetic(_ARITHMETIC[i.imm & ~1], old, operand, 8 * size)
    elif i.imm == 0xE1:
        new = operand
    elif i.imm == 0xF1:
        expected = state.registers[0]
        if not isinstance(expected, (int, z3.BitVecRef)):
            raise Unmodelled(f"cmpxchg against {expected} at {state.pc}")
        equal = bits.compare("eq", old, bits.low(expected, 8 * size), 8 * size)
        new = (
            (operand if equal else old)
            if isinstance(equal, bool)
            else bits.choose(equal, operand, old, 8 * size)
        )
        result = 0
    else:
        raise Unmodelled(f"atomic operation {i.imm:#x} at {state.pc}")
    memory.store(state, pointer, size, new)
    if result is not None:
        state.registers[result] = bits.widen(old, 64)
