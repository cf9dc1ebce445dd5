"""Many checks: batches go to supervised workers, findings come back in the order of the request, none is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.case import Case
from harness.errors import HarnessError
from harness.finding import Finding, Verdict, repro_command
from harness.pool import Batch as Work
from harness.pool import Outcome, run_all
from harness.selection import Batch


@dataclass(frozen=True, slots=True)
class Report:
    """findings: one for each requested case, in the order of the request.    seconds: wall time."""

    findings: tuple[Finding, ...]
    seconds: float


def run(batches: Sequence[Batch], *, jobs: int, limit_s: float, on_finding: Callable[[Finding], None]) -> Report:
    """Check every case of every batch. Raises HarnessError if a case came back without a finding: a defect of ours."""
    started = time.perf_counter()
    cases = {(batch.system, str(case)): case for batch in batches for case in batch.cases}
    found: dict[tuple[str, str], Finding] = {}

    def take(outcome: Outcome) -> None:
        key = (outcome.system, outcome.case)
        found[key] = _finding(outcome, cases[key])
        on_finding(found[key])

    work = [
        Work(batch.system, tuple(map(str, batch.cases)), shares=batch.cases[0].model)
        for batch in batches
        if batch.cases
    ]
    run_all(work, jobs, limit_s, take)
    if found.keys() != cases.keys():
        missing = [f"{case} on {system}" for system, case in cases.keys() - found.keys()]
        raise HarnessError(f"{len(missing)} of {len(cases)} cases came back without a finding, first: {missing[0]}")
    return Report(tuple(found[key] for key in cases), time.perf_counter() - started)


def _finding(outcome: Outcome, case: Case) -> Finding:
    """A worker that died or hung took the layer's call with it: that is what the layer did, so it is a mismatch."""
    if outcome.kind == "finding":
        finding: Finding = outcome.payload
        return finding
    verdict = Verdict.MISMATCH if outcome.kind in ("died", "hung") else Verdict.COULD_NOT_RUN
    told = str(outcome.payload)
    figures: dict[str, object] = {}
    if outcome.kind == "raised":
        figures = {"traceback": told}
        told = f"a defect of the harness, not of the layer: {told.strip().splitlines()[-1]}"
    return Finding(
        case=str(case), model=case.model, system=outcome.system, verdict=verdict, stage="call", diagnosis=told,
        figures=figures, repro=repro_command(case, outcome.system),
    )  # fmt: skip
