"""What a check says: one finding a case, with a verdict that decides the exit code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum


class Verdict(StrEnum):
    """The value is the word in tables and JSON."""

    OK = "ok"
    MISMATCH = "mismatch"
    KNOWN = "known"  # wrong exactly as a ledger entry with a reference says
    UNDECIDED = "undecided"  # more legal outputs than can be listed
    COULD_NOT_RUN = "could-not-run"  # lost coverage
    NOT_APPLICABLE = "not-applicable"  # the system has no such layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """stage: where it first shows: "logits", "topk_ids", "topk_weights", "routed", "shared", "sum", "reduction", "output";
    or "collectives", "call", "calls" (of many); or None.

    family: of the fault, as in docs/faults.md ("A1").    figures: what the verdict rests on.
    reference: where a known fault is described.    repro: the command that shows this finding again.
    """

    case: str
    model: str
    system: str
    verdict: Verdict
    stage: str | None = None
    family: str | None = None
    diagnosis: str = ""
    figures: dict[str, object] = field(default_factory=dict)
    reference: str | None = None
    repro: str = ""

    def as_dict(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # shallow: asdict copies every figure


def repro_command(case: object, system: str) -> str:
    """The command that shows a finding again."""
    return f"moe-harness check '{case}' --system {system}"


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0 all well, 1 a mismatch (beats 3), 3 something could not run or could not be decided."""
    found = set(verdicts)
    if Verdict.MISMATCH in found:
        return 1
    return 3 if found & {Verdict.COULD_NOT_RUN, Verdict.UNDECIDED} else 0
