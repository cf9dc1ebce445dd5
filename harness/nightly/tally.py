"""What many checks of right layers add up to. No torch here: workers send tallies, the parent adds them."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, field

from harness.finding import Finding, Verdict

RATIO, DEVIATIONS, ROUTE = "row_error_over_naive", "row_error_over_deviation", "rows_on_another_legal_route"


@dataclass(frozen=True, slots=True)
class Odd:
    """A check that did not end well. number: of the case within its seed.    text: names the layer in full."""

    number: int
    text: str
    verdict: Verdict
    diagnosis: str
    figures: dict[str, object]

    @property
    def again(self) -> str:
        return again(self.text)


def again(text: str) -> str:
    """The command that judges this layer again."""
    return f"python -m harness.nightly {shlex.quote(text)}"


@dataclass(frozen=True, order=True, slots=True)
class Closest:
    """The largest figure of any right row, and whose it was; the earlier case where two are equal."""

    figure: float = 0.0
    earlier: int = 0
    text: str = ""


@dataclass(slots=True)
class Tally:
    """counts: checks by (dtype, verdict).    rerouted: by dtype, cases with rows that were right on another legal route.

    ratio: by dtype, the largest row error in units of the worse naive run; deviations: in units of the deviation, of
    rows past the first limit. Both leave out cases with rerouted rows, whose errors say nothing about rounding.
    """

    counts: Counter[tuple[str, Verdict]] = field(default_factory=Counter)
    rerouted: Counter[str] = field(default_factory=Counter)
    ratio: dict[str, Closest] = field(default_factory=dict)
    deviations: dict[str, Closest] = field(default_factory=dict)
    odd: list[Odd] = field(default_factory=list)

    def add(self, number: int, text: str, dtype: str, finding: Finding) -> None:
        verdict, figures = finding.verdict, finding.figures
        self.counts[dtype, verdict] += 1
        self.rerouted[dtype] += ROUTE in figures
        if verdict is not Verdict.OK:
            self.odd.append(Odd(number, text, verdict, finding.diagnosis, figures))
        elif ROUTE not in figures:
            for name, largest in ((RATIO, self.ratio), (DEVIATIONS, self.deviations)):
                figure = figures.get(name)
                if isinstance(figure, float):
                    largest[dtype] = max(largest.get(dtype, Closest()), Closest(figure, -number, text))

    def merge(self, other: Tally) -> None:
        self.counts += other.counts
        self.rerouted += other.rerouted
        self.odd += other.odd
        for mine, theirs in ((self.ratio, other.ratio), (self.deviations, other.deviations)):
            for dtype, closest in theirs.items():
                mine[dtype] = max(mine.get(dtype, Closest()), closest)

    def of(self, verdict: Verdict, dtype: str | None = None) -> int:
        return sum(n for (each, found), n in self.counts.items() if found is verdict and dtype in (None, each))

    @property
    def cases(self) -> int:
        return self.counts.total()
