"""How two states become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import z3

from . import bits
from .bits import Truth
from .cells import part_of
from .state import (
    UNWRITTEN_STACK,
    Cell,
    Choice,
    Entry,
    Frame,
    Memory,
    Pointer,
    State,
    Value,
    same_value,
)


def _by_kind(value: Value, width: int) -> dict[object, tuple[Truth, Value]]:
    """What a choice is between, and when it is which: one value of each kind."""
    if not isinstance(value, Choice):
        return {_kind(value): (True, value)}
    found = _by_kind(value.no, width)
    no = bits.negate(value.condition)
    found = {kind: (bits.every([no, held]), one) for kind, (held, one) in found.items()}
    for kind, (held, one) in _by_kind(value.yes, width).items():
        other_held, other = found.get(kind, (False, None))
        both = bits.some([bits.every([value.condition, held]), other_held])
        found[kind] = (both, _one(value.condition, one, other, width))
    return found


def _kind(value: Value) -> object:
    """Values of the same kind can be one value."""
    if isinstance(value, (int, z3.BitVecRef)):
        return "word"
    return value.region if isinstance(value, Pointer) else value


def _one(condition: z3.BoolRef, a: Value | None, b: Value | None, width: int) -> Value:
    """Two values of a kind as one, or the one that there is."""
    if a is None or b is None:
        found = b if a is None else a
        assert found is not None
        return found
    if isinstance(a, Pointer) and isinstance(b, Pointer):
        return Pointer(a.region, bits.choose(condition, a.offset, b.offset, 64))
    if isinstance(a, (int, z3.BitVecRef)) and isinstance(b, (int, z3.BitVecRef)):
        return bits.choose(condition, a, b, width)
    return a


class Merge:
    """Merges two states of the same key that exclude each other."""

    def __init__(self, a: State, b: State, unknown: Callable[[str, int], Memory]) -> None:
        """`unknown` gives a cell for a byte of a region that nobody has read or written yet."""
        self.a, self.b = a, b
        self.unknown = unknown
        self.values: dict[tuple[int, int, int], Value] = {}
        shared = 0
        for x, y in zip(a.path, b.path, strict=False):
            if not x.eq(y):
                break
            shared += 1
        rest_a, rest_b = a.path[shared:], b.path[shared:]
        if not rest_a or not rest_b:
            raise AssertionError("two states that do not exclude each other")
        self.condition = _condition(rest_a, rest_b)
        self.path = a.path[:shared] + _either(rest_a, rest_b)

    def result(self) -> State:
        a, b = self.a, self.b
        return State(
            pc=a.pc,
            registers=[self.value(x, y, 64) for x, y in zip(a.registers, b.registers, strict=True)],
            length=bits.choose(self.condition, a.length, b.length, 32),
            linear=bits.choose(self.condition, a.linear, b.linear, 32),
            mark=bits.choose(self.condition, a.mark, b.mark, 32),
            callers=tuple(
                Frame(
                    x.return_to,
                    x.callee,
                    tuple(self.value(v, w, 64) for v, w in zip(x.saved, y.saved, strict=True)),
                )
                for x, y in zip(a.callers, b.callers, strict=True)
            ),
            path=self.path,
            log=self.logs(),
            slot_reads=a.slot_reads.merged(self.condition, b.slot_reads),
            memory=self.memories(),
            frame_changed=a.frame_changed,
            returned_from=a.returned_from,
            paths=a.paths + b.paths,
        )

    def value(self, a: Value, b: Value, width: int) -> Value:
        if same_value(a, b):
            return a
        known = (id(a), id(b), width)
        if known not in self.values:
            self.values[known] = self._value(a, b, width)
        return self.values[known]

    def _value(self, a: Value, b: Value, width: int) -> Value:
        """One value of each kind, whatever the number of paths."""
        ours, theirs = _by_kind(a, width), _by_kind(b, width)
        nothing: tuple[Truth, Value | None] = (False, None)
        *rest, last = ours | theirs
        chosen = self._of_kind(ours.get(last, nothing), theirs.get(last, nothing), width)[1]
        for kind in reversed(rest):
            held, value = self._of_kind(ours.get(kind, nothing), theirs.get(kind, nothing), width)
            assert not isinstance(held, bool)
            chosen = Choice(held, value, chosen)
        return chosen

    def _of_kind(
        self, ours: tuple[Truth, Value | None], theirs: tuple[Truth, Value | None], width: int
    ) -> tuple[Truth, Value]:
        held = bits.either(self.condition, ours[0], theirs[0])
        return held, _one(self.condition, ours[1], theirs[1], width)

    def logs(self) -> tuple[Entry, ...]:
        a, b = self.a.log, self.b.log
        shared = 0
        while shared < min(len(a), len(b)) and a[shared] is b[shared]:
            shared += 1
        no = bits.negate(self.condition)
        return (
            a[:shared]
            + tuple(replace(e, guard=bits.every([self.condition, e.guard])) for e in a[shared:])
            + tuple(replace(e, guard=bits.every([no, e.guard])) for e in b[shared:])
        )

    def memories(self) -> dict[str, Memory]:
        merged = {}
        for region in self.a.memory.keys() | self.b.memory.keys():
            a, b = self.a.memory.get(region), self.b.memory.get(region)
            if a is b and a is not None:
                merged[region] = a
            else:
                merged[region] = self.memory(region, a or {}, b or {})
        return merged

    def memory(self, region: str, a: Memory, b: Memory) -> Memory:
        merged = {}
        for offset in a.keys() | b.keys():
            x, y = a.get(offset), b.get(offset)
            if x is None and y is not None:
                x = self._missing(region, offset, y)
            elif y is None and x is not None:
                y = self._missing(region, offset, x)
            assert x is not None and y is not None
            merged[offset] = x if x is y else self.cell(x, y)
        return merged

    def _missing(self, region: str, offset: int, other: Cell) -> Cell:
        found = self.unknown(region, offset)
        return found[offset] if found else Cell(UNWRITTEN_STACK, other.index, other.size)

    def cell(self, a: Cell, b: Cell) -> Cell:
        if a.index == b.index and a.size == b.size:
            return Cell(self.value(a.value, b.value, 8 * a.size), a.index, a.size)
        x, y = part_of(a.value, a.index), part_of(b.value, b.index)
        return Cell(x if same_value(x, y) else self._value(x, y, 8), 0, 1)


def _complement(a: z3.BoolRef, b: z3.BoolRef) -> bool:
    return (z3.is_not(a) and a.arg(0).eq(b)) or (z3.is_not(b) and b.arg(0).eq(a))


def _condition(a: tuple[z3.BoolRef, ...], b: tuple[z3.BoolRef, ...]) -> z3.BoolRef:
    """What holds on the first path and not on the second."""
    if _complement(a[0], b[0]):
        return a[0]
    if len(a) <= len(b):
        return z3.And(*a) if len(a) > 1 else a[0]
    return bits.negate(z3.And(*b) if len(b) > 1 else b[0])


def _either(a: tuple[z3.BoolRef, ...], b: tuple[z3.BoolRef, ...]) -> tuple[z3.BoolRef, ...]:
    """The conditions of the two paths together."""
    if _complement(a[0], b[0]):
        # c or (not c and rest) is c or rest.
        if len(a) == 1 and len(b) == 1:
            return ()
        if len(a) == 1:
            b = b[1:]
        elif len(b) == 1:
            a = a[1:]
    every_a = z3.And(*a) if len(a) > 1 else a[0]
    every_b = z3.And(*b) if len(b) > 1 else b[0]
    return (z3.Or(every_a, every_b),)
