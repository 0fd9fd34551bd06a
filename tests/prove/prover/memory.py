"""Memory, by region: context, stack, packet, map values, ring records. Nothing else exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import z3

from . import bits
from .bits import Truth, Word
from .cells import MOST_VALUES, PACKET, constants_of, joined, part_of
from .elf import MapDefinition, Unmodelled
from .layout import Layout
from .slots import BANKS, STATE, Slots
from .state import UNWRITTEN_STACK, Cell, Choice, Memory, Pointer, State, Value

if TYPE_CHECKING:
    from .machine import Machine

STACK = 512

# struct __sk_buff (include/uapi/linux/bpf.h): 32-bit fields that a program may read.
CONTEXT = {
    0: "length", 4: "pkt_type", 8: "mark", 12: "queue_mapping", 16: "protocol",
    20: "vlan_present", 24: "vlan_tci", 28: "vlan_proto", 32: "priority", 36: "ingress_ifindex",
    40: "ifindex", 48: "place", 52: "token", 76: "data", 80: "data_end", 160: "wire_len", 164: "gso_segs", 176: "gso_size",
}  # fmt: skip

# Per-CPU maps of 64-bit words, of which the program computes which one it changes.
COUNTERS, UNGUARDED = "COUNTERS's", "UNGUARDED"
TALLIED = {COUNTERS, UNGUARDED}


@dataclass(frozen=True)
class Region:
    """Memory that a pointer can point into.

    `kind`: *constant* does not change; *private* belongs to this CPU, and the program finds what it
    wrote; *tallied* is the same, word by word at offsets that need not be known; *shared* may be
    changed by others at any time, so that every read is a new unknown; *slots* and *bucket* hold
    policies (`slots.py`).
    """

    kind: str
    size: int
    map: str = ""
    key: Word = 0
    # Of a bucket: the number of the generation that chose its slot, and its own.
    bucket: tuple[int, int] = (0, 0)


def frame_byte(offset: int) -> z3.BitVecRef:
    """The frame's byte at `offset` from its destination MAC."""
    return z3.BitVec(f"frame[{offset}]", 8)


def constant_byte(name: str, offset: int) -> z3.BitVecRef:
    """A byte of a read-only constant, whatever the loader has set it to."""
    return z3.BitVec(f"{name}[{offset}]", 8)


# The kernel's `struct sk_buff` by offset, in so far as programs read it past the context.
kernel_byte = z3.Function("struct sk_buff", z3.BitVecSort(64), z3.BitVecSort(8))
# What lies at an address that the program computed from what it read of the kernel's.
kernel_memory = z3.Function("kernel memory", z3.BitVecSort(64), z3.BitVecSort(8))


# Each tallied map's words before the program has touched them, by key and offset.
_tallied = {
    name: z3.Function(name, z3.BitVecSort(32), z3.BitVecSort(64), z3.BitVecSort(64))
    for name in TALLIED
}


def context_field(name: str) -> z3.BitVecRef:
    return z3.BitVec(f"skb.{name}", 32)


class Memories:
    """Loads and stores of one machine."""

    def __init__(self, machine: Machine, layouts: dict[str, Layout]) -> None:
        self.machine = machine
        self.slots = Slots(machine, layouts)
        self.regions: dict[str, Region] = {"context": Region("context", 192)}
        self.regions |= {f"stack{depth}": Region("stack", STACK) for depth in range(8)}
        self.regions[PACKET] = Region("packet", 0)

    def place(self) -> z3.BitVecRef:
        """Where in the tables the frame's guard is, as the program on its interface names it."""
        return context_field("place")

    # Regions

    def element(self, definition: MapDefinition, key: Word) -> str:
        """The region of an array's element."""
        name = f"{definition.name}[{key if isinstance(key, int) else f'#{key.get_id()}'}]"
        if name not in self.regions:
            kind = "shared"
            if definition.name == STATE:
                kind = "slots"
            elif definition.kind == "percpu_array":
                kind = "tallied" if definition.name in TALLIED else "private"
            self.regions[name] = Region(kind, definition.value_size, definition.name, key)
        return name

    def bucket_in_bank(self, generation: int, index: Word) -> str:
        """The region of a bucket of the bank in the slot that the generation chose."""
        number = self.slots.bucket_in_bank(generation, index)
        name = f"bucket {number}"
        region = Region("bucket", self.slots.bucket.size, BANKS, bucket=(generation, number))
        self.regions[name] = region
        return name

    def constant(self, name: str) -> str:
        region = f"constant {name}"
        self.regions[region] = Region("constant", self.machine.program.constants[name], name)
        return region

    def variable(self, name: str) -> str:
        region = f"variable {name}"
        self.regions[region] = Region("shared", self.machine.program.variables[name], name)
        return region

    def add(self, region: Region) -> str:
        name = f"{region.kind} {region.map} {len(self.regions)}"
        self.regions[name] = region
        return name

    def unknown(self, region: str, offset: int) -> Memory:
        """What a byte of a private region holds before the program has touched it."""
        if self.regions[region].kind != "private":
            return {}
        return {offset: Cell(self.machine.fresh(f"{region}+{offset}", 8), 0, 1)}

    # Addresses

    def at_known_offset(self, state: State, pointer: Pointer) -> Iterator[tuple[State, Pointer]]:
        """The pointer with a known offset; one state for each value that the offset can have.

        Tallied words, slots and what others change anyway are found by any offset.
        """
        if self.regions[pointer.region].kind in ("tallied", "slots", "shared"):
            yield state, pointer
            return
        for part, offset in self.known(state, pointer.offset):
            yield part, Pointer(pointer.region, offset)

    def known(self, state: State, word: Word) -> Iterator[tuple[State, int]]:
        """One state for each value that the word can have."""
        if not isinstance(word, int):
            word = z3.simplify(word)
            if z3.is_bv_value(word):
                word = word.as_long()
        if isinstance(word, int):
            yield state, word
            return
        values = constants_of(word)
        if values is not None:
            for value in sorted(values):
                yield state.fork(word == value), value
            return
        solver = z3.Solver()
        solver.add(*self.machine.axioms, *state.path)
        for _ in range(MOST_VALUES):
            result = solver.check()
            if result == z3.unsat:
                return
            if result == z3.unknown:
                break
            value = solver.model().eval(word, model_completion=True).as_long()
            solver.add(word != value)
            yield state.fork(word == value), value
        raise Unmodelled(f"an offset or length with more than {MOST_VALUES} values at {state.pc}")

    def within(self, state: State, pointer: Pointer, size: int) -> bool:
        """Requires the access to be within its region; false where it cannot be."""
        region = self.regions[pointer.region]
        if region.kind == "tallied":
            return self._is_word(state, region, pointer.offset, size)
        if region.kind == "shared":
            return self._is_inside(state, region, pointer.offset, size)
        assert isinstance(pointer.offset, int)
        offset = bits.signed(pointer.offset, 64)
        if region.kind == "packet":
            if state.frame_changed:
                raise Unmodelled(f"the packet is read after it was changed, at {state.pc}")
            inside: Truth = offset >= 0
            if inside:
                end = bits.compare("le", offset + size, bits.widen(state.linear, 64), 64)
                inside = end
            self.machine.require(state, inside, f"packet access at {offset}, {size} bytes")
            return inside is not False
        fits = 0 <= offset and offset + size <= region.size
        self.machine.require(state, fits, f"{pointer.region} access at {offset}, {size} bytes")
        return fits

    def _is_inside(self, state: State, region: Region, offset: Word, size: int) -> bool:
        fits = bits.every(
            [
                bits.compare("le", offset, region.size, 64),
                bits.compare("le", bits.arithmetic("add", offset, size, 64), region.size, 64),
            ]
        )
        self.machine.require(state, fits, f"{region.map} access, {size} bytes")
        return fits is not False

    def _is_word(self, state: State, region: Region, offset: Word, size: int) -> bool:
        if size != 8:
            raise Unmodelled(f"{size} bytes of a word of {region.map} at {state.pc}")
        whole = bits.every(
            [
                bits.compare("le", offset, region.size - size, 64),
                bits.compare("eq", bits.arithmetic("and", offset, size - 1, 64), 0, 64),
            ]
        )
        self.machine.require(state, whole, f"{region.map} access to a whole word")
        return whole is not False

    # Loads

    def load(self, state: State, pointer: Pointer, size: int) -> Value | None:
        """`size` bytes at a known offset, or None where that is out of bounds."""
        if self.regions[pointer.region].kind == "slots":
            return self.slots.load(state, pointer.offset, size)
        if not self.within(state, pointer, size):
            return None
        offset, region = pointer.offset, self.regions[pointer.region]
        if region.kind == "tallied":
            return self._load_tallied(state, region, offset)
        if region.kind == "shared":
            return self.machine.fresh(region.map, 8 * size)
        assert isinstance(offset, int)
        match region.kind:
            case "context":
                return self._load_context(state, offset, size)
            case "packet":
                return bits.join([frame_byte(offset + index) for index in range(size)])
            case "bucket":
                return self.slots.load_bucket(state, *region.bucket, offset, size)
            case "constant":
                return bits.join([constant_byte(region.map, offset + i) for i in range(size)])
        return self.load_cells(state, pointer.region, offset, size)

    def _load_context(self, state: State, offset: int, size: int) -> Value:
        name = CONTEXT.get(offset)
        if name is None or size != 4:
            raise Unmodelled(f"context field at {offset}, {size} bytes, at {state.pc}")
        match name:
            case "data":
                return Pointer(PACKET, 0)
            case "data_end":
                return Pointer(PACKET, bits.widen(state.linear, 64))
            case "length":
                return state.length
            case "mark":
                return state.mark
        return context_field(name)

    def load_cells(self, state: State, region: str, offset: int, size: int) -> Value:
        memory = state.memory.get(region, {})
        cells = []
        for place in range(offset, offset + size):
            cell = memory.get(place)
            if cell is None:
                new = self.unknown(region, place)
                if not new:
                    return UNWRITTEN_STACK
                memory = state.writable(region)
                memory |= new
                cell = memory[place]
            cells.append(cell)
        first = cells[0].value
        if cells[0].size == size and all(
            cell.value is first and cell.index == index and cell.size == size
            for index, cell in enumerate(cells)
        ):
            return first
        return joined([part_of(cell.value, cell.index) for cell in cells])

    @staticmethod
    def _load_tallied(state: State, region: Region, offset: Word) -> Word:
        """What the program last stored there, or what was there before."""
        word: Word = _tallied[region.map](bits.term(region.key, 32), bits.term(offset, 64))
        for entry in state.log:
            if entry.kind != "store" or entry.args[0] != region.map:
                continue
            key, where, new = (_as_word(entry.args[place]) for place in (1, 2, 3))
            same = bits.every(
                [
                    entry.guard,
                    bits.compare("eq", key, region.key, 32),
                    bits.compare("eq", where, offset, 64),
                ]
            )
            if isinstance(same, bool):
                word = new if same else word
            else:
                word = bits.choose(same, new, word, 64)
        return word

    def load_bytes(self, state: State, pointer: Pointer, size: int) -> list[Word] | None:
        """`size` bytes one by one, for helpers."""
        found: list[Word] = []
        assert isinstance(pointer.offset, int)
        for index in range(size):
            part = self.load(state, Pointer(pointer.region, pointer.offset + index), 1)
            if isinstance(part, (int, z3.BitVecRef)):
                found.append(part)
            elif isinstance(part, Choice):
                found.append(self._settle(state, part))
            else:
                if part is not None:
                    self.machine.require(state, False, f"a helper reads {part}")
                return None
        return found

    def _settle(self, state: State, value: Value) -> Word:
        """A choice between words that were written on some paths only, as one word."""
        if isinstance(value, (int, z3.BitVecRef)):
            return value
        if isinstance(value, Choice):
            held = state.fork(value.condition)
            yes = self._settle(held, value.yes)
            no = self._settle(state.fork(bits.negate(value.condition)), value.no)
            return bits.choose(value.condition, yes, no, 8)
        self.machine.require(state, False, f"a helper reads {value}")
        return self.machine.fresh("unwritten", 8)

    # Stores

    def store(self, state: State, pointer: Pointer, size: int, value: Value) -> bool:
        """Stores the lowest `size` bytes; false where that is out of bounds."""
        if self.regions[pointer.region].kind == "slots":
            return self.slots.store(state, pointer.offset, size)
        if not self.within(state, pointer, size):
            return False
        offset, region = pointer.offset, self.regions[pointer.region]
        if region.kind == "tallied":
            if not isinstance(value, (int, z3.BitVecRef)):
                raise Unmodelled(f"{value} is stored to {region.map} at {state.pc}")
            old = self._load_tallied(state, region, offset)
            state.note("store", region.map, region.key, offset, value, old)
            return True
        if region.kind == "shared":
            if not isinstance(value, (int, z3.BitVecRef)):
                raise Unmodelled(f"{value} is stored to {region.map} at {state.pc}")
            return True
        assert isinstance(offset, int)
        if isinstance(value, (int, z3.BitVecRef)):
            value = bits.low(value, 8 * size)
        elif size != 8:
            self.machine.require(state, False, f"stores part of {value}")
            return False
        match region.kind:
            case "stack" | "ring":
                self._put(state, pointer.region, offset, size, value)
            case "private" | "shared":
                self.store_map(state, pointer.region, offset, size, value)
            case "context" if CONTEXT.get(offset) == "mark" and size == 4:
                if not isinstance(value, (int, z3.BitVecRef)):
                    raise Unmodelled(f"mark is set to {value} at {state.pc}")
                state.mark = value
            case _:
                raise Unmodelled(f"a store to {pointer.region} at {offset}, at {state.pc}")
        return True

    def _put(self, state: State, region: str, offset: int, size: int, value: Value) -> None:
        memory = state.writable(region)
        for index in range(size):
            memory[offset + index] = Cell(value, index, size)

    def store_map(self, state: State, name: str, offset: int, size: int, value: Value) -> None:
        region = self.regions[name]
        if not isinstance(value, (int, z3.BitVecRef)):
            raise Unmodelled(f"{value} is stored to {region.map} at {state.pc}")
        if region.kind == "private":
            # Another element's region may be the same element under another key.
            for other in list(state.memory):
                if other != name and self.regions[other].map == region.map:
                    state.writable(other).clear()
            self._put(state, name, offset, size, value)

    def store_bytes(self, state: State, pointer: Pointer, values: list[Word]) -> bool:
        assert isinstance(pointer.offset, int)
        return all(
            self.store(state, Pointer(pointer.region, pointer.offset + index), 1, value)
            for index, value in enumerate(values)
        )

    def forget(self, state: State, pointer: Pointer) -> None:
        """Anything may stand from `pointer` to the end of its region."""
        assert isinstance(pointer.offset, int)
        for offset in range(pointer.offset, self.regions[pointer.region].size):
            value = self.machine.fresh("written by the kernel", 8)
            self.store(state, Pointer(pointer.region, offset), 1, value)

    def room(self, pointer: Pointer) -> int:
        """Bytes from `pointer` to the end of its region."""
        assert isinstance(pointer.offset, int)
        return self.regions[pointer.region].size - pointer.offset


def _as_word(value: object) -> Word:
    assert isinstance(value, (int, z3.BitVecRef))
    return value
