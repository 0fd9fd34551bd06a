"""`python -m prover OBJECT`: proves, then shows that the proof can fail. See ../README.md."""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import mutants, sound
from .elf import Object, Unmodelled, load
from .jobs import at_once
from .layout import Layout, layouts
from .machine import Branch, Machine
from .mutants import Mutant, Mutants
from .solve import Answer, Program, Question, describe
from .sound import ESSENTIAL

FUNCTIONS = tuple(ESSENTIAL)
# Tried for a claim.
MOST_MUTANTS = 100


@dataclass(frozen=True)
class Subject:
    """An object file and what it holds."""

    content: bytes
    program: Object
    sizes: dict[str, Layout]

    @classmethod
    def of(cls, content: bytes) -> Subject:
        return cls(content, load(content), layouts(content))

    def execute(self, function: str, branch: Branch | None = None) -> Program:
        machine = Machine(self.program, self.sizes, branch)
        return Program.execute(function, self.program, self.sizes, machine)


class Report:
    """Counts, and lines on standard output."""

    def __init__(self) -> None:
        self.proven = self.failed = self.killed = 0

    def line(self, text: str) -> None:
        print(f"prove: {text}", flush=True)

    def fail(self, text: str) -> None:
        self.failed += 1
        print(f"prove: FAILED: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Finding:
    """The answer to one question: `about` tells of the input that the solver found, if one."""

    answer: Answer
    # Of the processor's time.
    seconds: float
    about: str | None = None
    mutant: Mutant | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to be shown, of which programs, and how many questions at once."""

    functions: tuple[str, ...]
    # Part of the claims' names.
    only: str
    workers: int

    def among(self, questions: dict[str, Question]) -> dict[str, Question]:
        return {name: question for name, question in questions.items() if self.only in name}


def prove(report: Report, function: str, subject: Subject, wanted: Wanted) -> None:
    """All claims of one program, and that none is true of nothing."""
    began = time.monotonic()
    proof = subject.execute(function)
    machine = proof.machine
    paths = sum(end.paths for end in proof.ends)
    report.line(
        f"{function}: {len(machine.executed)} instructions, {len(machine.branches)} undecided "
        f"jumps, some 10^{len(str(paths)) - 1} paths in {machine.merges} merges, "
        f"{time.monotonic() - began:.0f} s"
    )

    def ask(question: Question) -> Finding:
        began = time.process_time()
        answer, model = proof.ask(question)
        about = None if model is None else describe(model)
        return Finding(answer, time.process_time() - began, about)

    violations, possible = wanted.among(proof.violations()), wanted.among(proof.possible())
    asked = [partial(ask, question) for question in (*violations.values(), *possible.values())]
    findings = at_once(wanted.workers, asked)
    for name, found in zip(violations, findings, strict=False):
        if found.answer is Answer.NO:
            report.proven += 1
            report.line(f"  proven: {name} ({found.seconds:.1f} s)")
        else:
            report.fail(f"{function}: {name}: {found.answer.value} ({found.seconds:.1f} s)")
            if found.about is not None:
                report.line(f"  counterexample: {found.about}")
    for name, found in zip(possible, findings, strict=True):
        if found.answer is not Answer.YES:
            report.fail(
                f"{function}: not so ({found.answer.value}), and claims of it say nothing: {name}"
            )
    report.line(f"  possible: {'; '.join(possible)}")


def refute(report: Report, function: str, subject: Subject, wanted: Wanted) -> None:
    """For each essential claim a mutant that violates it, and a frame that shows it."""
    began = time.monotonic()
    forced = Mutants()
    mutated = subject.execute(function, forced.branch)
    violations = mutated.violations()
    report.line(
        f"{function}: {2 * len(mutated.machine.branches)} mutants run at once, "
        f"{time.monotonic() - began:.0f} s"
    )

    def find(name: str) -> Finding:
        began = time.process_time()
        known = sound.known(function, name, mutated.machine.memory.slots.policy)
        nearest = forced.nearest(ESSENTIAL[function][name])[:MOST_MUTANTS]
        found = Finding(Answer.NO, 0)
        while (mutant := mutated.violator(violations[name], known, nearest)) is not None:
            # Once more, with the jump changed in the object file itself.
            proof = Subject.of(mutants.patch(subject.content, subject.program, mutant))
            again = proof.execute(function)
            answer, model = again.ask(again.violations()[name], known)
            about = mutant.describe(subject.program)
            about += (
                f", but in the file: {answer.value}"
                if model is None
                else f": {describe(model, known)}"
            )
            found = Finding(answer, 0, about, mutant)
            if answer is Answer.YES:
                break
            nearest = nearest[nearest.index(mutant) + 1 :]
        return replace(found, seconds=time.process_time() - began)

    names = [name for name in ESSENTIAL[function] if wanted.only in name]
    findings = at_once(wanted.workers, [partial(find, name) for name in names])
    for name, found in zip(names, findings, strict=True):
        if found.mutant is None:
            report.fail(f"{function}: no mutant violates: {name} ({found.seconds:.1f} s)")
        elif found.answer is not Answer.YES:
            report.fail(f"{function}: {name}: {found.about}")
        else:
            report.killed += 1
            report.line(
                f"  violated as it should be: {name} ({found.seconds:.1f} s): {found.about}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove", description=__doc__)
    parser.add_argument("object", type=Path, help="the kernel programs, as built")
    parser.add_argument("--binary", type=Path, help="a program that should hold the object")
    parser.add_argument("--only-mutants", action="store_true", help="the mutants alone")
    parser.add_argument("--no-mutants", action="store_true", help="the proof alone")
    parser.add_argument("--program", choices=FUNCTIONS, help="one of the programs alone")
    parser.add_argument("--only", default="", help="the claims whose name has this in it")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="questions at once"
    )
    arguments = parser.parse_args()
    functions = FUNCTIONS if arguments.program is None else (arguments.program,)
    wanted = Wanted(functions, arguments.only, arguments.jobs)
    content = arguments.object.read_bytes()
    report = Report()
    began = time.monotonic()
    report.line(f"{arguments.object}, {len(content)} bytes")
    report.line(f"SHA-256 {hashlib.sha256(content).hexdigest()}")
    if arguments.binary and arguments.binary.exists():
        held = "is" if content in arguments.binary.read_bytes() else "is NOT (run make build)"
        report.line(f"this object {held} the one in {arguments.binary}")
    try:
        subject = Subject.of(content)
        for function in () if arguments.only_mutants else functions:
            prove(report, function, subject, wanted)
        for function in () if arguments.no_mutants else functions:
            refute(report, function, subject, wanted)
    except Unmodelled as unknown:
        report.fail(f"the prover does not know {unknown}; teach it (tests/prove/prover)")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    report.line(
        f"{report.proven} claims proven, {report.killed} refuted in mutants, "
        f"{report.failed} failed; {time.monotonic() - began:.0f} s, "
        f"{sum(one.ru_utime for one in used):.0f} s of CPU, "
        f"{max(one.ru_maxrss for one in used) // 1024} MB"
    )
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
