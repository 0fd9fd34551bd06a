"""Where a function's paths meet, and in which order to execute so that they have met by then."""

from __future__ import annotations

from .elf import CALL, LD_IMM64, Instruction, Object, Unmodelled

EXIT, MOV = 0x95, 11


def _reads(i: Instruction) -> set[int]:
    """The registers among r6 to r9 whose content an instruction needs."""
    kind, by_register = i.opcode & 7, bool(i.opcode & 8)
    if i.opcode in (LD_IMM64, CALL, EXIT):
        return set()
    if kind in (4, 7):
        return ({i.src} if by_register else set()) | (set() if i.opcode >> 4 == MOV else {i.dst})
    if kind == 1:
        return {i.src}
    return {i.dst, i.src}


def _writes(i: Instruction) -> set[int]:
    """The registers among r6 to r9 that an instruction fills anew."""
    return {i.dst} if i.opcode == LD_IMM64 or i.opcode & 7 in (1, 4, 7) else set()


class Flow:
    """Control flow of the functions added so far."""

    def __init__(self, program: Object) -> None:
        self.program = program
        self.joins: set[int] = set()
        # Reverse post-order: all but loops' ways back lead from lower to higher.
        self.order: dict[int, int] = {}

    def add(self, entry: int) -> None:
        """Adds the function that starts at `entry`."""
        if entry in self.order:
            return
        predecessors: dict[int, int] = {}
        finished: list[int] = []
        seen = {entry}
        work = [(entry, iter(self.successors(entry)))]
        while work:
            pc, rest = work[-1]
            after = next(rest, None)
            if after is None:
                finished.append(pc)
                work.pop()
                continue
            predecessors[after] = predecessors.get(after, 0) + 1
            if after not in seen:
                seen.add(after)
                work.append((after, iter(self.successors(after))))
        for number, pc in enumerate(reversed(finished)):
            self.order[pc] = number
        self.joins |= {pc for pc, count in predecessors.items() if count > 1}
        self.joins.add(entry)
        # A callee's paths meet where it returns to.
        self.joins |= {pc + 1 for pc in seen if self._is_call(pc)}

    def _is_call(self, pc: int) -> bool:
        instruction = self.program.code[pc]
        return instruction is not None and instruction.callee is not None

    def is_read(self, pc: int, register: int) -> bool:
        """Whether a program at `pc` may yet read what is now in one of r6 to r9."""
        seen: set[int] = set()
        work = [pc]
        while work:
            at = work.pop()
            if at in seen:
                continue
            seen.add(at)
            i = self.program.code[at]
            if i is None or register in _reads(i):
                return True
            if register not in _writes(i):
                work += self.successors(at)
        return False

    def successors(self, pc: int) -> list[int]:
        i = self.program.code[pc] if 0 <= pc < len(self.program.code) else None
        if i is None:
            raise Unmodelled(f"control flow leaves the program at {pc}")
        if i.opcode == LD_IMM64:
            return [pc + 2]
        if i.opcode == EXIT:
            return []
        if i.opcode & 7 in (5, 6) and i.opcode >> 4 == 0:
            return [pc + 1 + (i.imm if i.opcode & 7 == 6 else i.offset)]
        if i.opcode & 7 in (5, 6) and i.opcode >> 4 != 8:
            return [pc + 1, pc + 1 + i.offset]
        return [pc + 1]
