"""What a program knows at one instruction.

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
    # Whether it is the guard's own map in this one.
    own: bool = False
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
