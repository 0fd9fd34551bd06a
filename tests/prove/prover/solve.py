"""Puts claims to the solver."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import z3

from .claims import Claim, Run
from .elf import Object
from .layout import Layout
from .machine import Machine
from .mutants import NUMBER, Mutant, number
from .slots import judged
from .sound import Known
from .state import State
from .tries import STAGE

# The solver's steps for one question, some minutes' worth, however busy the machine is. What is
# not decided by then is not proven.
MOST_STEPS = 3_000_000_000
# For one mutant: there are others.
STEPS_FOR_A_MUTANT = 10_000_000


class Answer(enum.Enum):
    NO = "unsat"
    YES = "sat"
    UNDECIDED = "unknown"


# Conditions of which one is to be fulfilled.
Question = list[z3.BoolRef]


@dataclass
class Program:
    """A program that has been run, with all that is to be shown of it."""

    machine: Machine
    ends: list[State]
    runs: list[Run]

    @classmethod
    def execute(
        cls, function: str, program: Object, layouts: dict[str, Layout], machine: Machine
    ) -> Program:
        ends, slots = machine.run(function), machine.memory.slots
        return cls(machine, ends, [Run(function, program, layouts, slots, end) for end in ends])

    def violations(self) -> dict[str, Question]:
        """For each claim by name: that some run violates it. First, that memory is left."""
        found = {"every access is within its memory": [self._unsafe()]}
        for claim in (claim for run in self.runs for claim in run.claims()):
            found.setdefault(claim.name, []).append(_violated(claim))
        return found

    def _unsafe(self) -> z3.BoolRef:
        wrongs = []
        for obligation in self.machine.obligations:
            wrong = [] if obligation.wrong is True else [obligation.wrong]
            wrongs.append(z3.And(*obligation.path, *wrong))
        # However policies change meanwhile.
        torn = [z3.Not(judged(n)) for n in range(len(self.machine.memory.slots.generations))]
        return z3.And(z3.Or(*wrongs), *torn)

    def possible(self) -> dict[str, Question]:
        """What must be possible, at one end or another."""
        found: dict[str, Question] = {}
        for run in self.runs:
            for name, part in run.possible().items():
                found.setdefault(name, []).append(part)
        return found

    def ask(
        self, question: Question, known: Known | None = None
    ) -> tuple[Answer, z3.ModelRef | None]:
        """Whether some input fulfils one of the conditions, and one that does. Inputs may be given.

        Each stage of a run is asked for itself: of the others only what it took from them is left.
        So is each condition: what it demands of the frame decides most of the run before the solver
        searches.
        """
        return _first((part, MOST_STEPS) for part in self._parts(question, known or []))

    def violator(
        self, question: Question, known: Known, mutants: Iterable[Mutant]
    ) -> Mutant | None:
        """The first of the mutants, which were run at once, of which some input fulfils one of the
        conditions."""
        parts = list(self._parts(question, known))
        for mutant in mutants:
            forced = (z3.substitute(part, (NUMBER, number(mutant))) for part in parts)
            found, _ = _first((z3.simplify(part), STEPS_FOR_A_MUTANT) for part in forced)
            if found is Answer.YES:
                return mutant
        return None

    def _parts(self, question: Question, known: Known) -> Iterable[z3.BoolRef]:
        for stage in range(self.machine.tries.stages):
            this = (STAGE, z3.BitVecVal(stage, STAGE.size()))
            for condition in question:
                asked = z3.And(*self.machine.axioms, condition)
                yield z3.simplify(z3.substitute(asked, this, *known))


def _first(asked: Iterable[tuple[z3.BoolRef, int]]) -> tuple[Answer, z3.ModelRef | None]:
    """The first of the conditions, each with its most steps, that some input fulfils."""
    answer = Answer.NO
    for condition, steps in asked:
        solver = _bit_level_solver(steps)
        solver.add(condition)
        found = Answer(str(solver.check()))
        if found is Answer.YES:
            return found, solver.model()
        if found is Answer.UNDECIDED:
            answer = found
    return answer, None


def _bit_level_solver(most: int) -> z3.Solver:
    """All words are of fixed size: as single bits they are a matter of propositional logic."""
    steps = ("simplify", "propagate-values", "solve-eqs", "elim-uncnstr", "simplify",
             "ackermannize_bv", "bit-blast", "sat")  # fmt: skip
    solver = z3.Then(*steps).solver()
    solver.set("rlimit", most)
    return solver


def _violated(claim: Claim) -> z3.BoolRef:
    return z3.And(claim.premise, z3.Not(claim.conclusion))


def describe(model: z3.ModelRef, known: Known | None = None) -> str:
    """A counterexample: the frame's first bytes and its metadata."""
    values = {declaration.name(): model[declaration] for declaration in model.decls()}
    values |= {str(name): value for name, value in known or []}
    frame, length = "", values.get("length")
    for offset in range(86 if length is None else min(86, length.as_long())):
        value = values.get(f"frame[{offset}]")
        frame += "--" if value is None else f"{value.as_long():02x}"
        frame += " " if offset in (5, 11, 13, 33, 53) else ""
    facts = [f"{name}={values[name]}" for name in ("length", "mark") if name in values]
    facts += [f"{name}={value}" for name, value in values.items() if name.startswith("skb.")]
    return f"frame {frame}; {', '.join(facts)}"
