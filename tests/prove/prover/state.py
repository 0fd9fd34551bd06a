"""What a program knows at one instruction, and how two such states become one.

Where paths meet, their states are merged exactly: each value that differs becomes "this one if
the condition holds, else that one". No path is dropped and none is weakened, and the number of
states stays that of the instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import z3

from . import bits
from .bits import Truth, Word


@dataclass(frozen=True)
class Pointer:
    """A place in a region of memory; the region's real address is never known."""

    region: str
    offset: Word


@dataclass(frozen=True)
class MapReference:
    """A map: what ld_imm64 of it gives, or for an inner map what a lookup gave."""

    name: str
    # Of a bank in RULES: the number of the generation that chose its slot.
    generation: int | None = None


@dataclass(frozen=True)
class Lost:
    """No value that may be used: never written, or a pointer that the kernel has invalidated."""

    why: str


@dataclass(frozen=True, eq=False)
class Choice:
    """One of two values of different kinds; told apart only when used."""

    condition: z3.BoolRef
    yes: Value
    no: Value


Value = int | z3.BitVecRef | Pointer | MapReference | Lost | Choice

UNWRITTEN = Lost("a value that was never written")
# The kernel lets privileged programs read it, as copies of padding do: it may hold anything.
UNWRITTEN_STACK = Lost("stack that was never written")


@dataclass(frozen=True)
class Cell:
    """One byte of memory: byte `index` of `value`, which was stored with `size` bytes."""

    value: Value
    index: int
    size: int


Memory = dict[int, Cell]


@dataclass(frozen=True, eq=False)
class Entry:
    """Something that the program did, and the condition under which this path did it."""

    kind: str
    guard: Truth
    args: tuple[object, ...]


@dataclass(frozen=True)
class Frame:
    """A caller: where to return to, and its r6 to r9."""

    return_to: int
    callee: int
    saved: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class SlotReads:
    """What the last judgement on a path has read of its slot (`slots.py`).

    `judgement` is the number of its generation, plus one; 0 where there was none.
    """

    judgement: Word = 0
    # By the generation's number: whether something was read since it was last known to be in force.
    pending: dict[int, Truth] = field(default_factory=dict)
    # By the bucket's number: whether it was read.
    buckets: dict[int, Truth] = field(default_factory=dict)

    def read(self, generation: int, kept: list[int], bucket: int | None) -> SlotReads:
        """The slot of that generation is read. Buckets of others than `kept` are forgotten."""
        same = self.judgement == generation + 1 if isinstance(self.judgement, int) else False
        if same and self.pending[generation] is True:
            if bucket is None or self.buckets.get(bucket) is True:
                return self
        buckets = {number: self.buckets[number] for number in kept}
        if bucket is not None:
            buckets[bucket] = True
        return SlotReads(generation + 1, {generation: True}, buckets)

    def confirmed(self, generations: list[z3.BitVecRef], value: z3.BitVecRef) -> SlotReads:
        """The generation is read: what was read by the same one counts."""
        pending = {
            number: bits.every([was, bits.compare("ne", generations[number], value, 64)])
            for number, was in self.pending.items()
        }
        return replace(self, pending=pending)

    def merged(self, condition: z3.BoolRef, other: SlotReads) -> SlotReads:
        """These where the condition holds, else the others."""

        def both(a: dict[int, Truth], b: dict[int, Truth]) -> dict[int, Truth]:
            return {
                number: bits.either(condition, a.get(number, False), b.get(number, False))
                for number in a | b
            }

        if self is other:
            return self
        judgement = bits.choose(condition, self.judgement, other.judgement, 16)
        pending = both(self.pending, other.pending)
        return SlotReads(judgement, pending, both(self.buckets, other.buckets))


@dataclass
class State:
    """A program's state. `frame_changed` tells whether the packet's bytes may have been."""

    pc: int
    registers: list[Value]
    length: Word
    linear: Word
    mark: Word
    callers: tuple[Frame, ...] = ()
    path: tuple[z3.BoolRef, ...] = ()
    log: tuple[Entry, ...] = ()
    slot_reads: SlotReads = SlotReads()
    memory: dict[str, Memory] = field(default_factory=dict)
    frame_changed: bool = False
    # The function that has just returned, where that matters (`tries.py`).
    returned_from: int | None = None
    # How many paths of the program this state stands for.
    paths: int = 1
    _owned: set[str] = field(default_factory=set)

    def fork(self, *conditions: Truth) -> State:
        """A copy under further conditions."""
        self._owned = set()
        added = tuple(c for c in conditions if not isinstance(c, bool))
        return replace(
            self,
            registers=list(self.registers),
            path=self.path + added,
            memory=dict(self.memory),
            _owned=set(),
        )

    def writable(self, region: str) -> Memory:
        """The region's memory, shared with no other state."""
        if region not in self._owned:
            self.memory[region] = dict(self.memory.get(region, {}))
            self._owned.add(region)
        return self.memory[region]

    def note(self, kind: str, *args: object) -> None:
        self.log += (Entry(kind, True, args),)

    def key(self) -> tuple[object, ...]:
        """States with the same key are merged."""
        calls = tuple(frame.return_to for frame in self.callers)
        return (self.pc, calls, self.frame_changed, self.returned_from)

    def replace_values(self, change: Callable[[Value], Value]) -> None:
        """Applies `change` to every value held in registers and memory."""
        changed: dict[int, Value] = {}

        def once(value: Value) -> Value:
            # The bytes of one value stay the bytes of one value.
            if id(value) not in changed:
                changed[id(value)] = change(value)
            return changed[id(value)]

        self.registers = [once(value) for value in self.registers]
        self.callers = tuple(
            Frame(frame.return_to, frame.callee, tuple(once(value) for value in frame.saved))
            for frame in self.callers
        )
        for region in list(self.memory):
            memory = self.writable(region)
            old = list(memory.items())
            for offset, cell in old:
                new = once(cell.value)
                if new is not cell.value:
                    memory[offset] = Cell(new, cell.index, cell.size)


def same_value(a: Value, b: Value) -> bool:
    if a is b:
        return True
    if isinstance(a, Pointer) and isinstance(b, Pointer):
        return a.region == b.region and bits.same(a.offset, b.offset)
    if isinstance(a, MapReference) and isinstance(b, MapReference):
        return a == b
    if isinstance(a, Choice) or isinstance(b, Choice):
        return False
    return bits.same(a, b)


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
        if isinstance(a.value, (int, z3.BitVecRef)) and isinstance(b.value, (int, z3.BitVecRef)):
            x, y = bits.byte(a.value, a.index), bits.byte(b.value, b.index)
            return Cell(bits.choose(self.condition, x, y, 8), 0, 1)
        return Cell(Lost("parts of different values"), 0, 1)


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
