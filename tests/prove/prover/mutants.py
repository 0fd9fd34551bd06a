"""Programs made wrong on purpose, to show that the claims can fail.

A mutant is the program with one conditional jump that is always taken, or never. All mutants are
run at once: an unknown number names the jump that is forced. For a claim those are tried first, one
after the other, whose jumps depend on the inputs of which the claim speaks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import z3

from .elf import Object

NUMBER = z3.BitVec("mutant", 16)
# What the names of the inputs begin with that a frame brings.
FRAME = ("frame[", "skb.", "length", "linear")


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


def number(mutant: Mutant) -> z3.BitVecNumRef:
    return z3.BitVecVal(2 * mutant.pc + mutant.taken, NUMBER.size())


class Mutants:
    """All mutants of a program, and of which inputs their jumps' conditions are made."""

    def __init__(self) -> None:
        self._names = Names()
        self._inputs: dict[int, frozenset[str]] = {}

    def branch(self, pc: int, condition: z3.BoolRef) -> z3.BoolRef:
        """The condition of the jump at `pc` in the mutant that `NUMBER` names."""
        known = self._inputs.get(pc, frozenset())
        self._inputs[pc] = known | self._names.of(condition)
        always, never = (number(Mutant(pc, taken)) for taken in (True, False))
        return z3.Or(NUMBER == always, z3.And(NUMBER != never, condition))

    def nearest(self, names: Iterable[str]) -> list[Mutant]:
        """All: first those of the jumps whose inputs are nearest to those of `names`."""
        wanted = frozenset(names)

        def distance(pc: int) -> tuple[float, int]:
            inputs = self._inputs[pc]
            return 1 - len(inputs & wanted) / max(len(inputs | wanted), 1), pc

        jumps = sorted(self._inputs, key=distance)
        return [Mutant(pc, taken) for pc in jumps for taken in (False, True)]


class Names:
    """What of the frame, its context and its length terms are made of."""

    def __init__(self) -> None:
        # With the terms, so that no other gets the number of one.
        self._known: dict[int, tuple[frozenset[str], z3.ExprRef]] = {}

    def of(self, term: z3.ExprRef) -> frozenset[str]:
        waiting = [term]
        while waiting:
            top = waiting[-1]
            parts = top.children()
            unknown = [part for part in parts if part.get_id() not in self._known]
            if unknown and top.get_id() not in self._known:
                waiting += unknown
                continue
            waiting.pop()
            names = frozenset[str]().union(*[self._known[part.get_id()][0] for part in parts])
            if not parts and top.decl().kind() == z3.Z3_OP_UNINTERPRETED:
                # What was read several times, as often anew, has one name.
                name = top.decl().name().partition("#")[0]
                names = frozenset([name] if name.startswith(FRAME) else [])
            self._known[top.get_id()] = names, top
        return self._known[term.get_id()][0]


def patch(content: bytes, program: Object, mutant: Mutant) -> bytes:
    """The object file with the jump replaced by `ja`, to its target or to what follows it."""
    place = program.places[mutant.pc]
    opcode, _, offset, _ = struct.unpack_from("<BBhi", content, place)
    if opcode & 7 not in (5, 6) or opcode >> 4 in (0, 8, 9):
        raise ValueError(f"no conditional jump at {mutant.pc}")
    changed = struct.pack("<BBhi", 0x05, 0, offset if mutant.taken else 0, 0)
    return content[:place] + changed + content[place + len(changed) :]
