"""The guard's state as the claims see it: the policy in force and its allowlist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import z3

from . import bits
from .elf import Object, Unmodelled
from .frame import Byte, constant, equal
from .layout import Layout
from .memory import frozen_byte
from .state import Entry

# Numbers of `Mode` (ebpf/verdict/src/policy.rs).
FILTERED, CONNTRACK, SAMPLED, DIRECT = 1, 2, 3, 4
ADDRESSES, GATEWAYS, BUCKET_RULES = 8, 2, 3


def all_entries(log: Sequence[Entry], kind: str, name: str | None = None) -> list[Entry]:
    return [e for e in log if e.kind == kind and (name is None or e.args[0] == name)]


def truth(value: bits.Truth) -> z3.BoolRef:
    return z3.BoolVal(value) if isinstance(value, bool) else value


def how_many(entries: Sequence[Entry]) -> z3.BitVecRef:
    """How many of the entries happened on the path."""
    one, zero = z3.BitVecVal(1, 32), z3.BitVecVal(0, 32)
    total = zero
    for entry in entries:
        total = total + z3.If(truth(entry.guard), one, zero)
    return total


@dataclass
class Guard:
    """What one run of a program read of its guard."""

    program: Object
    layouts: dict[str, Layout]
    log: Sequence[Entry]
    _bytes: dict[int, Byte] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layouts["Policy"].size != self.program.maps["POLICY"].value_size:
            raise Unmodelled("POLICY does not hold a Policy")
        banks = self.program.maps["RULES"].inner
        if banks is None or self.layouts["Bucket"].size != banks.value_size:
            raise Unmodelled("RULES does not hold banks of Buckets")

    def generation_reads(self) -> list[Entry]:
        return all_entries(self.log, "read", "GENERATION")

    def slot(self) -> z3.BitVecRef:
        """The slot in force: the lowest bit of the generation, as it was last read."""
        slot = z3.BitVecVal(0, 32)
        for entry in self.generation_reads():
            value = entry.args[2]
            assert isinstance(value, z3.BitVecRef)
            slot = z3.If(truth(entry.guard), z3.ZeroExt(31, z3.Extract(0, 0, value)), slot)
        return slot

    def policy_lookups(self) -> list[Entry]:
        return all_entries(self.log, "lookup", "POLICY")

    def policy_is_in_force(self) -> z3.BoolRef:
        """The policy that was last looked up is the one in the slot in force."""
        key = z3.BitVecVal(0xFFFF_FFFF, 32)
        for entry in self.policy_lookups():
            word = entry.args[1]
            assert isinstance(word, (int, z3.BitVecRef))
            key = z3.If(truth(entry.guard), bits.term(word, 32), key)
        return key == self.slot()

    def policy(self, field: str, size: int, skip: int = 0) -> list[Byte]:
        """Bytes of a field of the policy that was last looked up, in memory order."""
        start = self.layouts["Policy"].fields[field] + skip
        return [self._policy_byte(start + index) for index in range(size)]

    def _policy_byte(self, offset: int) -> Byte:
        if offset not in self._bytes:
            turns: list[tuple[str, list[z3.BoolRef]]] = []
            for entry in self.policy_lookups():
                region = entry.args[2]
                assert isinstance(region, str)
                if not turns or turns[-1][0] != region:
                    turns.append((region, []))
                turns[-1][1].append(truth(entry.guard))
            content = z3.BitVec(f"no policy+{offset}", 8)
            for region, held in turns:
                byte = frozen_byte(region, offset)
                # Where there was one policy only, it is the one.
                content = byte if len(turns) == 1 else z3.If(z3.Or(*held), byte, content)
            self._bytes[offset] = content
        return self._bytes[offset]

    def policy_number(self, field: str) -> z3.BitVecRef:
        """A 32-bit field of the policy in force."""
        return z3.Concat(*reversed(self.policy(field, 4)))

    def mac(self) -> list[Byte]:
        return self.policy("mac", 6)

    def gateway_mac(self) -> list[Byte]:
        return self.policy("gateway_mac", 6)

    def mode(self) -> z3.BitVecRef:
        return self.policy_number("mode")

    def _address(self, field: str, index: int) -> list[Byte]:
        # Two little-endian words, the upper half first.
        content = self.policy(field, 16, 16 * index)
        return content[7::-1] + content[15:7:-1]

    def owns(self, address: Sequence[Byte]) -> z3.BoolRef:
        """The guest owns the address; nobody owns the unspecified one."""
        return self._among("addresses", ADDRESSES, address)

    def is_gateway(self, address: Sequence[Byte]) -> z3.BoolRef:
        return self._among("gateways", GATEWAYS, address)

    def _among(self, field: str, count: int, address: Sequence[Byte]) -> z3.BoolRef:
        known = [equal(address, self._address(field, index)) for index in range(count)]
        return z3.And(z3.Or(*known), z3.Not(equal(address, constant(bytes(16)))))

    def has_live_rule(
        self, protocol: z3.BitVecRef, address: Sequence[Byte], port: z3.BitVecRef
    ) -> z3.BoolRef:
        """Some bucket of the bank in the slot in force holds the rule.

        The buckets that the program found stand as witnesses for "some bucket".
        """
        service = protocol << 16 | port
        held: dict[str, z3.BoolRef] = {}
        for entry in all_entries(self.log, "lookup", "RULES's"):
            _, _, region, slot = entry.args
            assert isinstance(region, str) and isinstance(slot, (int, z3.BitVecRef))
            in_force = bits.term(slot, 32) == self.slot()
            here = z3.And(truth(entry.guard), in_force)
            held[region] = z3.Or(held.get(region, z3.BoolVal(False)), here)
        return z3.Or(
            *[z3.And(here, self._bucket_holds(r, service, address)) for r, here in held.items()]
        )

    def _bucket_holds(
        self, region: str, service: z3.BitVecRef, address: Sequence[Byte]
    ) -> z3.BoolRef:
        fields = self.layouts["Bucket"].fields

        def word(field: str, place: int, size: int) -> list[Byte]:
            start = fields[field] + size * place
            content = [frozen_byte(region, start + offset) for offset in range(size)]
            return list(reversed(content))

        places = [
            z3.And(
                z3.Concat(*word("service", place, 4)) == service,
                equal(word("high", place, 8) + word("low", place, 8), address),
            )
            for place in range(BUCKET_RULES)
        ]
        return z3.Or(*places)
