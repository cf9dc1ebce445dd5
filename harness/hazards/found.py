"""What the instrument says: hazards, each in one sentence, and what was tried and what was not."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Hazard:
    """name: the experiment that shows it.    sentence: one line with figures.    ranks: on which it was seen.

    family: of the fault, as in docs/faults.md ("B9"); None if none describes it.
    """

    name: str
    sentence: str
    ranks: tuple[int, ...]
    family: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}" + (f" [{self.family}]" if self.family else "")


@dataclass(frozen=True, slots=True)
class HazardReport:
    """broken: what was found.    tried: names of experiments.    skipped: experiment -> why.

    notes: what is no fault but may surprise, as that equal calls differ by rounding.
    """

    broken: tuple[Hazard, ...] = ()
    tried: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
