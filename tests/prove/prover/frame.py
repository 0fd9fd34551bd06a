"""Frames by their standards' offsets, as the claims see them. Nothing here looks at the program.

Ethernet II: IEEE 802.3, 3.2. ARP: RFC 826. IPv4: RFC 791. IPv6: RFC 8200. UDP: RFC 768. TCP:
RFC 9293. ICMP: RFC 792 and 4443. Neighbour discovery: RFC 4861.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import z3

Byte = z3.BitVecRef
NETWORK = 14
MAPPED_PREFIX = bytes(10) + b"\xff\xff"


def constant(content: bytes) -> list[Byte]:
    return [z3.BitVecVal(value, 8) for value in content]


def equal(a: Sequence[Byte], b: Sequence[Byte]) -> z3.BoolRef:
    """Whether two byte strings of the same length are equal."""
    assert len(a) == len(b)
    return z3.And(*[x == y for x, y in zip(a, b, strict=True)])


def number(content: Sequence[Byte], width: int = 32) -> z3.BitVecRef:
    """A number in network order."""
    joined = z3.Concat(*content) if len(content) > 1 else content[0]
    return z3.ZeroExt(width - joined.size(), joined) if joined.size() < width else joined


def mapped(v4: Sequence[Byte]) -> list[Byte]:
    """An IPv4 address as policies and rules hold it (RFC 4291, 2.5.5.2)."""
    return constant(MAPPED_PREFIX) + list(v4)


def is_mapped(address: Sequence[Byte]) -> z3.BoolRef:
    return equal(address[:12], constant(MAPPED_PREFIX))


@dataclass(frozen=True)
class Frame:
    """A frame's bytes by offset from the destination MAC, and its length (32 bits)."""

    byte: Callable[[int], Byte]
    length: z3.BitVecRef

    def at(self, offset: int, size: int) -> list[Byte]:
        return [self.byte(offset + index) for index in range(size)]

    def is_at(self, offset: int, content: bytes) -> z3.BoolRef:
        return equal(self.at(offset, len(content)), constant(content))

    @property
    def destination_mac(self) -> list[Byte]:
        return self.at(0, 6)

    @property
    def source_mac(self) -> list[Byte]:
        return self.at(6, 6)

    def is_v4(self) -> z3.BoolRef:
        return self.is_at(12, b"\x08\x00")

    def is_v6(self) -> z3.BoolRef:
        return self.is_at(12, b"\x86\xdd")

    def is_arp_reply(self) -> z3.BoolRef:
        """EtherType, Ethernet, IPv4, their lengths, operation 2."""
        return self.is_at(12, b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x02")

    def is_advertisement(self) -> z3.BoolRef:
        """IPv6, ICMPv6, hop limit 255, type 136, code 0, one target link-layer option."""
        return z3.And(
            self.is_v6(),
            self.byte(14) & 0xF0 == 0x60,
            self.is_at(18, b"\x00\x20\x3a\xff"),
            self.is_at(54, b"\x88\x00"),
            self.is_at(78, b"\x02\x01"),
        )


@dataclass(frozen=True)
class Packet:
    """An IP packet of one version whose header begins at `start`, and its transport header."""

    frame: Frame
    version: int
    start: int = NETWORK

    @property
    def transport(self) -> int:
        """Offset of the transport header where there are neither options nor extensions."""
        return self.start + (20 if self.version == 4 else 40)

    @property
    def protocol(self) -> Byte:
        return self.frame.byte(self.start + (9 if self.version == 4 else 6))

    @property
    def source(self) -> list[Byte]:
        if self.version == 4:
            return mapped(self.frame.at(self.start + 12, 4))
        return self.frame.at(self.start + 8, 16)

    @property
    def destination(self) -> list[Byte]:
        if self.version == 4:
            return mapped(self.frame.at(self.start + 16, 4))
        return self.frame.at(self.start + 24, 16)

    @property
    def payload_length(self) -> z3.BitVecRef:
        if self.version == 4:
            return number(self.frame.at(self.start + 2, 2)) - 20
        return number(self.frame.at(self.start + 4, 2))

    def header(self) -> z3.BoolRef:
        """The version, and for IPv4 a header of five words: no options."""
        first = self.frame.byte(self.start)
        return first == 0x45 if self.version == 4 else first & 0xF0 == 0x60

    def whole(self) -> z3.BoolRef:
        """Not a fragment. An IPv6 fragment has another protocol number (44)."""
        if self.version == 6:
            return self.protocol != 44
        fragment = number(self.frame.at(self.start + 6, 2))
        return fragment & 0xBFFF == 0

    def not_mapped(self) -> z3.BoolRef:
        """An IPv6 packet's addresses are no IPv4 addresses in disguise."""
        if self.version == 4:
            return z3.BoolVal(True)
        return z3.Not(z3.Or(is_mapped(self.source), is_mapped(self.destination)))

    def lengths(self) -> z3.BoolRef:
        """The packet ends where the frame does, but for the padding of a minimal frame."""
        header = self.transport - self.start
        end = self.payload_length + self.transport
        total = self.payload_length + header
        return z3.And(
            z3.UGE(total, header),
            z3.Or(
                end == self.frame.length,
                z3.And(z3.ULT(end, self.frame.length), z3.ULE(self.frame.length, 60)),
            ),
        )

    def is_udp(self) -> z3.BoolRef:
        return self.protocol == 17

    def is_tcp(self) -> z3.BoolRef:
        return self.protocol == 6

    def is_icmp(self) -> z3.BoolRef:
        return self.protocol == (1 if self.version == 4 else 58)

    def is_echo(self, request: bool) -> z3.BoolRef:
        kind = {(4, True): 8, (4, False): 0, (6, True): 128, (6, False): 129}
        content = bytes([kind[self.version, request], 0])
        return z3.And(self.is_icmp(), self.frame.is_at(self.transport, content))

    def transport_header(self) -> z3.BoolRef:
        """The transport header is whole, and its lengths agree with the packet's."""
        length = self.payload_length
        data_offset = z3.LShR(number(self.frame.at(self.transport + 12, 1)), 4) * 4
        return z3.And(
            z3.Implies(
                self.is_udp(),
                z3.And(
                    z3.UGE(length, 8),
                    number(self.frame.at(self.transport + 4, 2)) == length,
                ),
            ),
            z3.Implies(self.is_tcp(), z3.And(z3.UGE(data_offset, 20), z3.ULE(data_offset, length))),
            z3.Implies(self.is_icmp(), z3.UGE(length, 8)),
        )

    def port(self, of_source: bool) -> z3.BitVecRef:
        """A port of UDP or TCP; ICMP has none, which rules write as 0."""
        port = number(self.frame.at(self.transport + (0 if of_source else 2), 2))
        return z3.If(self.is_icmp(), z3.BitVecVal(0, 32), port)

    def rule_protocol(self) -> z3.BitVecRef:
        """The protocol as rules write it: echo of either version is ICMP."""
        return z3.If(self.is_icmp(), z3.BitVecVal(1, 32), number([self.protocol]))


# Addresses that are no peer's: an IPv4 address for a translator (RFC 6052, RFC 8215, RFC 2765, RFC
# 3056, RFC 4380), or for discarding (RFC 6666). Prefixes of whole bytes.
NOT_PEERS = (
    bytes.fromhex("0064ff9b") + bytes(8), bytes.fromhex("0064ff9b0001"),
    bytes(8) + bytes.fromhex("ffff0000"), bytes.fromhex("2002"), bytes.fromhex("20010000"),
    bytes.fromhex("0100") + bytes(6),
)  # fmt: skip


def can_be_peer(version: int, address: Sequence[Byte]) -> z3.BoolRef:
    """Unicast, not loopback, not "this network", not reserved (RFC 6890, RFC 4291), not of one link
    or site (RFC 3927, RFC 4291, RFC 3879), and no other address in disguise."""
    if version == 4:
        first, link_local = address[12], equal(address[12:14], constant(b"\xa9\xfe"))
        return z3.And(first != 0, first != 127, z3.ULT(first, 224), z3.Not(link_local))
    others = [equal(address[: len(prefix)], constant(prefix)) for prefix in NOT_PEERS]
    return z3.And(
        address[0] != 0xFF,
        z3.Not(z3.And(address[0] == 0xFE, address[1] & 0x80 == 0x80)),
        z3.Not(equal(address[:12], constant(bytes(12)))),
        z3.Not(is_mapped(address)),
        z3.Not(z3.Or(*others)),
    )
