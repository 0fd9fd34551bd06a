"""A sound frame, and a policy that lets it pass: where violations by mutants are looked for.

For each claim that is essential the frame is left open where the claim speaks of it, and nowhere
else. So what is found is a frame that is wrong in just that, and the question is a small one.
"""

from __future__ import annotations

import z3

from .frame import MAPPED_PREFIX
from .guard import ADDRESSES, FILTERED, GATEWAYS
from .layout import Layout
from .memory import context_field, frame_byte
from .slots import policy_byte

# Inputs and their values.
Known = list[tuple[z3.BitVecRef, z3.BitVecNumRef]]

GATEWAY_MAC, GUEST_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
# By IP version. The peer's are of the documentation's (RFC 5737, 3849).
GATEWAY = {4: bytes([10, 0, 0, 1]), 6: b"\xfd" + bytes(14) + b"\x01"}
GUEST = {4: bytes([10, 0, 0, 2]), 6: b"\xfd" + bytes(14) + b"\x02"}
PEER = {4: bytes([192, 0, 2, 7]), 6: b"\x20\x01\x0d\xb8" + bytes(11) + b"\x07"}


def at(offset: int, count: int) -> frozenset[str]:
    """The names of the frame's bytes there."""
    return frozenset(f"frame[{place}]" for place in range(offset, offset + count))


# By program: the claims that some mutant must violate, or the proof is worth nothing, and the
# inputs that they speak of. The other claims hold by the program's structure or by more than one
# jump.
ESSENTIAL = {
    "guest_egress": {
        "every access is within its memory": frozenset({"linear"}),
        "no VLAN tag": frozenset({"skb.vlan_present"}),
        "source MAC is the guest's": at(6, 6),
        "destination MAC is the gateway's": at(0, 6),
        "EtherType IPv4 or IPv6": at(12, 2),
        "IPv4: source address is the guest's": at(26, 4),
        "IPv4: a live rule names the peer": at(30, 4) | at(36, 2),
        "IPv4: no fragment": at(20, 2),
        "IPv4: version and header length": at(14, 1),
        "IPv4: lengths agree with the frame's": at(16, 2) | {"length"},
        "IPv6: source address is the guest's": at(22, 16),
        "IPv6: a live rule names the peer": at(38, 16) | at(56, 2),
        "IPv6: lengths agree with the frame's": at(18, 2) | {"length"},
    },
    "guest_ingress": {
        "every access is within its memory": frozenset({"linear"}),
        "no VLAN tag": frozenset({"skb.vlan_present"}),
        "destination MAC is the guest's": at(0, 6),
        "EtherType IPv4 or IPv6": at(12, 2),
        "IPv4: destination address is the guest's": at(30, 4),
        "IPv4: a live rule names the peer": at(26, 4) | at(34, 2),
        "IPv4: no fragment": at(20, 2),
        "IPv6: destination address is the guest's": at(38, 16),
        "IPv6: a live rule names the peer": at(22, 16) | at(54, 2),
    },
}


def known(function: str, claim: str, policy: Layout) -> Known:
    """All that is given of a frame and its policy, but for what the claim speaks of."""
    content = frame(function == "guest_egress", 6 if claim.startswith("IPv6") else 4)
    given = [(frame_byte(place), value) for place, value in enumerate(content)]
    given += [(z3.BitVec("length", 32), len(content)), (z3.BitVec("mark", 32), 0)]
    given += [(context_field(field), 0) for field in ("vlan_present", "gso_size")]
    free = ESSENTIAL[function][claim]
    given = [(name, value) for name, value in given if str(name) not in free]
    given += [(policy_byte(place), value) for place, value in in_policy(policy).items()]
    return [(name, z3.BitVecVal(value, name.size())) for name, value in given]


def frame(egress: bool, version: int) -> bytes:
    """A UDP datagram between the guest and its peer's port 51820."""
    ends, ports, macs = (GUEST, PEER), (40000, 51820), (GUEST_MAC, GATEWAY_MAC)
    if not egress:
        ends, ports, macs = ends[::-1], ports[::-1], macs[::-1]
    datagram = b"".join(number.to_bytes(2, "big") for number in (*ports, 16, 0)) + bytes(8)
    addresses = ends[0][version] + ends[1][version]
    if version == 4:
        header = bytes([0x45, 0, 0, 20 + len(datagram), 0, 0, 0, 0, 64, 17, 0, 0])
    else:
        header = bytes([0x60, 0, 0, 0, 0, len(datagram), 17, 64])
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    return macs[1] + macs[0] + kind + header + addresses + datagram


def in_policy(layout: Layout) -> dict[int, int]:
    """Bytes of the policy by their offsets, but for its rules."""
    fields = layout.fields
    found: dict[int, int] = {}

    def put(offset: int, content: bytes) -> None:
        found.update(enumerate(content, offset))

    put(fields["mac"], GUEST_MAC)
    put(fields["gateway_mac"], GATEWAY_MAC)
    put(fields["mode"], FILTERED.to_bytes(4, "little"))
    for field, count, own in (("addresses", ADDRESSES, GUEST), ("gateways", GATEWAYS, GATEWAY)):
        put(fields[field], bytes(16 * count))
        for index, address in enumerate((MAPPED_PREFIX + own[4], own[6])):
            # Two little-endian words, the upper half first.
            put(fields[field] + 16 * index, address[7::-1] + address[15:7:-1])
    return found
