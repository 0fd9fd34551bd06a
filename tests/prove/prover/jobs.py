"""Several questions at once: each in a process of its own, which inherits what was executed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")
# What the processes of the present call inherit: functions of the solver's terms, which cannot be
# sent to a process.
_waiting: list[Callable[[], object]] = []


def at_once(workers: int, jobs: list[Callable[[], Result]]) -> Iterator[Result]:
    """The results of the jobs, in their order. A result is sent, so it holds no solver's terms."""
    _waiting[:] = jobs
    # A process for each: what the solver used for one question is given back.
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        yield from pool.imap(_do, range(len(jobs)))


def _do(index: int) -> object:
    return _waiting[index]()
