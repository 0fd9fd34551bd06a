"""What a run is given and never changes: the frame as it came, its metadata, constants."""

from __future__ import annotations

import re

import z3

# As `memory.py`, `machine.py` and `mutants.py` name them. What is read of maps, of the kernel's
# memory and of helpers is named otherwise.
_INPUT = re.compile(r"(frame|[A-Z_]+)\[\d+\]|skb\.[a-z_]+|length|mark|mutant")


def is_input(term: z3.ExprRef) -> bool:
    """Whether the term says something of inputs alone."""
    seen: set[int] = set()
    work = [term]
    while work:
        at = work.pop()
        if at.get_id() in seen:
            continue
        seen.add(at.get_id())
        if at.decl().kind() == z3.Z3_OP_UNINTERPRETED:
            if at.children() or not _INPUT.fullmatch(at.decl().name()):
                return False
        work += at.children()
    return True
