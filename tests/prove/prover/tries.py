"""Functions that a program calls again when a policy has changed meanwhile.

Such a function is given the context alone, so whatever it does in a later try it may do in the
first: what it reads is the frame, constants, and what others may have changed. So its first call is
executed from a state that allows for all that earlier tries, and whatever else came before, may
have done: nothing is known of how the program came there (`STAGE` keeps such parts of a run apart),
of private maps, or of how much of the frame is linear. What the first call's caller knows of the
inputs alone (mark, frame, constants) is kept, as inputs never change; that each further caller
knows the same is asked of the solver. Further calls end as that one did; a prophecy tells which
call it is. What follows the calls is executed for each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import z3

from .cells import without_packet_pointers
from .elf import PSEUDO_CALL, Object, Unmodelled
from .flow import Flow
from .inputs import is_input
from .state import UNWRITTEN, Pointer, SlotReads, State, same_value

if TYPE_CHECKING:
    from .machine import Machine

# Which part of the run this is: 0 until the first call of such a function, then its number.
STAGE = z3.BitVec("stage", 8)


class Tries:
    """The calls of one run of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.stages = 1
        self._kept: dict[int, State] = {}
        # By the function: what its body was executed under, of the inputs.
        self._assumed: dict[int, list[z3.BoolRef]] = {}
        self._several: set[int] = set()

    def start(self, entry: int) -> None:
        """Finds what the function at `entry` itself calls in several places."""
        self._several = _called_often(self.machine.program, entry)

    def call(self, state: State, callee: int) -> State | None:
        """The state after the call, if it ends as an earlier one did.

        If not, the state is made ready for the first call.
        """
        context = same_value(state.registers[1], Pointer("context", 0))
        if state.callers or callee not in self._several or not context:
            return None
        kept = self._kept.pop(callee, None)
        if kept is not None and _is_as_before(state, kept, self._unread(state.pc + 1)):
            self._ask(state, callee)
            kept.pc, kept.returned_from = state.pc + 1, callee
            return kept
        if not state.frame_changed:
            self._forget(state, callee)
        return None

    def _ask(self, state: State, callee: int) -> None:
        """Asks whether all that the function was executed under holds at this call, too."""
        for assumed in self._assumed[callee]:
            solver = z3.Solver()
            solver.add(*self.machine.axioms, *state.path, z3.Not(assumed))
            if solver.check() != z3.unsat:
                raise Unmodelled(f"a call that knows less than an earlier one, at {state.pc}")

    def _unread(self, pc: int) -> set[int]:
        """The registers of which what is in them now is no longer needed."""
        flow = Flow(self.machine.program)
        return {register for register in range(6, 10) if not flow.is_read(pc, register)}

    def _forget(self, state: State, callee: int) -> None:
        """Leaves only what no earlier call could have changed."""
        self._assumed[callee] = [known for known in state.path if is_input(known)]
        state.path = (self.stages == STAGE, *self._assumed[callee])
        self.stages += 1
        state.replace_values(without_packet_pointers)
        state.registers[2:6] = [UNWRITTEN] * 4
        state.linear = self.machine.fresh("linear", 32)
        self.machine.axioms.append(z3.ULE(state.linear, state.length))
        state.slot_reads = SlotReads()
        for region in list(state.memory):
            if self.machine.memory.regions[region].kind == "private":
                del state.memory[region]

    def returned(self, state: State) -> State:
        """The state after a call that has returned, unless another call is the one that counts."""
        callee, state.returned_from = state.returned_from, None
        if callee not in self._several:
            return state
        again = self.machine.fresh_truth("tried again")
        self._kept[callee] = state.fork(again)
        return state.fork(z3.Not(again))


def _called_often(program: Object, entry: int) -> set[int]:
    seen: set[int] = set()
    flow = Flow(program)
    work = [entry]
    calls: list[int] = []
    while work:
        pc = work.pop()
        if pc in seen:
            continue
        seen.add(pc)
        instruction = program.code[pc]
        if instruction is not None and instruction.callee is not None:
            assert instruction.src == PSEUDO_CALL
            calls.append(instruction.callee)
        work += flow.successors(pc)
    return {callee for callee in calls if calls.count(callee) > 1}


def _is_as_before(state: State, kept: State, unread: set[int]) -> bool:
    """Whether the caller has done nothing since, but for asking what the call gave."""
    if state.frame_changed or kept.frame_changed or len(state.log) != len(kept.log):
        return False
    stack, old = state.memory.get("stack0", {}), kept.memory.get("stack0", {})
    values = [(state.mark, kept.mark), (state.length, kept.length)]
    values += [(state.registers[n], kept.registers[n]) for n in range(6, 10) if n not in unread]
    values += [(stack[place].value, old[place].value) for place in stack if place in old]
    return (
        stack.keys() == old.keys()
        and all(same_value(a, b) for a, b in values)
        and all(stack[place].index == old[place].index for place in stack)
        and all(stack[place].size == old[place].size for place in stack)
        and all(a is b for a, b in zip(state.log, kept.log, strict=True))
    )
