"""Executes a program on a frame, a policy and an allowlist of which nothing is known.

Every instruction that can be reached is executed with unknown inputs; what the machine does not
know stops the proof (`Unmodelled`). What must hold whatever the inputs, above all that every
access is within its memory, is collected in `obligations` for the solver.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import z3

from . import bits
from .alu import ALU, alu, word
from .atomics import atomic
from .bits import Truth
from .elf import CALL, LD_IMM64, PSEUDO_CALL, Instruction, Object, Unmodelled
from .flow import Flow
from .layout import Layout
from .memory import Memories
from .merge import Merge
from .state import (
    UNWRITTEN,
    UNWRITTEN_STACK,
    Choice,
    Frame,
    Lost,
    MapReference,
    Pointer,
    State,
    Value,
)
from .tries import STAGE, Tries

JUMP = {
    1: "eq", 2: "gt", 3: "ge", 4: "set", 5: "ne", 6: "sgt", 7: "sge", 10: "lt", 11: "le",
    12: "slt", 13: "sle",
}  # fmt: skip
SIZES = {0: 4, 1: 2, 2: 1, 3: 8}
EXIT = 0x95
# Changes the condition of the conditional jump at an instruction (see mutants).
Branch = Callable[[int, z3.BoolRef], z3.BoolRef]
# A loop that runs on for so long has a bound that the machine cannot see.
MOST_ROUNDS = 4096


@dataclass(frozen=True)
class Obligation:
    """What must not happen: `wrong` on `path`."""

    text: str
    pc: int
    path: tuple[z3.BoolRef, ...]
    wrong: Truth


class Machine:
    """Runs one function of an object from start to end, along all its paths at once."""

    def __init__(
        self,
        program: Object,
        layouts: dict[str, Layout],
        branch: Branch | None = None,
    ) -> None:
        from .helpers import Helpers

        self.program = program
        self.branch = branch
        self.obligations: list[Obligation] = []
        self.axioms: list[z3.BoolRef] = []
        self.branches: set[int] = set()
        self.executed: set[int] = set()
        self.steps = 0
        self.merges = 0
        self.memory = Memories(self, layouts)
        self.helpers = Helpers(self)
        self.tries = Tries(self)
        self.finals: list[State] = []
        self._names = 0
        self._rounds: dict[object, int] = {}
        self._flow = Flow(program)
        self._waiting: dict[object, State] = {}
        self._order: list[tuple[tuple[int, ...], int, object]] = []

    # Names, axioms, obligations

    def fresh(self, name: str, width: int) -> z3.BitVecRef:
        """An unknown word, unlike any other."""
        self._names += 1
        return z3.BitVec(f"{name}#{self._names}", width)

    def fresh_truth(self, name: str) -> z3.BoolRef:
        self._names += 1
        return z3.Bool(f"{name}#{self._names}")

    def require(self, state: State, truth: Truth, text: str) -> None:
        """Leaves it to the solver to show that `truth` holds here."""
        if truth is not True:
            wrong = bits.negate(truth)
            self.obligations.append(Obligation(text, state.pc, state.path, wrong))

    # The run

    def run(self, function: str) -> list[State]:
        """Every way in which `function` can end. States that meet in an `exit` are merged."""
        length = z3.BitVec("length", 32)
        linear = z3.BitVec("linear", 32)
        self.axioms.append(z3.ULE(linear, length))
        registers: list[Value] = [UNWRITTEN] * 11
        registers[1] = Pointer("context", 0)
        registers[10] = Pointer("stack0", 512)
        start = State(
            self.program.functions[function],
            registers,
            length,
            linear,
            z3.BitVec("mark", 32),
            path=(STAGE == 0,),
        )
        self.tries.start(start.pc)
        self._flow.add(start.pc)
        self._park(start)
        while self._order:
            _, _, key = heapq.heappop(self._order)
            waiting = self._waiting.pop(key, None)
            if waiting is not None:
                self._run_on(self.tries.returned(waiting))
        return self.finals

    def _run_on(self, state: State) -> None:
        work = [state]
        while work:
            for after, apart in self._step(work.pop()):
                if apart or after.pc in self._flow.joins or after.returned_from is not None:
                    self._park(after)
                else:
                    work.append(after)

    def _park(self, state: State) -> None:
        key = state.key()
        other = self._waiting.get(key)
        if other is None:
            self._waiting[key] = state
            order = self._flow.order
            calls = tuple(order[frame.return_to - 1] for frame in state.callers)
            heapq.heappush(self._order, ((*calls, order[state.pc]), state.pc, key))
            return
        self.merges += 1
        self._waiting[key] = Merge(other, state, self.memory.unknown).result()

    # One instruction

    def _step(self, state: State) -> Iterator[tuple[State, bool]]:
        """The states after the next instruction, and whether one was taken apart for it. Those
        meet again at once."""
        instruction = self.program.code[state.pc]
        if instruction is None:
            raise Unmodelled(f"a jump into the middle of an instruction at {state.pc}")
        self.steps += 1
        self.executed.add(state.pc)
        decided = list(self._decided(state, self._operands(state, instruction)))
        for ready in decided:
            for after in self._execute(ready, instruction):
                yield after, len(decided) > 1

    def _operands(self, state: State, i: Instruction) -> list[int]:
        """The registers whose kind must be known before the instruction can be executed."""
        kind = i.opcode & 7
        if i.opcode in (EXIT, LD_IMM64):
            # Only the program itself must return something.
            return [0] if i.opcode == EXIT and not state.callers else []
        if i.opcode == CALL:
            return [] if i.src == PSEUDO_CALL else self.helpers.arguments(i.imm)
        by_register = bool(i.opcode & 8)
        if kind in (4, 7):
            op = ALU.get(i.opcode >> 4)
            if op == "mov":
                return []
            return [i.dst, i.src] if by_register and op not in ("neg", "end") else [i.dst]
        if kind in (5, 6):
            if i.opcode >> 4 == 0:
                return []
            return [i.dst, i.src] if by_register else [i.dst]
        if kind == 1:
            return [i.src]
        return [i.dst] if kind == 2 or i.opcode >> 5 == 3 else [i.dst, i.src]

    def _decided(self, state: State, registers: list[int]) -> Iterator[State]:
        """The state, taken apart until no register named holds a choice or nothing at all."""
        for register in registers:
            value = state.registers[register]
            if isinstance(value, Lost) and value == UNWRITTEN_STACK:
                state.registers[register] = self.fresh("stack", 64)
            elif isinstance(value, Lost):
                self.require(state, False, f"uses {value.why} (r{register})")
                return
            if isinstance(value, Choice):
                no = bits.negate(value.condition)
                decided = [(c, v) for c, v in ((value.condition, value.yes), (no, value.no))]
                for condition, chosen in decided:
                    if any(bits.same(known, condition) for known in state.path):
                        decided = [(True, chosen)]
                        break
                for condition, chosen in decided:
                    part = state.fork(condition)
                    part.registers[register] = chosen
                    yield from self._decided(part, registers)
                return
        yield state

    def _execute(self, state: State, i: Instruction) -> Iterator[State]:
        kind = i.opcode & 7
        if i.opcode == EXIT:
            yield from self._return(state)
        elif i.opcode == LD_IMM64:
            state.registers[i.dst] = self._immediate(state, i)
            yield self._next(state, 2)
        elif i.opcode == CALL:
            yield from self._call(state, i)
        elif kind in (4, 7):
            alu(state, i, 64 if kind == 7 else 32)
            yield self._next(state)
        elif kind in (5, 6):
            yield from self._jump(state, i, 64 if kind == 5 else 32)
        elif kind in (1, 2, 3):
            yield from self._access(state, i)
        else:
            raise Unmodelled(f"opcode {i.opcode:#04x} at {state.pc}")

    @staticmethod
    def _next(state: State, by: int = 1) -> State:
        state.pc += by
        return state

    def _immediate(self, state: State, i: Instruction) -> Value:
        if i.map:
            return MapReference(i.map)
        if i.constant:
            return Pointer(self.memory.constant(i.constant), i.imm)
        if i.variable:
            return Pointer(self.memory.variable(i.variable), i.imm)
        if i.src:
            raise Unmodelled(f"ld_imm64 of kind {i.src} at {state.pc}")
        return i.imm

    # Jumps, calls, returns

    def _jump(self, state: State, i: Instruction, width: int) -> Iterator[State]:
        op = i.opcode >> 4
        if op == 0:
            # JMP32's `ja` takes its distance from the immediate.
            yield self._next(state, 1 + (i.imm if width == 32 else i.offset))
            return
        if op not in JUMP:
            raise Unmodelled(f"opcode {i.opcode:#04x} at {state.pc}")
        other: Value = state.registers[i.src]
        if not i.opcode & 8:
            other = bits.sign_extend(i.imm & 0xFFFF_FFFF, 32, 64)
        truth = self._compare(state, JUMP[op], state.registers[i.dst], other, width)
        target = state.pc + 1 + i.offset
        if isinstance(truth, bool):
            yield self._next(state, 1 + i.offset if truth else 1)
            return
        self.branches.add(state.pc)
        if self.branch is not None:
            truth = self.branch(state.pc, truth)
        back = self._flow.order[target] <= self._flow.order[state.pc]
        taken = state.fork(truth)
        taken.pc = target
        not_taken = state.fork(bits.negate(truth))
        not_taken.pc = state.pc + 1
        if back:
            self._count_round(state)
        for after in (taken, not_taken):
            if not back or self.feasible(after):
                yield after

    def _count_round(self, state: State) -> None:
        rounds = self._rounds.get(state.key(), 0) + 1
        self._rounds[state.key()] = rounds
        if rounds > MOST_ROUNDS:
            raise Unmodelled(f"a loop without a visible bound at {state.pc}")

    def feasible(self, state: State) -> bool:
        """Whether the solver finds inputs that lead here. In doubt they do."""
        solver = z3.Solver()
        solver.add(*self.axioms, *state.path)
        return solver.check() != z3.unsat

    def _compare(self, state: State, op: str, a: Value, b: Value, width: int) -> Truth:
        if isinstance(a, Pointer) and isinstance(b, Pointer) and a.region == b.region:
            # Regions do not wrap around the address space, so offsets compare as addresses do.
            for offset in (a.offset, b.offset):
                self.require(
                    state, bits.compare("lt", offset, 1 << 40, 64), "compares wild pointers"
                )
            return bits.compare(op, a.offset, b.offset, 64)
        if isinstance(a, (Pointer, MapReference)) or isinstance(b, (Pointer, MapReference)):
            # A valid pointer is not null.
            if op in ("eq", "ne") and (bits.same(a, 0) or bits.same(b, 0)):
                # Half of one may be.
                return op == "ne" if width == 64 else self.fresh_truth("half of a pointer")
            raise Unmodelled(f"comparison of {a} and {b} at {state.pc}")
        x = bits.low(word(state, a), width)
        y = bits.low(word(state, b), width)
        return bits.compare(op, x, y, width)

    def _call(self, state: State, i: Instruction) -> Iterator[State]:
        if i.src == PSEUDO_CALL:
            if i.callee is None:
                raise Unmodelled(f"a call without a callee at {state.pc}")
            depth = len(state.callers) + 1
            if depth > 7:
                raise Unmodelled(f"calls nested more than eight deep at {state.pc}")
            self._flow.add(i.callee)
            known = self.tries.call(state, i.callee)
            if known is not None:
                yield known
                return
            state.callers += (Frame(state.pc + 1, i.callee, tuple(state.registers[6:10])),)
            state.memory.pop(f"stack{depth}", None)
            state.registers[10] = Pointer(f"stack{depth}", 512)
            state.registers[6:10] = [UNWRITTEN] * 4
            state.registers[0] = UNWRITTEN
            state.pc = i.callee
            yield state
        elif i.src:
            raise Unmodelled(f"a call of kind {i.src} (kernel function) at {state.pc}")
        else:
            for after in self.helpers.call(state, i.imm):
                after.registers[1:6] = [Lost("a register that a call has spent")] * 5
                yield self._next(after)

    def _return(self, state: State) -> Iterator[State]:
        if not state.callers:
            self.finals.append(state)
            return
        frame = state.callers[-1]
        state.callers = state.callers[:-1]
        depth = len(state.callers)
        state.registers[1:6] = [Lost("a register that a call has spent")] * 5
        state.registers[6:10] = list(frame.saved)
        state.registers[10] = Pointer(f"stack{depth}", 512)
        state.memory.pop(f"stack{depth + 1}", None)
        state.pc = frame.return_to
        if not state.callers:
            state.returned_from = frame.callee
        yield state

    # Loads and stores

    def _access(self, state: State, i: Instruction) -> Iterator[State]:
        kind, mode, size = i.opcode & 7, i.opcode >> 5, SIZES[i.opcode >> 3 & 3]
        base = state.registers[i.src if kind == 1 else i.dst]
        if mode not in (3, 4, 6) or (mode == 4 and kind != 1) or (mode == 6 and kind != 3):
            raise Unmodelled(f"opcode {i.opcode:#04x} at {state.pc}")
        if not isinstance(base, Pointer):
            self.require(state, False, f"dereferences {base}")
            return
        moved = Pointer(base.region, bits.arithmetic("add", base.offset, _offset(i), 64))
        register = i.src if kind == 1 else i.dst
        for part, pointer in self.memory.at_known_offset(state, moved):
            # Known once, known from now on.
            if isinstance(pointer.offset, int):
                start = bits.arithmetic("sub", pointer.offset, _offset(i), 64)
                part.registers[register] = Pointer(base.region, start)
            if kind == 1:
                value = self.memory.load(part, pointer, size)
                if value is None:
                    continue
                if mode == 4:
                    value = bits.sign_extend(word(part, value), 8 * size, 64)
                part.registers[i.dst] = (
                    bits.widen(value, 64) if isinstance(value, (int, z3.BitVecRef)) else value
                )
            elif mode == 6:
                atomic(self.memory, part, pointer, size, i)
            else:
                yield from self._stores(part, i, pointer, size)
                continue
            yield self._next(part)

    def _stores(self, state: State, i: Instruction, pointer: Pointer, size: int) -> Iterator[State]:
        if i.opcode & 7 == 2:
            if self.memory.store(state, pointer, size, i.imm & bits.mask(64)):
                yield self._next(state)
            return
        # Only the stack holds pointers, whole.
        spilled = size == 8 and self.memory.regions[pointer.region].kind == "stack"
        for ready in self._decided(state, [] if spilled else [i.src]):
            if self.memory.store(ready, pointer, size, ready.registers[i.src]):
                yield self._next(ready)


def _offset(i: Instruction) -> int:
    return i.offset & bits.mask(64)
