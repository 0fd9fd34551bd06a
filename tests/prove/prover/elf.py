"""The object file: instructions, calls and maps of each program, as the loader would see them."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace

from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section, SymbolTableSection

from .btf import VAR, Btf, lines

# include/uapi/linux/bpf.h, enum bpf_map_type, of the maps that the prover models.
MAP_TYPES = {
    2: "array",
    6: "percpu_array",
    1: "hash",
    9: "lru_hash",
    12: "array_of_maps",
    27: "ringbuf",
}
# Relocation types of the BPF psABI: a map's address in ld_imm64, and a call of another section.
R_BPF_64_64, R_BPF_64_32 = 1, 10
PSEUDO_CALL = 1
CALL, LD_IMM64 = 0x85, 0x18


class Unmodelled(Exception):
    """Something the prover does not know. Nothing is skipped: the proof stops here."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; what it names (a map, a callee) is filled in from relocations."""

    opcode: int
    dst: int
    src: int
    offset: int
    imm: int
    map: str | None = None
    callee: int | None = None
    constant: str | None = None
    variable: str | None = None


@dataclass(frozen=True)
class MapDefinition:
    """A map: sizes in bytes. Userspace may give it another `max_entries` when it loads it."""

    name: str
    kind: str
    key_size: int
    value_size: int
    max_entries: int
    # What the maps in an array of maps are like; their sizes are their own.
    inner: MapDefinition | None = None


@dataclass(frozen=True)
class Object:
    """All code in one list, so that a program counter is an index into it."""

    code: tuple[Instruction | None, ...]
    functions: dict[str, int]
    maps: dict[str, MapDefinition]
    # Sizes of the read-only constants, whose values the loader may set.
    constants: dict[str, int]
    # Sizes of the variables, which all CPUs share.
    variables: dict[str, int]
    # The line of source that an instruction comes from.
    sources: dict[int, str]
    # Where in the file each instruction stands.
    places: dict[int, int]


def load(content: bytes) -> Object:
    """Reads an object file. The second half of a 16-byte instruction is None."""
    elf = ELFFile(io.BytesIO(content))
    if elf.header["e_machine"] != "EM_BPF" or not elf.little_endian:
        raise Unmodelled("not a little-endian BPF object")
    symbols = elf.get_section_by_name(".symtab")
    if not isinstance(symbols, SymbolTableSection):
        raise Unmodelled("the object has no symbol table")
    base: dict[int, int] = {}
    places: dict[int, int] = {}
    code: list[Instruction | None] = []
    for index, section in enumerate(elf.iter_sections()):
        # SHF_EXECINSTR
        if section["sh_flags"] & 4 and section.data_size:
            base[index] = len(code)
            for number in range(section.data_size // 8):
                places[base[index] + number] = section["sh_offset"] + 8 * number
            code += _decode(section.data(), base[index])
    types = elf.get_section_by_name(".BTF")
    if types is None:
        raise Unmodelled("the object has no type information (BTF)")
    btf = Btf(types.data())
    maps = _maps(elf, symbols, btf)
    constants, variables = _data(elf, symbols, ".rodata"), _data(elf, symbols, ".bss")
    for section in elf.iter_sections():
        if isinstance(section, RelocationSection) and section["sh_info"] in base:
            _relocate(code, base, section, elf, symbols, set(maps), set(constants), set(variables))
    functions = {
        symbol.name: base[symbol["st_shndx"]] + symbol["st_value"] // 8
        for symbol in symbols.iter_symbols()
        if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] in base
    }
    by_name = {elf.get_section(index).name: start for index, start in base.items()}
    extension = elf.get_section_by_name(".BTF.ext")
    sources = lines(btf, extension.data(), by_name) if extension is not None else {}
    return Object(tuple(code), functions, maps, constants, variables, sources, places)


def _decode(data: bytes, start: int) -> list[Instruction | None]:
    code: list[Instruction | None] = []
    position = 0
    while position < len(data):
        opcode, registers, offset, imm = struct.unpack_from("<BBhi", data, position)
        dst, src = registers & 15, registers >> 4
        position += 8
        if opcode == LD_IMM64:
            (high,) = struct.unpack_from("<i", data, position + 4)
            position += 8
            value = (imm & 0xFFFF_FFFF) | (high & 0xFFFF_FFFF) << 32
            code += [Instruction(opcode, dst, src, offset, value), None]
        elif opcode == CALL and src == PSEUDO_CALL:
            callee = start + len(code) + 1 + imm
            code.append(Instruction(opcode, dst, src, offset, imm, callee=callee))
        else:
            code.append(Instruction(opcode, dst, src, offset, imm))
    return code


def _relocate(
    code: list[Instruction | None],
    base: dict[int, int],
    section: RelocationSection,
    elf: ELFFile,
    symbols: SymbolTableSection,
    maps: set[str],
    constants: set[str],
    variables: set[str],
) -> None:
    for relocation in section.iter_relocations():
        position = base[section["sh_info"]] + relocation["r_offset"] // 8
        symbol = symbols.get_symbol(relocation["r_info_sym"])
        old = code[position]
        if old is None:
            raise Unmodelled(f"a relocation inside an instruction at {position}")
        kind, name = relocation["r_info_type"], symbol.name
        # Of a section the immediate tells which byte.
        if symbol["st_info"]["type"] == "STT_SECTION" and not name:
            name = elf.get_section(symbol["st_shndx"]).name
            if kind == R_BPF_64_64:
                name, offset = _named(symbols, symbol["st_shndx"], old.imm, name)
                old = replace(old, imm=offset)
        if kind == R_BPF_64_64 and name in maps:
            code[position] = replace(old, imm=0, map=name)
        elif kind == R_BPF_64_64 and name in constants:
            code[position] = replace(old, constant=name)
        elif kind == R_BPF_64_64 and name in variables:
            code[position] = replace(old, variable=name)
        elif kind == R_BPF_64_32 and old.opcode == CALL and symbol["st_shndx"] in base:
            target = base[symbol["st_shndx"]] + symbol["st_value"] // 8
            # Of a section only the immediate tells which function: its start less one.
            if symbol["st_info"]["type"] == "STT_SECTION":
                target += old.imm + 1
            code[position] = replace(old, src=PSEUDO_CALL, callee=target)
        else:
            raise Unmodelled(f"relocation type {kind} of {name} at {position}")


def _named(symbols: SymbolTableSection, section: int, offset: int, name: str) -> tuple[str, int]:
    """What is at `offset` of a section, and where in that; the section itself where it has no name.
    Claims speak of constants by their names."""
    for symbol in symbols.iter_symbols():
        here = symbol["st_shndx"] == section and symbol["st_info"]["type"] == "STT_OBJECT"
        if here and symbol["st_value"] <= offset < symbol["st_value"] + symbol["st_size"]:
            return symbol.name, offset - symbol["st_value"]
    return name, offset


def _maps(elf: ELFFile, symbols: SymbolTableSection, btf: Btf) -> dict[str, MapDefinition]:
    maps = {}
    for symbol in symbols.iter_symbols():
        shndx = symbol["st_shndx"]
        if symbol["st_info"]["type"] != "STT_OBJECT" or not isinstance(shndx, int):
            continue
        section = elf.get_section(shndx)
        if section.name == "maps":
            # aya-ebpf's bpf_map_def: type, key size, value size, entries, flags, id, pinning.
            numbers = struct.unpack_from("<4I", section.data(), symbol["st_value"])
            maps[symbol.name] = _map(symbol.name, *numbers)
        elif section.name == ".maps":
            maps[symbol.name] = _btf_map(symbol.name, btf)
    return maps


def _btf_map(name: str, btf: Btf) -> MapDefinition:
    variable = btf.named(name, VAR)
    if variable is None:
        raise Unmodelled(f"map {name} without type information")
    outer = btf.map_definition(btf.types[variable.size])
    inner = None
    if "values" in outer:
        found = btf.map_definition(btf.types[outer["values"]])
        inner = _map(f"{name}'s", *(found.get(key, 0) for key in _KEYS))
        outer["value_size"] = 4
    return _map(name, *(outer.get(key, 0) for key in _KEYS), inner=inner)


_KEYS = ("type", "key_size", "value_size", "max_entries")


def _map(
    name: str, kind: int, key: int, value: int, entries: int, inner: MapDefinition | None = None
) -> MapDefinition:
    if kind not in MAP_TYPES or (inner is None) == (MAP_TYPES[kind] == "array_of_maps"):
        raise Unmodelled(f"map {name} of type {kind}")
    return MapDefinition(name, MAP_TYPES[kind], key, value, entries, inner)


def _data(elf: ELFFile, symbols: SymbolTableSection, prefix: str) -> dict[str, int]:
    """Sizes of the sections of that name and of what is in them: .rodata, which the loader freezes
    before the programs run, or .bss, which stays writable."""

    def is_here(section: Section) -> bool:
        # SHF_WRITE
        writable = bool(section["sh_flags"] & 1)
        return section.name.startswith(prefix) and writable == (prefix == ".bss")

    found = {section.name: section.data_size for section in elf.iter_sections() if is_here(section)}
    for symbol in symbols.iter_symbols():
        shndx = symbol["st_shndx"]
        if symbol["st_info"]["type"] == "STT_OBJECT" and isinstance(shndx, int):
            if is_here(elf.get_section(shndx)):
                found[symbol.name] = symbol["st_size"]
    return found
