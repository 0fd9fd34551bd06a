"""The kernel's helper functions (include/uapi/linux/bpf.h, net/core/filter.c), as far as used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import z3

from . import bits
from .bits import Truth, Word
from .cells import without_packet_pointers
from .elf import MapDefinition, Unmodelled
from .memory import Region, context_field, frame_byte, kernel_byte, kernel_memory
from .slots import RULES
from .state import Choice, MapReference, Pointer, State, Value

if TYPE_CHECKING:
    from .machine import Machine

EFAULT = 14
INGRESS = 1
TC_ACT_SHOT, TC_ACT_REDIRECT = 2, 7

Model = Callable[["Helpers", State], Iterator[State]]


class Helpers:
    """Models of helper functions. Each may end in several states."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory = machine.memory

    def arguments(self, number: int) -> list[int]:
        """The registers that hold the helper's arguments."""
        if number not in HELPERS:
            raise Unmodelled(f"helper function {number}")
        return list(range(1, HELPERS[number][0] + 1))

    def call(self, state: State, number: int) -> Iterator[State]:
        yield from HELPERS[number][1](self, state)

    # Arguments

    def _map(self, state: State) -> MapDefinition:
        reference = state.registers[1]
        if not isinstance(reference, MapReference):
            raise Unmodelled(f"a map is expected, not {reference}, at {state.pc}")
        definition = self.machine.program.maps[reference.name]
        if not reference.own:
            return definition
        assert definition.inner is not None
        return definition.inner

    def _pointer(self, state: State, register: int) -> Pointer:
        value = state.registers[register]
        if not isinstance(value, Pointer) or not isinstance(value.offset, int):
            raise Unmodelled(f"a pointer is expected, not {value}, at {state.pc}")
        return value

    def _word(self, state: State, register: int, width: int = 32) -> Word:
        value = state.registers[register]
        if not isinstance(value, (int, z3.BitVecRef)):
            raise Unmodelled(f"a number is expected, not {value}, at {state.pc}")
        return bits.low(value, width)

    def _context(self, state: State) -> None:
        if state.registers[1] != Pointer("context", 0):
            raise Unmodelled(f"the context is expected at {state.pc}")

    def _key(self, state: State, definition: MapDefinition) -> list[Word] | None:
        return self.memory.load_bytes(state, self._pointer(state, 2), definition.key_size)

    def _error(self, name: str) -> Word:
        """0 or a negative errno, as an int."""
        code = self.machine.fresh(name, 32)
        self.machine.axioms.append(code <= 0)
        return bits.sign_extend(code, 32, 64)

    # Maps

    def map_lookup(self, state: State) -> Iterator[State]:
        definition, reference = self._map(state), state.registers[1]
        assert isinstance(reference, MapReference)
        if definition.kind not in ("array", "percpu_array", "hash", "lru_hash", "array_of_maps"):
            raise Unmodelled(f"lookup in {definition.name}, a {definition.kind}, at {state.pc}")
        parts = self._key(state, definition)
        if parts is None:
            return
        key = bits.simplified(bits.join(parts))
        # Userspace makes arrays of other sizes than the object's, banks may be missing.
        found: Truth = self.machine.fresh_truth(f"{definition.name} has it")
        value: Value
        if definition.kind in ("hash", "lru_hash"):
            region = Region("shared", definition.value_size, definition.name)
            value = Pointer(self.memory.add(region), 0)
        elif definition.kind == "array_of_maps":
            value = self._own(state, definition, key)
            # The programs are loaded with as many places as they know of.
            there = bits.compare("lt", key, definition.max_entries, 32)
            found = bits.every([found, there])
        elif reference.generation is not None:
            value = Pointer(self.memory.bucket_in_bank(reference.generation, key), 0)
        else:
            value = Pointer(self.memory.element(definition, key), 0)
            if isinstance(key, int) and key < definition.max_entries:
                found = True
        state.registers[0] = value if found is True else Choice(found, value, 0)
        yield state

    def _own(self, state: State, table: MapDefinition, key: Word) -> MapReference:
        """The map of the frame's guard in a table: programs look at no other place."""
        if table.name == RULES:
            return MapReference(table.name, True, self.memory.slots.bank(state, key))
        own = bits.compare("eq", key, context_field("place"), 32)
        self.machine.require(state, own, f"another guard's place in {table.name}")
        return MapReference(table.name, True)

    def map_update(self, state: State) -> Iterator[State]:
        definition = self._map(state)
        if definition.kind not in ("hash", "lru_hash"):
            raise Unmodelled(f"update of {definition.name} at {state.pc}")
        key = self._key(state, definition)
        value = self.memory.load_bytes(state, self._pointer(state, 3), definition.value_size)
        if key is None or value is None:
            return
        state.registers[0] = self._error("map_update_elem")
        yield state

    def map_delete(self, state: State) -> Iterator[State]:
        definition = self._map(state)
        if definition.kind not in ("hash", "lru_hash"):
            raise Unmodelled(f"deletion from {definition.name} at {state.pc}")
        if self._key(state, definition) is None:
            return
        state.registers[0] = self._error("map_delete_elem")
        yield state

    def ringbuf_reserve(self, state: State) -> Iterator[State]:
        definition, size = self._map(state), state.registers[2]
        if definition.kind != "ringbuf" or not isinstance(size, int):
            raise Unmodelled(f"ringbuf_reserve({definition.name}, {size}) at {state.pc}")
        region = self.memory.add(Region("ring", size, definition.name))
        room = self.machine.fresh_truth(f"{definition.name} has room")
        state.registers[0] = Choice(room, Pointer(region, 0), 0)
        yield state

    def ringbuf_submit(self, state: State) -> Iterator[State]:
        record = self._pointer(state, 1)
        if self.memory.regions[record.region].kind != "ring" or record.offset != 0:
            raise Unmodelled(f"{record} is submitted at {state.pc}")
        state.registers[0] = 0
        yield state

    # Numbers

    def time(self, state: State) -> Iterator[State]:
        state.registers[0] = self.machine.fresh("time", 64)
        yield state

    def number(self, state: State) -> Iterator[State]:
        state.registers[0] = bits.widen(self.machine.fresh("number", 32), 64)
        yield state

    def probe_read_kernel(self, state: State) -> Iterator[State]:
        to, size, source = self._pointer(state, 1), state.registers[2], state.registers[3]
        if not isinstance(size, int) or not isinstance(source, (Pointer, z3.BitVecRef)):
            raise Unmodelled(f"probe_read_kernel({size}, {source}) at {state.pc}")
        if isinstance(source, Pointer):
            if source.region != "context":
                raise Unmodelled(f"probe_read_kernel of {source.region} at {state.pc}")
            # At run time the context is the address of the `struct sk_buff` itself.
            memory, start = kernel_byte, bits.term(source.offset, 64)
        else:
            memory, start = kernel_memory, source
        code = self._error("probe_read_kernel")
        read = bits.term(code, 64) == 0
        # Where it fails, the helper fills the buffer with zeroes.
        values = [bits.choose(read, memory(start + index), 0, 8) for index in range(size)]
        if self.memory.store_bytes(state, to, values):
            state.registers[0] = code
            yield state

    # The socket buffer

    def skb_load_bytes(self, state: State) -> Iterator[State]:
        self._context(state)
        offset, size = self._word(state, 2), self._word(state, 4)
        to = self._pointer(state, 3)
        room = bits.compare("le", size, self.memory.room(to), 32)
        self.machine.require(state, room, "skb_load_bytes beyond its buffer")
        if isinstance(offset, int) and isinstance(size, int) and not state.frame_changed:
            read = bits.compare("ge", state.length, offset + size, 32)
            if isinstance(read, bool):
                raise Unmodelled(f"a frame of known length at {state.pc}")
            values = [bits.choose(read, frame_byte(offset + index), 0, 8) for index in range(size)]
            if not self.memory.store_bytes(state, to, values):
                return
            state.registers[0] = bits.choose(read, 0, -EFAULT & bits.mask(64), 64)
        else:
            self.memory.forget(state, to)
            state.registers[0] = self._error("skb_load_bytes")
        yield state

    def skb_store_bytes(self, state: State) -> Iterator[State]:
        self._context(state)
        for part, size in self.memory.known(state, self._word(state, 4)):
            yield from self._store(part, size)

    def _store(self, state: State, size: int) -> Iterator[State]:
        offset, flags = self._word(state, 2), self._word(state, 5, 64)
        if not isinstance(offset, int) or flags != 0:
            raise Unmodelled(f"skb_store_bytes({offset}, {size}, {flags}) at {state.pc}")
        written = self.memory.load_bytes(state, self._pointer(state, 3), size)
        if written is None:
            return
        code = self._error("skb_store_bytes")
        state.note("store_bytes", offset, tuple(written), code)
        self._moved(state, changed=True)
        state.registers[0] = code
        yield state

    def skb_change_tail(self, state: State) -> Iterator[State]:
        self._context(state)
        length, code = self._word(state, 2), self._error("skb_change_tail")
        state.note("change_tail", length, code)
        self._moved(state, changed=True)
        state.registers[0] = code
        yield state

    def skb_pull_data(self, state: State) -> Iterator[State]:
        self._context(state)
        wanted, code = self._word(state, 2), self._error("skb_pull_data")
        self._moved(state, changed=False)
        enough = z3.UGE(bits.term(state.linear, 32), bits.term(wanted, 32))
        self.machine.axioms.append(z3.Implies(bits.term(code, 64) == 0, enough))
        state.registers[0] = code
        yield state

    def _moved(self, state: State, changed: bool) -> None:
        """The kernel may have moved the packet's bytes, or changed them besides."""
        state.replace_values(without_packet_pointers)
        if changed:
            state.frame_changed = True
            state.length = self.machine.fresh("length", 32)
        state.linear = self.machine.fresh("linear", 32)
        self.machine.axioms.append(
            z3.ULE(state.linear, bits.term(state.length, 32)),
        )

    def check_mtu(self, state: State) -> Iterator[State]:
        self._context(state)
        limit = self._pointer(state, 3)
        if self.memory.load_bytes(state, limit, 4) is None:
            return
        self.memory.store(state, limit, 4, self.machine.fresh("mtu", 32))
        # 0, a reason above it, or a negative errno.
        result = self.machine.fresh("check_mtu", 32)
        state.registers[0] = bits.sign_extend(result, 32, 64)
        yield state

    def redirect(self, state: State) -> Iterator[State]:
        flags = self._word(state, 2, 64)
        state.note("redirect", self._word(state, 1), flags)
        right = bits.compare("le", flags, INGRESS, 64)
        if isinstance(right, bool):
            state.registers[0] = TC_ACT_REDIRECT if right else TC_ACT_SHOT
        else:
            state.registers[0] = bits.choose(right, TC_ACT_REDIRECT, TC_ACT_SHOT, 64)
        yield state


# By number: how many arguments, and the model.
HELPERS: dict[int, tuple[int, Model]] = {
    1: (2, Helpers.map_lookup),
    2: (4, Helpers.map_update),
    3: (2, Helpers.map_delete),
    5: (0, Helpers.time),
    7: (0, Helpers.number),
    8: (0, Helpers.number),
    9: (5, Helpers.skb_store_bytes),
    23: (2, Helpers.redirect),
    26: (4, Helpers.skb_load_bytes),
    38: (3, Helpers.skb_change_tail),
    39: (2, Helpers.skb_pull_data),
    113: (3, Helpers.probe_read_kernel),
    118: (0, Helpers.time),
    125: (0, Helpers.time),
    160: (0, Helpers.time),
    163: (5, Helpers.check_mtu),
    131: (3, Helpers.ringbuf_reserve),
    132: (2, Helpers.ringbuf_submit),
    133: (2, Helpers.ringbuf_submit),
}
