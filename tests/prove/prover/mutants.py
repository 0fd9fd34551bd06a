"""Programs made wrong on purpose, to show that the claims can fail.

A mutant is the program with one conditional jump that is always taken, or never. All mutants are
run at once: an unknown number names the jump that is forced, so that the solver finds for each
claim a mutant that violates it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import z3

from .elf import Object

NUMBER = z3.BitVec("mutant", 16)


@dataclass(frozen=True)
class Mutant:
    """A conditional jump that is forced."""

    pc: int
    taken: bool

    def describe(self, program: Object) -> str:
        place = program.sources.get(self.pc)
        if place is None:
            before = [pc for pc in program.sources if pc < self.pc]
            place = program.sources[max(before)] if before else "?"
        return f"jump {self.pc} ({place}) {'always' if self.taken else 'never'} taken"


def number(mutant: Mutant) -> int:
    return 2 * mutant.pc + mutant.taken


def of_number(value: int) -> Mutant:
    return Mutant(value // 2, bool(value % 2))


def branch(pc: int, condition: z3.BoolRef) -> z3.BoolRef:
    """The condition of the jump at `pc` in the mutant that `NUMBER` names."""
    always, never = (number(Mutant(pc, taken)) for taken in (True, False))
    return z3.Or(NUMBER == always, z3.And(NUMBER != never, condition))


def patch(content: bytes, program: Object, mutant: Mutant) -> bytes:
    """The object file with the jump replaced by `ja`, to its target or to what follows it."""
    place = program.places[mutant.pc]
    opcode, _, offset, _ = struct.unpack_from("<BBhi", content, place)
    if opcode & 7 not in (5, 6) or opcode >> 4 in (0, 8, 9):
        raise ValueError(f"no conditional jump at {mutant.pc}")
    changed = struct.pack("<BBhi", 0x05, 0, offset if mutant.taken else 0, 0)
    return content[:place] + changed + content[place + len(changed) :]
