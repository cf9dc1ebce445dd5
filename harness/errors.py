"""Everything that stops a run, with the exit code each one carries.

    HarnessError (3)
    |-- UsageError (2)            what was asked for cannot be done; says what came, what fits, what to type
    |-- CouldNotRun (3)           a system could not be imported or built: lost coverage, never a pass
    `-- CollectiveMismatch        ranks disagree about a collective; becomes a finding in check.py

Errors carry fields; the sentence is built from them.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Mapping


class HarnessError(Exception):
    """Base of all errors of the harness; by itself a defect of ours, from which nothing can be concluded."""

    exit_code = 3


class UsageError(HarnessError):
    """A request that cannot be met: the value that came, what was expected and what to type instead."""

    exit_code = 2


class CouldNotRun(HarnessError):
    """A system raised while it was imported or built, so nothing was tested."""

    exit_code = 3


class CollectiveMismatch(HarnessError):
    """Ranks of one group called different collectives, or some called none.

    index: number of the collective, counted from 0 on each rank.    group: its name, "tp".
    calls: what each rank of the group did, as text: "all_reduce(fp32[7, 64])", "returned", "raised ValueError: ...".
    """

    def __init__(self, index: int, group: str, calls: Mapping[int, str]) -> None:
        self.index, self.group, self.calls = index, group, dict(calls)
        super().__init__(index, group, calls)

    def __str__(self) -> str:
        by_call: dict[str, list[int]] = {}
        for rank, call in self.calls.items():
            by_call.setdefault(call, []).append(rank)
        rarest_first = sorted(by_call.items(), key=lambda item: len(item[1]))
        told = ", ".join(f"{ranks_text(ranks)}: {call}" for call, ranks in rarest_first)
        return f"collective {self.index} of group {self.group} differs: {told}"


def ranks_text(ranks: Iterable[int]) -> str:
    """'rank 2' or 'ranks 0, 1, 3'."""
    ranks = list(ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def raised_text(error: BaseException) -> str:
    """'ValueError: text (file.py:12)' with the innermost line that is not torch's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}{where}"


def unknown(what: str, value: str, known: Iterable[str], listing: str) -> UsageError:
    """A UsageError for a name nobody knows, with the nearest known names and the command that lists them."""
    known = list(known)
    near = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}. " if near else ""
    return UsageError(f"unknown {what} {value!r}: {hint}All of them: {listing}")
