"""Values in memory: parts of them, and what parts make."""

from __future__ import annotations

import z3

from . import bits
from .state import Choice, Lost, Pointer, Value

PACKET = "packet"
# How many values an offset or length may take where it depends on the path or the frame.
MOST_VALUES = 64


def without_packet_pointers(value: Value) -> Value:
    """What is left of a value when the kernel may have moved the packet."""
    if isinstance(value, Pointer) and value.region == PACKET:
        return Lost("a packet pointer from before the packet was moved")
    if isinstance(value, Choice):
        yes, no = without_packet_pointers(value.yes), without_packet_pointers(value.no)
        if yes is not value.yes or no is not value.no:
            return Choice(value.condition, yes, no)
    return value


def part_of(value: Value, index: int) -> Value:
    """One byte of a value."""
    if isinstance(value, Choice):
        return Choice(value.condition, part_of(value.yes, index), part_of(value.no, index))
    if isinstance(value, (int, z3.BitVecRef)):
        return bits.byte(value, index)
    return value if isinstance(value, Lost) else Lost("part of a pointer")


def joined(parts: list[Value]) -> Value:
    """The value whose bytes these are."""
    words = [part for part in parts if isinstance(part, (int, z3.BitVecRef))]
    if len(words) == len(parts):
        return bits.join(words)
    for part in parts:
        if isinstance(part, Lost):
            return part
    condition = next(part.condition for part in parts if isinstance(part, Choice))

    def under(yes: bool) -> list[Value]:
        return [
            (part.yes if yes else part.no)
            if isinstance(part, Choice) and part.condition.eq(condition)
            else part
            for part in parts
        ]

    return Choice(condition, joined(under(True)), joined(under(False)))


def constants_of(word: z3.BitVecRef) -> set[int] | None:
    """The values of a word that is computed from choices between constants; None for others."""
    if z3.is_bv_value(word):
        return {word.as_long()}
    if word.decl().kind() == z3.Z3_OP_ITE:
        yes, no = constants_of(word.arg(1)), constants_of(word.arg(2))
        return None if yes is None or no is None or len(yes | no) > MOST_VALUES else yes | no
    if not word.children() or not all(z3.is_bv(child) for child in word.children()):
        return None
    terms = [[]]
    for child in word.children():
        values = constants_of(child)
        if values is None or len(values) * len(terms) > MOST_VALUES:
            return None
        terms = [[*head, z3.BitVecVal(v, child.size())] for head in terms for v in values]
    return {z3.simplify(word.decl()(*arguments)).as_long() for arguments in terms}
