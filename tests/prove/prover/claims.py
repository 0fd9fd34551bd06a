"""The claims: what must hold of every run of a program, written from the standards' offsets.

A claim is a premise and a conclusion over one run's result, frame and guard. It is proven when
the solver finds no input that makes the premise true and the conclusion false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import z3

from . import bits
from .elf import Object
from .frame import Frame, Packet, can_be_peer, constant, equal, is_mapped
from .guard import (
    CONNTRACK,
    DIRECT,
    FILTERED,
    SAMPLED,
    Guard,
    all_entries,
    how_many,
    truth,
)  # fmt: skip
from .layout import Layout
from .memory import (
    COUNTERS,
    UNGUARDED,
    constant_byte,
    context_field,
    frame_byte,
    kernel_byte,
    kernel_memory,
)
from .slots import Slots
from .state import Entry, State

# Results (include/uapi/linux/pkt_cls.h): TCX_NEXT is TC_ACT_UNSPEC.
NEXT, SHOT, REDIRECT = 0xFFFF_FFFF, 2, 7
ALLOWED, ANSWERED = 0, 1
# Ethernet's and ARP's bytes.
ARP_ANSWER = 42


@dataclass(frozen=True)
class Claim:
    name: str
    premise: z3.BoolRef
    conclusion: z3.BoolRef


class Run:
    """One end of a program: its claims, and the inputs that must be able to reach it."""

    def __init__(
        self,
        function: str,
        program: Object,
        layouts: dict[str, Layout],
        slots: Slots,
        end: State,
    ) -> None:
        self.egress = function == "guest_egress"
        self.program = program
        self.layouts = layouts
        self.end = end
        result = end.registers[0]
        assert isinstance(result, (int, z3.BitVecRef))
        self.result = bits.term(bits.low(result, 32), 32)
        self.guard = Guard(slots, end.slot_reads)
        passes = z3.Or(self.result == NEXT, self.result == REDIRECT)
        # However its policy changes meanwhile.
        self.ended = truth(bits.every(end.path))
        # By a policy that stayed in force, where the frame passes: `is_confirmed` is claimed.
        self.reached = z3.And(
            self.ended, self.guard.prophecies(passes), self.guard.names_no_loopback()
        )
        self.frame = Frame(frame_byte, z3.BitVec("length", 32))
        # Marks the guard's own answers for the guest; 0 marks nothing.
        mark = z3.Concat(*[constant_byte("MARK", index) for index in (3, 2, 1, 0)])
        self.marked = z3.And(z3.BitVec("mark", 32) == mark, mark != 0)

    # What can happen

    def allowed(self) -> z3.BoolRef:
        return z3.And(self.reached, self.result == NEXT)

    def answered(self) -> z3.BoolRef:
        return z3.And(self.reached, self.result == REDIRECT)

    def dropped(self) -> z3.BoolRef:
        return z3.And(self.reached, self.result == SHOT)

    def own_answer(self) -> z3.BoolRef:
        """The guard's own answer on its way: to its guest, or marked and for its guest."""
        g, f = self.guard, self.frame
        mac, who, owner = (
            (g.mac(), g.owns, self.marked)
            if self.egress
            else (g.gateway_mac(), g.is_gateway, equal(f.destination_mac, g.mac()))
        )
        v6 = Packet(f, 6)
        arp = z3.And(
            f.is_arp_reply(),
            equal(f.at(22, 6), mac),
            who(Arp(f).sender),
            equal(f.at(32, 6), f.destination_mac),
        )
        advertisement = z3.And(
            f.is_advertisement(),
            who(v6.source),
            z3.Not(is_mapped(v6.source)),
            equal(f.at(62, 16), v6.source),
            equal(f.at(80, 6), mac),
        )
        if not self.egress:
            arp = z3.And(arp, g.owns(Arp(f).target))
            # The guest may have asked from an address of its link.
            to = v6.destination
            advertisement = z3.And(advertisement, z3.Or(g.owns(to), _is_of_link(to)))
        return z3.And(owner, equal(f.source_mac, mac), z3.Or(arp, advertisement))

    def claims(self) -> Iterator[Claim]:
        known = z3.Or(*[self.result == value for value in (NEXT, SHOT, REDIRECT)])
        yield Claim("the result is next, shot or redirect", self.ended, known)
        passes = z3.And(self.ended, z3.Or(self.result == NEXT, self.result == REDIRECT))
        yield Claim(
            "what passes was judged by one policy, then still in force",
            z3.And(passes, *[z3.Not(one) for one in self.guard.all_judged()]),
            self.guard.is_confirmed(),
        )
        yield from self._allowed_claims()
        yield from self._answer_claims()
        yield from self._counter_claims()

    # What is allowed

    def _allowed_claims(self) -> Iterator[Claim]:
        g, f = self.guard, self.frame
        allowed = self.allowed()
        judged = z3.And(allowed, z3.Not(self.own_answer()))
        mode = g.mode()
        modes = z3.Or(*[mode == value for value in (FILTERED, CONNTRACK, SAMPLED, DIRECT)])
        yield Claim("there is a policy with a known mode", judged, modes)
        yield Claim("no VLAN tag", allowed, context_field("vlan_present") == 0)
        other = z3.And(judged, z3.Not(f.is_v4()), z3.Not(f.is_v6()))
        yield Claim("EtherType IPv4 or IPv6", other, z3.BoolVal(False))
        unicast = z3.And(f.byte(6) & 1 == 0, z3.Not(equal(f.source_mac, constant(bytes(6)))))
        if self.egress:
            yield Claim("source MAC is the guest's", allowed, equal(f.source_mac, g.mac()))
            to_gateway = equal(f.destination_mac, g.gateway_mac())
            yield Claim("destination MAC is the gateway's", judged, to_gateway)
        else:
            yield Claim("source MAC is unicast", judged, unicast)
            to_guest = equal(f.destination_mac, g.mac())
            yield Claim("destination MAC is the guest's", allowed, to_guest)
        changed = all_entries(self.end.log, "change_tail") + all_entries(
            self.end.log, "store_bytes"
        )
        yield Claim("an allowed frame is unchanged", allowed, how_many(changed) == 0)
        for version in (4, 6):
            packet = Packet(f, version)
            here = z3.And(judged, f.is_v4() if version == 4 else f.is_v6())
            yield from self._packet_claims(here, packet)

    def _packet_claims(self, here: z3.BoolRef, packet: Packet) -> Iterator[Claim]:
        g, ip = self.guard, f"IPv{packet.version}"
        own, peer = packet.source, packet.destination
        side = "source"
        if not self.egress:
            own, peer, side = peer, own, "destination"
        listed = z3.Or(g.mode() == FILTERED, g.mode() == CONNTRACK)
        rule = g.has_live_rule(packet.rule_protocol(), peer, packet.port(not self.egress))
        echo = packet.is_echo(request=self.egress)
        protocols = z3.Or(packet.is_udp(), packet.is_tcp(), packet.is_icmp())
        yield Claim(f"{ip}: {side} address is the guest's", here, g.owns(own))
        error = z3.BoolVal(False)
        if not self.egress:
            error = z3.And(packet.is_icmp(), z3.Not(echo))
            yield from self._error_claims(z3.And(here, error), listed, packet)
        own_flow = z3.And(here, z3.Not(error))
        yield Claim(f"{ip}: peer can be a peer", own_flow, can_be_peer(packet.version, peer))
        yield Claim(f"{ip}: a live rule names the peer", z3.And(own_flow, listed), rule)
        yield Claim(f"{ip}: version and header length", here, packet.header())
        yield Claim(f"{ip}: no fragment", here, packet.whole())
        yield Claim(f"{ip}: no IPv4 address in disguise", here, packet.not_mapped())
        yield Claim(f"{ip}: lengths agree with the frame's", here, packet.lengths())
        yield Claim(f"{ip}: UDP, TCP or ICMP", here, protocols)
        yield Claim(f"{ip}: transport header is whole", here, packet.transport_header())
        if self.egress:
            yield Claim(f"{ip}: ICMP is echo", z3.And(here, packet.is_icmp()), echo)
        if "SKB" in self.program.constants:
            yield Claim(
                f"{ip}: nothing is left to change but its checksum", here, (self._offload(packet))
            )

    def _error_claims(
        self, here: z3.BoolRef, listed: z3.BoolRef, packet: Packet
    ) -> Iterator[Claim]:
        """An ICMP error quotes a packet that the guest could rightly have sent."""
        ip, frame = f"IPv{packet.version}", packet.frame
        kinds = (3, 11, 12) if packet.version == 4 else (1, 2, 3, 4)
        kind = z3.Or(*[frame.byte(packet.transport) == value for value in kinds])
        quoted = Packet(frame, packet.version, packet.transport + 8)
        rule = self.guard.has_live_rule(
            quoted.rule_protocol(), quoted.destination, quoted.port(of_source=False)
        )
        asked = z3.Implies(
            quoted.is_icmp(), frame.byte(quoted.transport) == (8 if packet.version == 4 else 128)
        )
        known = z3.And(z3.Or(quoted.is_udp(), quoted.is_tcp(), quoted.is_icmp()), asked)
        owned = equal(quoted.source, packet.destination)
        yield Claim(f"{ip}: ICMP is echo or an error", here, kind)
        yield Claim(f"{ip}: an error quotes the guest", here, z3.And(owned, quoted.header()))
        yield Claim(f"{ip}: an error quotes UDP, TCP or echo", here, known)
        yield Claim(f"{ip}: a live rule names whom an error quotes", z3.And(here, listed), rule)

    def _offload(self, packet: Packet) -> z3.BoolRef:
        """The frame is whole, or to be cut into TCP segments of its IP version or UDP datagrams and
        nothing else; a checksum still to be written goes where it belongs."""

        def constant_word(field: str, skip: int = 0) -> z3.BitVecRef:
            start = self.layouts["SocketBufferLayout"].fields[field] + skip
            return z3.Concat(*[constant_byte("SKB", start + i) for i in (3, 2, 1, 0)])

        def kernel(field: str, size: int) -> z3.BitVecRef:
            start = z3.ZeroExt(32, constant_word(field))
            content = [kernel_byte(start + i) for i in reversed(range(size))]
            return z3.Concat(*content) if size > 1 else content[0]

        mask = constant_word("summed_mask")
        pending = z3.ZeroExt(24, kernel("summed", 1)) & mask == mask
        headroom = z3.Extract(31, 0, kernel("data", 8) - kernel("head", 8))
        start = z3.ZeroExt(16, kernel("checksum_start", 2)) - headroom
        offset = z3.ZeroExt(16, kernel("checksum_offset", 2))
        field = z3.If(
            packet.is_udp(),
            z3.BitVecVal(6, 32),
            z3.If(packet.is_tcp(), z3.BitVecVal(16, 32), z3.BitVecVal(2, 32)),
        )
        right = z3.And(start == packet.transport, offset == field)
        # The kernel lets no checksum start before the frame (skb_partial_csum_set).
        pending = z3.And(pending, start != 0xFFFF_FFFF)
        shared = kernel("head", 8) + z3.ZeroExt(32, kernel("end", 4))
        at = shared + z3.ZeroExt(32, constant_word("segment_kinds"))
        kinds = z3.Concat(*[kernel_memory(at + i) for i in (3, 2, 1, 0)])

        def cut_into(kind: int) -> z3.BoolRef:
            wanted = constant_word("segments", 4 * kind)
            return z3.And(wanted != 0, kinds & ~constant_word("segment_details") == wanted)

        cut = z3.Or(
            z3.And(packet.is_tcp(), cut_into(0 if packet.version == 4 else 1)),
            z3.And(packet.is_udp(), cut_into(2)),
        )
        whole = context_field("gso_size") == 0
        return z3.And(z3.Or(whole, cut), z3.Implies(pending, right))

    # What is answered

    def _answer_claims(self) -> Iterator[Claim]:
        answered, g = self.answered(), self.guard
        redirects = all_entries(self.end.log, "redirect")
        yield Claim("an answer is redirected once", answered, how_many(redirects) == 1)
        for entry in redirects:
            ifindex, flags = entry.args
            assert isinstance(ifindex, (int, z3.BitVecRef))
            assert isinstance(flags, (int, z3.BitVecRef))
            back = z3.And(
                bits.term(ifindex, 32) == context_field("ifindex"),
                bits.term(flags, 64) == (0 if self.egress else 1),
            )
            yield Claim("an answer goes back by the same interface", _when(answered, entry), back)
        stored = all_entries(self.end.log, "store_bytes")
        yield Claim("an answer is written once", answered, how_many(stored) == 1)
        tails = all_entries(self.end.log, "change_tail")
        yield Claim("an answer's length is set once", answered, how_many(tails) == 1)
        for entry in stored:
            offset, content, code = entry.args
            assert isinstance(content, tuple) and isinstance(code, (int, z3.BitVecRef))
            here, kind = _when(answered, entry), f"an answer of {len(content)} bytes"
            if self.egress and len(content) == ARP_ANSWER:
                # Of IPv6 frames the solver has not decided it (README.md).
                here = z3.And(here, self.frame.is_at(12, b"\x08\x06"))
                kind += " to ARP"
            written = [bits.term(part, 8) for part in content]
            size = z3.And(
                *[
                    z3.Implies(
                        truth(t.guard),
                        z3.And(
                            bits.term(_word(t.args[0]), 32) == len(content),
                            bits.term(_word(t.args[1]), 64) == 0,
                        ),
                    )
                    for t in tails
                ]
            )
            fills = z3.And(z3.BoolVal(offset == 0), bits.term(code, 64) == 0, size)
            yield Claim(f"{kind} fills the frame", here, fills)
            answer = Frame(lambda i, w=written: w[i], z3.BitVecVal(len(content), 32))
            yield Claim(f"{kind} tells the truth", here, self._truthful(answer, len(content)))
        if self.egress:
            mac = equal(self.frame.source_mac, g.mac())
            yield Claim("only the guest's MAC is answered", answered, mac)

    def _truthful(self, answer: Frame, length: int) -> z3.BoolRef:
        """The gateway is at its MAC (to the guest), or the guest at its own (to its network)."""
        g = self.guard
        mac, is_claimed = (g.gateway_mac(), g.is_gateway) if self.egress else (g.mac(), g.owns)
        claims = [equal(answer.source_mac, mac)]
        if self.egress:
            claims.append(equal(answer.destination_mac, g.mac()))
        if length == ARP_ANSWER:
            arp = Arp(answer)
            claims += [
                answer.is_arp_reply(),
                equal(answer.at(22, 6), mac),
                is_claimed(arp.sender),
                equal(answer.at(32, 6), answer.destination_mac),
            ]
            if self.egress:
                claims.append(z3.Or(g.owns(arp.target), equal(arp.target[12:], constant(bytes(4)))))
        elif length == 86:
            packet = Packet(answer, 6)
            claims += [
                answer.is_advertisement(),
                is_claimed(packet.source),
                z3.Not(is_mapped(packet.source)),
                equal(answer.at(62, 16), packet.source),
                equal(answer.at(80, 6), mac),
            ]
            if self.egress:
                all_nodes = constant(b"\xff\x02" + bytes(13) + b"\x01")
                to = packet.destination
                # A guest may ask from an address of its link: the answer goes back to that, and
                # to its MAC.
                asker = z3.And(_is_of_link(to), equal(to, Packet(self.frame, 6).source))
                claims.append(z3.Or(g.owns(to), equal(to, all_nodes), asker))
        else:
            return z3.BoolVal(False)
        return z3.And(*claims)

    # What is counted

    def _counter_claims(self) -> Iterator[Claim]:
        """rx = allowed + answered + dropped: each run adds one to one counter of its outcome. Where the
        frame's guard is not in its place nothing passes, and that is counted apart."""
        fields, size = self.layouts["Count"].fields, self.layouts["Count"].size
        row = self.program.maps["COUNTERS"].inner
        assert row is not None
        # Behind the outcomes: rx, and the guard's own answers.
        rx = row.value_size // size - 2
        own = z3.And(self.allowed(), self.own_answer(), self.marked) if self.egress else False
        counted = z3.And(self.reached, z3.Not(own))
        stores = all_entries(self.end.log, "store", COUNTERS)
        # The third row is of events.
        stores = [entry for entry in stores if entry.args[1] != 2]
        apart = all_entries(self.end.log, "store", UNGUARDED)
        unguarded = z3.And(how_many(stores) == 0, how_many(apart) == 2, self.result == SHOT)
        for what, by in (
            ("packets", z3.BitVecVal(1, 64)),
            ("bytes", z3.ZeroExt(32, z3.BitVec("length", 32))),
        ):
            entries = _counts(stores, size, fields[what])
            outcomes = _where(entries, lambda at: bits.compare("lt", _div(at, size), rx, 64))
            received = _where(entries, lambda at: bits.compare("eq", _div(at, size), rx, 64))
            one = z3.And(how_many(outcomes) == 1, how_many(received) == 1)
            both = z3.And(one, how_many(entries) == 2, how_many(stores) == 4, how_many(apart) == 0)
            either = z3.Or(both, unguarded)
            yield Claim(f"rx and one outcome are counted in {what}", counted, either)
            for entry in _counts(apart, size, fields[what]):
                new, old = (_word(entry.args[i]) for i in (3, 4))
                grown = bits.term(new, 64) == bits.term(old, 64) + by
                yield Claim(f"{what} grow by what came", _when(self.reached, entry), grown)
            for entry in entries:
                key, new, old = (_word(entry.args[i]) for i in (1, 3, 4))
                grown = z3.And(
                    bits.term(new, 64) == bits.term(old, 64) + by,
                    bits.term(key, 32) == (0 if self.egress else 1),
                )
                yield Claim(f"{what} grow by what came", _when(self.reached, entry), grown)
            for entry in outcomes:
                index = bits.term(_div(_word(entry.args[2]), size), 64)
                right = z3.If(
                    index == ALLOWED,
                    self.result == NEXT,
                    self.result == z3.If(index == ANSWERED, z3.BitVecVal(REDIRECT, 32), SHOT),
                )
                yield Claim(f"{what} are the result's", _when(self.ended, entry), right)

    # What must be possible, so that no claim is true of nothing

    def possible(self) -> dict[str, z3.BoolRef]:
        """Frames of each kind that the program lets pass, answers or drops."""
        f, filtered = self.frame, self.guard.mode() == FILTERED
        found = {}
        for version, is_ip in ((4, f.is_v4()), (6, f.is_v6())):
            packet = Packet(f, version)
            for name, kind in (
                ("UDP", packet.is_udp()), ("TCP", packet.is_tcp()), ("ICMP", packet.is_icmp()),
            ):  # fmt: skip
                judged = z3.And(self.allowed(), filtered, is_ip, kind, z3.Not(self.own_answer()))
                found[f"{name} over IPv{version} is allowed"] = judged
        own = z3.And(self.allowed(), self.own_answer())
        found["an ARP reply of the guard's own passes"] = z3.And(own, f.is_arp_reply())
        found["an advertisement of the guard's own passes"] = z3.And(own, f.is_v6())
        found["an ARP request is answered"] = z3.And(self.answered(), f.is_at(12, b"\x08\x06"))
        found["a neighbour solicitation is answered"] = z3.And(self.answered(), f.is_v6())
        found["a frame is dropped"] = self.dropped()
        return found


@dataclass(frozen=True)
class Arp:
    """The protocol addresses of an ARP frame."""

    frame: Frame

    @property
    def sender(self) -> list[z3.BitVecRef]:
        return constant(bytes(10) + b"\xff\xff") + self.frame.at(28, 4)

    @property
    def target(self) -> list[z3.BitVecRef]:
        return constant(bytes(10) + b"\xff\xff") + self.frame.at(38, 4)


def _is_of_link(address: list[z3.BitVecRef]) -> z3.BoolRef:
    """Of fe80::/10 (RFC 4291, 2.5.6)."""
    return z3.And(address[0] == 0xFE, address[1] & 0xC0 == 0x80)


def _word(value: object) -> bits.Word:
    assert isinstance(value, (int, z3.BitVecRef))
    return value


def _div(offset: bits.Word, size: int) -> bits.Word:
    return bits.arithmetic("div", offset, size, 64)


def _mod(offset: bits.Word, size: int) -> bits.Word:
    return bits.arithmetic("mod", offset, size, 64)


def _counts(stores: list[Entry], size: int, field: int) -> list[Entry]:
    """The stores to the field of that offset in any counter of `size` bytes."""
    return _where(stores, lambda at: bits.compare("eq", _mod(at, size), field, 64))


def _where(entries: list[Entry], holds: Callable[[bits.Word], bits.Truth]) -> list[Entry]:
    """The stores whose offset, known or not, is such that `holds`."""
    chosen = [
        replace(entry, guard=bits.every([entry.guard, holds(_word(entry.args[2]))]))
        for entry in entries
    ]
    return [entry for entry in chosen if entry.guard is not False]


def _when(premise: z3.BoolRef, entry: Entry) -> z3.BoolRef:
    return z3.And(premise, truth(entry.guard))
