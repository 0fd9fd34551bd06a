"""`python -m prover OBJECT`: proves, then shows that the proof can fail. See ../README.md."""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import time
from pathlib import Path

from . import mutants
from .elf import Object, Unmodelled, load
from .layout import Layout, layouts
from .machine import Machine
from .mutants import Mutant
from .solve import Answer, Program, describe

FUNCTIONS = ("guest_egress", "guest_ingress")
# Claims that some mutant must violate, or the proof is worth nothing. The others hold by the
# program's structure or by more than one jump.
ESSENTIAL = {
    "guest_egress": (
        "every access is within its memory", "no VLAN tag", "source MAC is the guest's",
        "destination MAC is the gateway's", "EtherType IPv4 or IPv6",
        "IPv4: source address is the guest's", "IPv4: a live rule names the peer",
        "IPv4: no fragment", "IPv4: version and header length",
        "IPv4: lengths agree with the frame's", "IPv6: source address is the guest's",
        "IPv6: a live rule names the peer", "IPv6: lengths agree with the frame's",
    ),
    "guest_ingress": (
        "every access is within its memory", "no VLAN tag", "destination MAC is the guest's",
        "EtherType IPv4 or IPv6", "IPv4: destination address is the guest's",
        "IPv4: a live rule names the peer", "IPv4: no fragment",
        "IPv6: destination address is the guest's", "IPv6: a live rule names the peer",
    ),
}  # fmt: skip
# Of these the mutant is made in the object file, too, and proven wrong from there.
PATCHED = (
    "source MAC is the guest's",
    "IPv4: source address is the guest's",
    "IPv4: destination address is the guest's",
    "IPv4: a live rule names the peer",
)


class Report:
    """Counts, and lines on standard output."""

    def __init__(self) -> None:
        self.proven = self.failed = self.killed = 0

    def line(self, text: str) -> None:
        print(f"prove: {text}", flush=True)

    def fail(self, text: str) -> None:
        self.failed += 1
        print(f"prove: FAILED: {text}", file=sys.stderr, flush=True)


def prove(report: Report, function: str, program: Object, sizes: dict[str, Layout]) -> None:
    """All claims of one program, and that none is true of nothing."""
    began = time.monotonic()
    proof = Program.execute(function, program, sizes, Machine(program))
    machine = proof.machine
    paths = sum(end.paths for end in proof.ends)
    report.line(
        f"{function}: {len(machine.executed)} instructions, {len(machine.branches)} undecided "
        f"jumps, {paths:.1e} paths in {machine.merges} merges, "
        f"{time.monotonic() - began:.0f} s"
    )
    for name, violation in proof.violations().items():
        began = time.monotonic()
        answer, model = proof.ask(violation)
        took = f"{time.monotonic() - began:.1f} s"
        if answer is Answer.NO:
            report.proven += 1
            report.line(f"  proven: {name} ({took})")
        else:
            report.fail(f"{function}: {name}: {answer.value} ({took})")
            if model is not None:
                report.line(f"  counterexample: {describe(model)}")
    possible = proof.possible()
    for name, wanted in possible.items():
        answer, _ = proof.ask(wanted)
        if answer is not Answer.YES:
            report.fail(
                f"{function}: not so ({answer.value}), and claims of it say nothing: {name}"
            )
    report.line(f"  possible: {'; '.join(possible)}")


def refute(
    report: Report, function: str, program: Object, content: bytes, sizes: dict[str, Layout]
) -> None:
    """For each essential claim a mutant that violates it."""
    began = time.monotonic()
    machine = Machine(program, mutants.branch)
    mutated = Program.execute(function, program, sizes, machine)
    violations = mutated.violations()
    report.line(
        f"{function}: {2 * len(machine.branches)} mutants run at once, "
        f"{time.monotonic() - began:.0f} s"
    )
    for name in ESSENTIAL[function]:
        began = time.monotonic()
        answer, model = mutated.ask(violations[name])
        if model is None:
            report.fail(f"{function}: no mutant violates: {name} ({answer.value})")
            continue
        value = model.eval(mutants.NUMBER, model_completion=True).as_long()
        mutant = mutants.of_number(value)
        if mutant.pc not in machine.branches:
            report.fail(f"{function}: violated without a mutant: {name}")
            continue
        how = mutant.describe(program)
        if name in PATCHED:
            how += _patched(content, program, function, mutant, name, sizes)
            if "NOT" in how:
                report.fail(f"{function}: {name}: {how}")
                continue
        report.killed += 1
        took = f"{time.monotonic() - began:.1f} s"
        report.line(f"  violated as it should be: {name}: {how} ({took})")


def _patched(
    content: bytes,
    program: Object,
    function: str,
    mutant: Mutant,
    name: str,
    sizes: dict[str, Layout],
) -> str:
    wrong = load(mutants.patch(content, program, mutant))
    proof = Program.execute(function, wrong, sizes, Machine(wrong))
    answer, _ = proof.ask(proof.violations()[name])
    return ", in the file too" if answer is Answer.YES else ", but NOT in the file"


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove", description=__doc__)
    parser.add_argument("object", type=Path, help="the kernel programs, as built")
    parser.add_argument("--binary", type=Path, help="a program that should hold the object")
    parser.add_argument("--only-mutants", action="store_true", help="the mutants alone")
    parser.add_argument("--no-mutants", action="store_true", help="the proof alone")
    arguments = parser.parse_args()
    content = arguments.object.read_bytes()
    report = Report()
    began = time.monotonic()
    report.line(f"{arguments.object}, {len(content)} bytes")
    report.line(f"SHA-256 {hashlib.sha256(content).hexdigest()}")
    if arguments.binary and arguments.binary.exists():
        held = "is" if content in arguments.binary.read_bytes() else "is NOT (run make build)"
        report.line(f"this object {held} the one in {arguments.binary}")
    try:
        program, sizes = load(content), layouts(content)
        for function in () if arguments.only_mutants else FUNCTIONS:
            prove(report, function, program, sizes)
        for function in () if arguments.no_mutants else FUNCTIONS:
            refute(report, function, program, content, sizes)
    except Unmodelled as unknown:
        report.fail(f"the prover does not know {unknown}; teach it (tests/prove/prover)")
    used = resource.getrusage(resource.RUSAGE_SELF)
    report.line(
        f"{report.proven} claims proven, {report.killed} refuted in mutants, "
        f"{report.failed} failed; {time.monotonic() - began:.0f} s, "
        f"{used.ru_utime:.0f} s of CPU, {used.ru_maxrss // 1024} MB"
    )
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
