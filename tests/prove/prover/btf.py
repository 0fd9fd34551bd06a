"""The object's own type information (Documentation/bpf/btf.rst): map definitions and lines."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

INT, PTR, ARRAY, STRUCT, ENUM, FUNC_PROTO, VAR, DATASEC = 1, 2, 3, 4, 6, 13, 14, 15
# Bytes that follow a type of this kind: fixed, and for each of its members.
_FIXED = {INT: 4, ARRAY: 12, VAR: 4, 17: 4}
_EACH = {STRUCT: 12, 5: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, 19: 12}


@dataclass
class Type:
    """`size` is a size, or the number of the type that this one points to."""

    name: str
    kind: int
    size: int
    members: dict[str, int] = field(default_factory=dict)
    element: int = 0
    count: int = 0


class Btf:
    """The types of one object, by number."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        header, types, length, strings = struct.unpack_from("<4I", data, 4)
        self._strings = header + strings
        self.types = [Type("void", 0, 0)]
        position = header + types
        end = position + length
        while position < end:
            position = self._read(position)

    def text(self, offset: int) -> str:
        start = self._strings + offset
        return self.data[start : self.data.index(b"\0", start)].decode()

    def _read(self, position: int) -> int:
        name, info, size = struct.unpack_from("<3I", self.data, position)
        kind, count, position = info >> 24 & 31, info & 0xFFFF, position + 12
        new = Type(self.text(name), kind, size)
        if kind == ARRAY:
            new.element, _, new.count = struct.unpack_from("<3I", self.data, position)
        if kind == STRUCT:
            for index in range(count):
                member, of, _ = struct.unpack_from("<3I", self.data, position + 12 * index)
                new.members[self.text(member)] = of
        self.types.append(new)
        return position + _FIXED.get(kind, 0) + count * _EACH.get(kind, 0)

    def named(self, name: str, kind: int) -> Type | None:
        return next((t for t in self.types if t.kind == kind and t.name == name), None)

    def size_of(self, number: int) -> int:
        one = self.types[number]
        return one.count * self.size_of(one.element) if one.kind == ARRAY else one.size

    def map_definition(self, definition: Type) -> dict[str, int]:
        """libbpf's convention: numbers are lengths of arrays pointed to, types are pointed to."""
        found = {}
        for name, number in definition.members.items():
            pointer = self.types[number]
            if name == "values":
                # An array of pointers to the inner map's definition.
                found[name] = self.types[pointer.element].size
            elif pointer.kind == PTR and name in ("key", "value"):
                found[f"{name}_size"] = self.size_of(pointer.size)
            elif pointer.kind == PTR and self.types[pointer.size].kind == ARRAY:
                found[name] = self.types[pointer.size].count
        return found


def lines(btf: Btf, extension: bytes, base: dict[str, int]) -> dict[int, str]:
    """For each instruction that begins a line of source, the line. `base` is by section."""
    header, start, length = (struct.unpack_from("<I", extension, place)[0] for place in (4, 16, 20))
    position = header + start
    end = position + length
    (size,) = struct.unpack_from("<I", extension, position)
    position += 4
    found = {}
    while position < end:
        section, count = struct.unpack_from("<II", extension, position)
        position += 8
        for _ in range(count):
            offset, file, _, line = struct.unpack_from("<4I", extension, position)
            position += size
            if btf.text(section) in base:
                path = btf.text(file)
                path = path[path.find("/ebpf/") + 1 :] if "/ebpf/" in path else path
                found[base[btf.text(section)] + offset // 8] = f"{path}:{line >> 10}"
    return found
