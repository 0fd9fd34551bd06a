"""The guard's state as the claims see it: the policy that a frame was judged by, its allowlist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import z3

from . import bits
from .frame import Byte, constant, equal
from .slots import Slots, bucket_byte, judged, policy_byte
from .state import Entry, SlotReads

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

    slots: Slots
    reads: SlotReads

    # The judgement

    def is_judged_by(self, generation: int) -> z3.BoolRef:
        """Whether the last slot that was read was the one that this generation named."""
        return bits.term(self.reads.judgement, 16) == generation + 1

    def prophecies(self, passes: z3.BoolRef) -> z3.BoolRef:
        """What passes was judged by the slot that was read last; reads of all others are of any
        content, and of what does not pass all are."""
        return z3.And(
            *[
                judged(generation) == z3.And(passes, self.is_judged_by(generation))
                for generation in range(len(self.slots.generations))
            ]
        )

    def all_judged(self) -> list[z3.BoolRef]:
        return [judged(generation) for generation in range(len(self.slots.generations))]

    def is_confirmed(self) -> z3.BoolRef:
        """The slot that was read last was in force: its generation was read again and was the same,
        after all that was read of it."""
        pending = [
            z3.And(self.is_judged_by(generation), truth(since))
            for generation, since in self.reads.pending.items()
        ]
        judged_once = bits.term(self.reads.judgement, 16) != 0
        return z3.And(judged_once, z3.Not(z3.Or(*pending)))

    # The policy

    def policy(self, field: str, size: int, skip: int = 0) -> list[Byte]:
        """Bytes of a field of the policy that judged, in memory order."""
        start = self.slots.policy.fields[field] + skip
        return [policy_byte(start + index) for index in range(size)]

    def policy_number(self, field: str) -> z3.BitVecRef:
        """A 32-bit field of the policy."""
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

    def names_no_loopback(self) -> z3.BoolRef:
        """Userspace lets no `::1` into a policy (`GuardConfig::validate`). Programs read what a
        header holds of mapped addresses as that one."""
        loopback = constant(bytes(15) + b"\x01")
        places = [("addresses", i) for i in range(ADDRESSES)] + [
            ("gateways", i) for i in range(GATEWAYS)
        ]
        return z3.And(*[z3.Not(equal(self._address(*place), loopback)) for place in places])

    def _among(self, field: str, count: int, address: Sequence[Byte]) -> z3.BoolRef:
        known = [equal(address, self._address(field, index)) for index in range(count)]
        return z3.And(z3.Or(*known), z3.Not(equal(address, constant(bytes(16)))))

    # The allowlist

    def has_live_rule(
        self, protocol: z3.BitVecRef, address: Sequence[Byte], port: z3.BitVecRef
    ) -> z3.BoolRef:
        """Some bucket of the policy's allowlist holds the rule.

        The buckets that the program read stand as witnesses for "some bucket". One beside the
        policy is of the allowlist if that is short, one of the bank in its slot if it is long.
        """
        service = protocol << 16 | port
        mask = z3.ZeroExt(32, self.policy_number("table_mask"))
        found = []
        for number, read in self.reads.buckets.items():
            bucket = self.slots.buckets[number]
            listed = z3.And(
                truth(read),
                self.is_judged_by(bucket.generation),
                z3.UGE(mask, self.slots.inline) == bucket.banked,
                z3.ULE(bits.term(bucket.index, 64), mask),
            )
            found.append(z3.And(listed, self._bucket_holds(number, service, address)))
        return z3.Or(*found)

    def _bucket_holds(
        self, bucket: int, service: z3.BitVecRef, address: Sequence[Byte]
    ) -> z3.BoolRef:
        fields = self.slots.bucket.fields

        def word(field: str, place: int, size: int) -> list[Byte]:
            start = fields[field] + size * place
            content = [bucket_byte(bucket, start + offset) for offset in range(size)]
            return list(reversed(content))

        places = [
            z3.And(
                z3.Concat(*word("service", place, 4)) == service,
                equal(word("high", place, 8) + word("low", place, 8), address),
            )
            for place in range(BUCKET_RULES)
        ]
        return z3.Or(*places)
