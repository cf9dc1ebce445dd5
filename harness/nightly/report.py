"""What a nightly run says: a table by dtype, the closest calls, every case that did not end well; or the same as JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.case import DTYPES
from harness.finding import Verdict
from harness.nightly.numbers import Numbers
from harness.nightly.tally import Closest, Odd, Tally, again
from harness.pool import Outcome

UNDECIDED_SHARE = 0.01  # of the cases of a dtype; more, and the run has judged too little
_SHOWN = 20


@dataclass(slots=True)
class Report:
    """lost: blocks of cases whose worker died, hung or refused, as (numbers, what it said)."""

    seed: int
    models: int
    workers: int
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    lost: list[tuple[Numbers, str]] = field(default_factory=list)

    def take(self, outcome: Outcome) -> list[Odd]:
        """Count one block; returns its cases that did not end well."""
        numbers = Numbers.parse(outcome.case)
        if outcome.kind != "finding":
            self.lost.append((numbers, f"{outcome.kind}: {str(outcome.payload).strip().splitlines()[-1]}"))
            return []
        found: Tally = outcome.payload
        self.tally.merge(found)
        return found.odd

    @property
    def exit_code(self) -> int:
        if self.tally.of(Verdict.MISMATCH):
            return 1
        untested = self.lost or self.tally.of(Verdict.COULD_NOT_RUN) or self.tally.of(Verdict.NOT_APPLICABLE)
        return 3 if untested or self.too_many_undecided else 0

    @property
    def too_many_undecided(self) -> list[str]:
        """Dtypes of which too large a share has more legal outputs than can be listed."""
        return [d for d in DTYPES if self.tally.of(Verdict.UNDECIDED, d) > UNDECIDED_SHARE * self.cases_of(d)]

    def cases_of(self, dtype: str) -> int:
        return sum(n for (each, _), n in self.tally.counts.items() if each == dtype)

    # -- text

    def text(self) -> str:
        cases = self.tally.cases
        lines = [
            f"{cases:,} right layers of {self.models} models in all legal ways, seed {self.seed}: {self.seconds:.1f} s on "
            f"{self.workers} {'worker' if self.workers == 1 else 'workers'}, {cases / max(self.seconds, 1e-9):.0f} a second",
            "",
            f"{'':6}{'cases':>10}{'accused':>10}{'undecided':>11}{'another route':>15}{'most naive errors':>19}"
            f"{'most deviations':>17}",
        ]
        lines += [self._row(dtype) for dtype in DTYPES if self.cases_of(dtype)]
        for name, closest in (("naive errors", self.tally.ratio), ("deviations", self.tally.deviations)):
            most = max(closest.values(), default=Closest())
            if most.text:
                lines.append(f"closest call, {most.figure:.2f} {name}: {again(most.text)}")
        lines += [f"not run: cases {n.first} to {n.stop - 1} ({told})" for n, told in self.lost]
        lines += [f"undecided: more than {UNDECIDED_SHARE:.0%} in {dtype}" for dtype in self.too_many_undecided]
        odd = sorted(self.tally.odd, key=lambda each: each.number)
        for each in odd[:_SHOWN]:
            lines += ["", f"{each.verdict.value}: case {each.number}: {each.diagnosis}", f"  again: {each.again}"]
        if len(odd) > _SHOWN:
            lines += ["", f"and {len(odd) - _SHOWN} more; --json has them all"]
        return "\n".join(lines)

    def _row(self, dtype: str) -> str:
        tally, none = self.tally, Closest()
        ratio, deviations = tally.ratio.get(dtype, none), tally.deviations.get(dtype, none)
        return (
            f"{dtype:6}{self.cases_of(dtype):>10,}{tally.of(Verdict.MISMATCH, dtype):>10}"
            f"{tally.of(Verdict.UNDECIDED, dtype):>11}{tally.rerouted[dtype]:>15}{ratio.figure:>19.2f}"
            f"{f'{deviations.figure:.2f}' if deviations.text else '-':>17}"
        )

    # -- JSON

    def summary(self) -> str:
        """One line: everything in numbers."""
        told = {
            "cases": self.tally.cases, "seed": self.seed, "models": self.models, "workers": self.workers,
            "seconds": round(self.seconds, 3), "exit_code": self.exit_code,
            "accused": self.tally.of(Verdict.MISMATCH), "undecided": self.tally.of(Verdict.UNDECIDED),
            "could_not_run": self.tally.of(Verdict.COULD_NOT_RUN) + sum(n.stop - n.first for n, _ in self.lost),
            "lost": [{"first": n.first, "stop": n.stop, "told": told} for n, told in self.lost],
            "dtypes": {dtype: self._figures(dtype) for dtype in DTYPES if self.cases_of(dtype)},
        }  # fmt: skip
        return json.dumps({"summary": told})

    def _figures(self, dtype: str) -> dict[str, object]:
        def told(closest: Closest | None) -> dict[str, object] | None:
            if closest is None:
                return None
            return {"figure": closest.figure, "number": -closest.earlier, "layer": closest.text}

        return {
            "cases": self.cases_of(dtype),
            "accused": self.tally.of(Verdict.MISMATCH, dtype),
            "undecided": self.tally.of(Verdict.UNDECIDED, dtype),
            "another_route": self.tally.rerouted[dtype],
            "most_naive_errors": told(self.tally.ratio.get(dtype)),
            "most_deviations": told(self.tally.deviations.get(dtype)),
        }


def line(odd: Odd) -> str:
    """One case that did not end well. NaN and infinity become text, since JSON has no such numbers."""
    figures = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in odd.figures.items()}
    told = {"number": odd.number, "layer": odd.text, "verdict": odd.verdict, "diagnosis": odd.diagnosis}
    return json.dumps(told | {"figures": figures, "again": odd.again}, allow_nan=False)


@contextlib.contextmanager
def bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """Of a terminal's stderr, silent elsewhere; yields what is called with (cases done, accused so far)."""
    if not sys.stderr.isatty():
        yield lambda done, accused: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting workers", total=total)

        def advance(done: int, accused: int) -> None:
            progress.update(task, advance=done, description=f"[red]{accused} accused[/]" if accused else "none accused")

        yield advance
