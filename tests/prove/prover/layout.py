"""Where the fields of the programs' structures lie: read from the object's debug information."""

from __future__ import annotations

import io
from dataclasses import dataclass

from elftools.elf.elffile import ELFFile

from .elf import Unmodelled

STRUCTURES = ("State", "Slot", "Policy", "Bucket", "Count", "SocketBufferLayout")


@dataclass(frozen=True)
class Layout:
    """A structure's size and its fields' offsets, in bytes."""

    size: int
    fields: dict[str, int]


def layouts(content: bytes) -> dict[str, Layout]:
    """The layouts of `STRUCTURES`; one that is missing or ambiguous stops the proof."""
    found: dict[str, Layout] = {}
    for unit in ELFFile(io.BytesIO(content)).get_dwarf_info().iter_CUs():
        for die in unit.iter_DIEs():
            if die.tag != "DW_TAG_structure_type" or "DW_AT_name" not in die.attributes:
                continue
            name = die.attributes["DW_AT_name"].value.decode()
            if name not in STRUCTURES or "DW_AT_declaration" in die.attributes:
                continue
            layout = Layout(
                die.attributes["DW_AT_byte_size"].value,
                {
                    member.attributes["DW_AT_name"].value.decode(): member.attributes[
                        "DW_AT_data_member_location"
                    ].value
                    for member in die.iter_children()
                    if member.tag == "DW_TAG_member"
                },
            )
            if found.setdefault(name, layout) != layout:
                raise Unmodelled(f"two structures are named {name}")
    missing = [name for name in STRUCTURES if name not in found]
    if missing:
        raise Unmodelled(f"no debug information for {', '.join(missing)}")
    return found
