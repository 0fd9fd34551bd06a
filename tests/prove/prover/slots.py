"""The policy as programs read it: two slots in the guard's map in STATES, and the long lists in RULES.

Userspace may write a slot while a program reads it. What a program reads counts only where the
generation that named the slot is read again afterwards and is the same (ARCHITECTURE.md, "Changing
a policy"). So each read of a slot is a new unknown, unless it belongs to the one judgement that the
claims speak about, which a prophecy names (`judged`): then it is the content of that judgement's
policy, the same whenever it is read. `guard.py` says which judgement that is, and claims of every
run, with new unknowns alone, that it was confirmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import z3

from . import bits
from .bits import Word
from .elf import Unmodelled
from .layout import Layout
from .state import State, Value

if TYPE_CHECKING:
    from .machine import Machine

STATES, STATE, RULES, BANKS = "STATES", "STATES's", "RULES", "RULES's"
_GENERATION = "generation#"


def judged(generation: int) -> z3.BoolRef:
    """Whether what passes was judged by the slot that this read of the generation named."""
    return z3.Bool(f"judged#{generation}")


def policy_byte(offset: int) -> z3.BitVecRef:
    """A byte of the policy that the frame was judged by."""
    return z3.BitVec(f"policy+{offset}", 8)


def bucket_byte(bucket: int, offset: int) -> z3.BitVecRef:
    """A byte of one of the buckets that the frame was judged by."""
    return z3.BitVec(f"bucket{bucket}+{offset}", 8)


@dataclass(frozen=True)
class Bucket:
    """Where a bucket is: in the slot that a generation chose, or in the bank of that slot."""

    generation: int
    index: Word
    banked: bool


class Slots:
    """Reads of one machine. Generations are numbered as they are read, buckets as they are found.

    Buckets at indices that are not the same by construction are different ones: that forgets that
    they may be the same, which allows the program more than it can do, never less.
    """

    def __init__(self, machine: Machine, layouts: dict[str, Layout]) -> None:
        self.machine = machine
        self.state, self.slot = layouts["State"], layouts["Slot"]
        self.policy, self.bucket = layouts["Policy"], layouts["Bucket"]
        self.inline = (self.slot.size - self.slot.fields["buckets"]) // self.bucket.size
        self.generations: list[z3.BitVecRef] = []
        self.buckets: list[Bucket] = []
        self._numbers: dict[tuple[int, bool, object], int] = {}
        # What is known of terms, by their numbers.
        self._offsets: dict[int, tuple[int | None, Word]] = {}
        self._named: dict[int, frozenset[int]] = {}
        # Keeps terms alive, whose numbers are keys.
        self._kept: list[z3.ExprRef] = []
        maps = machine.program.maps
        banks, own = maps[RULES].inner, maps[STATES].inner
        if own is None or own.value_size != self.state.size or own.max_entries != 1:
            raise Unmodelled(f"{STATES} does not hold maps of one State")
        if maps[RULES].max_entries != 2 * maps[STATES].max_entries:
            raise Unmodelled(f"{RULES} does not hold two banks of each guard")
        if banks is None or banks.value_size != self.bucket.size:
            raise Unmodelled(f"{RULES} does not hold banks of Buckets")
        if self.slot.fields["policy"] != 0 or self.bucket.size != 64:
            raise Unmodelled("a slot that does not begin with its policy, or another bucket")
        if self.state.size != self.state.fields["slots"] + 2 * self.slot.size:
            raise Unmodelled("a State that does not end with two slots")

    # STATES

    def load(self, state: State, offset: Word, size: int) -> Value | None:
        """`size` bytes at any offset of STATE."""
        offset = offset if isinstance(offset, int) else number_of(offset)
        if isinstance(offset, int):
            return self._load_header(state, offset, size)
        generation, within = self._within_slot(state, offset)
        if isinstance(within, int) and within < self.policy.size:
            fits = within + size <= self.policy.size
            self.machine.require(state, fits, f"policy access at {within}, {size} bytes")
            self._note(state, generation, None)
            parts = [policy_byte(within + index) for index in range(size)]
            return self._read(generation, parts)
        place = bits.arithmetic("sub", within, self.slot.fields["buckets"], 64)
        start = _place_in_bucket(place)
        index = bits.simplified(bits.arithmetic("rsh", place, 6, 64))
        if start is None:
            return self._load_somewhere(state, generation, within, size)
        inside = bits.compare("lt", index, self.inline, 64)
        self.machine.require(state, inside, "access to a bucket beside the policy")
        number = self._bucket(generation, index, False)
        return self.load_bucket(state, generation, number, start, size)

    def _load_somewhere(self, state: State, generation: int, within: Word, size: int) -> Word:
        """A rate, by a meter that is not known: any value, of whatever policy."""
        inside = bits.compare("le", within, self.policy.size - size, 64)
        self.machine.require(state, inside, f"policy access, {size} bytes")
        self._note(state, generation, None)
        return self.machine.fresh("policy", 8 * size)

    def _load_header(self, state: State, offset: int, size: int) -> Value | None:
        if not self._in_header(state, offset, size):
            return None
        at = self.state.fields["generation"]
        if (offset, size) == (at, 8):
            value = z3.BitVec(f"{_GENERATION}{len(self.generations)}", 64)
            state.slot_reads = state.slot_reads.confirmed(self.generations, value)
            self.generations.append(value)
            return value
        if offset < at + 8 and at < offset + size:
            raise Unmodelled(f"part of the generation is read at {state.pc}")
        return self.machine.fresh(f"{STATE}+{offset}", 8 * size)

    def _in_header(self, state: State, offset: int, size: int) -> bool:
        fits = 0 <= offset and offset + size <= self.state.fields["slots"]
        text = f"{STATE} access at {offset}, {size} bytes, by no generation"
        self.machine.require(state, fits, text)
        return fits

    def store(self, state: State, offset: Word, size: int) -> bool:
        """Programs write the time, which is any at each read; never a slot or the generation."""
        at = self.state.fields["generation"]
        allowed = (
            isinstance(offset, int)
            and self._in_header(state, offset, size)
            and (offset + size <= at or at + 8 <= offset)
        )
        self.machine.require(state, allowed, "a program writes a policy")
        return allowed

    def _within_slot(self, state: State, offset: Word) -> tuple[int, Word]:
        """The generation whose lowest bit chooses the slot, and where in the slot this is."""
        generation, place = self._apart(state, offset)
        if generation is None:
            raise Unmodelled(f"a slot that no generation chose, at {state.pc}")
        return generation, bits.arithmetic("sub", place, self.state.fields["slots"], 64)

    def _apart(self, state: State, offset: Word) -> tuple[int | None, Word]:
        """An offset's two parts: the generation that adds a slot's size where it is odd, and the
        rest."""
        if isinstance(offset, int) or not self._generations_in(offset):
            return None, offset
        if offset.get_id() not in self._offsets:
            self._kept.append(offset)
            self._offsets[offset.get_id()] = self._found_apart(state, offset)
        return self._offsets[offset.get_id()]

    def _found_apart(self, state: State, offset: z3.BitVecRef) -> tuple[int | None, Word]:
        kind = offset.decl().kind()
        if kind == z3.Z3_OP_BADD:
            chosen: int | None = None
            total: Word = 0
            for part in offset.children():
                generation, rest = self._apart(state, number_of(part))
                if generation is not None and chosen is not None:
                    raise Unmodelled(f"a slot chosen twice at {state.pc}")
                chosen = generation if chosen is None else chosen
                total = bits.arithmetic("add", total, rest, 64)
            return chosen, total
        if kind == z3.Z3_OP_ITE:
            (chosen, yes), (other, no) = (
                self._apart(state, number_of(part)) for part in offset.children()[1:]
            )
            if chosen != other:
                raise Unmodelled(f"a slot of one of two judgements at {state.pc}")
            return chosen, bits.choose(offset.arg(0), yes, no, 64)
        generation, even, odd = self._by_parity(state, offset)
        if not (bits.same(even, 0) and bits.same(odd, self.slot.size)):
            raise Unmodelled(f"slots at {even} and {odd} at {state.pc}")
        return generation, 0

    def _by_parity(self, state: State, term: z3.BitVecRef) -> tuple[int, Word, Word]:
        """The generation that a term is computed from, and the term where that is even and where it
        is odd: it depends on nothing else."""
        generations = self._generations_in(term)
        if len(generations) != 1:
            raise Unmodelled(f"a slot chosen by generations {generations} at {state.pc}")
        generation = next(iter(generations))
        high = z3.BitVec("generation's upper bits", 63)
        found = []
        for bit in (0, 1):
            whole = z3.Concat(high, z3.BitVecVal(bit, 1))
            found.append(
                bits.simplified(z3.substitute(term, (self.generations[generation], whole)))
            )
        return generation, found[0], found[1]

    def _generations_in(self, term: z3.ExprRef) -> frozenset[int]:
        """The generations that a term is computed from; what chooses between terms is no matter."""
        known = self._named.get(term.get_id())
        if known is None:
            known = frozenset()
            if z3.is_const(term) and term.decl().name().startswith(_GENERATION):
                known = frozenset([int(term.decl().name().removeprefix(_GENERATION))])
            children = term.children()
            for child in children[1:] if term.decl().kind() == z3.Z3_OP_ITE else children:
                known |= self._generations_in(child)
            self._kept.append(term)
            self._named[term.get_id()] = known
        return known

    # RULES

    def bank(self, state: State, key: Word) -> int:
        """The generation whose slot's bank is looked up in RULES."""
        key = bits.simplified(key)
        if isinstance(key, int):
            raise Unmodelled(f"a bank that no generation chose, at {state.pc}")
        generation, even, odd = self._by_parity(state, key)
        first = bits.arithmetic("lsh", self.machine.memory.place(), 1, 32)
        second = bits.arithmetic("or", first, 1, 32)
        for found, wanted in ((even, first), (odd, second)):
            own = bits.compare("eq", found, wanted, 32)
            self.machine.require(state, own, "a bank that is not the slot's")
        self._note(state, generation, None)
        return generation

    def bucket_in_bank(self, generation: int, index: Word) -> int:
        return self._bucket(generation, bits.widen(index, 64), True)

    # Buckets

    def _bucket(self, generation: int, index: Word, banked: bool) -> int:
        name: object = index
        if not isinstance(index, int):
            self._kept.append(index)
            name = f"#{index.get_id()}"
        key = (generation, banked, name)
        if key not in self._numbers:
            self._numbers[key] = len(self.buckets)
            self.buckets.append(Bucket(generation, index, banked))
        return self._numbers[key]

    def load_bucket(
        self, state: State, generation: int, number: int, offset: int, size: int
    ) -> Value | None:
        fits = 0 <= offset and offset + size <= self.bucket.size
        self.machine.require(state, fits, f"bucket access at {offset}, {size} bytes")
        if not fits:
            return None
        self._note(state, generation, number)
        return self._read(generation, [bucket_byte(number, offset + i) for i in range(size)])

    # Both

    def _note(self, state: State, generation: int, bucket: int | None) -> None:
        """The judgement by `generation` reads of its slot."""
        kept = [n for n in state.slot_reads.buckets if self.buckets[n].generation == generation]
        state.slot_reads = state.slot_reads.read(generation, kept, bucket)

    def _read(self, generation: int, parts: list[Word]) -> Word:
        size = 8 * len(parts)
        torn = self.machine.fresh("torn", size)
        return bits.choose(judged(generation), bits.join(parts), torn, size)


def number_of(term: z3.BitVecRef) -> Word:
    return term.as_long() if z3.is_bv_value(term) else term


def _place_in_bucket(term: Word) -> int | None:
    """A place's lowest six bits, where they are the same whatever the bucket."""
    if isinstance(term, int):
        return term % 64
    kind, children = term.decl().kind(), [number_of(child) for child in term.children()]
    if kind == z3.Z3_OP_BADD:
        places = [_place_in_bucket(child) for child in children]
        return None if None in places else sum(p for p in places if p is not None) % 64
    if kind == z3.Z3_OP_ITE:
        yes, no = (_place_in_bucket(child) for child in children[1:])
        return yes if yes == no else None
    low = bits.simplified(bits.low(term, 6))
    return low if isinstance(low, int) else None
