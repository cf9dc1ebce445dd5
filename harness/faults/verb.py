"""`moe-harness faults`: every fault of the bank planted in many cases, and what became of it.

A placement is one fault in one case. It is found if `check` objects; named if the diagnosis gives its family, or one that
computes the same; unknown if the diagnosis says that it does not know, misnamed if it gives another family. One that is not
found is equivalent if it changes nothing (equivalence.py), else missed. A layer that stops with an error is named if
the sentence has the words that the fault announces.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness import models as pages
from harness.case import Case, Grid, parse
from harness.check import check, judge
from harness.errors import CouldNotRun, HarnessError, UsageError
from harness.execution import run_system
from harness.faults import bars
from harness.faults.bank import by_name, chosen, placements
from harness.faults.equivalence import equivalent
from harness.faults.fault import Fault, FaultyRunner
from harness.finding import Finding, Verdict
from harness.outputs import whole_output
from harness.pool import Batch, Outcome, run_all
from harness.probe import labelled_case, probe
from harness.problem import problem
from harness.report.progress import Progress

FOUND_AT_LEAST = 0.99
NAMED_AT_LEAST = 0.95
OUTCOMES = ("named", "unknown", "misnamed", "equivalent", "missed")
_LIMIT_S = 60.0
_LINES = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """What became of a fault in one case. outcome: one of OUTCOMES.    family, diagnosis: what the check said.

    reason: of an equivalent one.    bars: which tolerances of others pass, empty where the layer gave no output.
    as_told: in the fault's own case, whether the diagnosis has its words.
    """

    fault: str
    case: str
    outcome: str
    family: str | None
    diagnosis: str
    reason: str = ""
    bars: Mapping[str, bool] = field(default_factory=dict)
    as_told: bool = True

    @property
    def found(self) -> bool:
        return self.outcome in ("named", "unknown", "misnamed")


def faults(
    names: Sequence[str], *, models: Sequence[str] | None, grids: Sequence[Grid] | None, jobs: int, as_json: bool
) -> int:
    """Plant the named faults, or all; print what became of them. Returns the exit code. UsageError if there are none."""
    started = time.perf_counter()
    bank = chosen(names)
    batches = _batches(bank, models or pages.names(), grids)
    placed: dict[str, list[Placed]] = {fault.name: [] for fault in bank}
    with Progress(sum(len(batch.cases) for batch in batches)) as progress:

        def take(outcome: Outcome) -> None:
            result = _placed(outcome)
            placed[result.fault].append(result)
            progress.advance(_as_finding(result))

        run_all(batches, jobs, _LIMIT_S, take)
    summary = summary_of([each for results in placed.values() for each in results], time.perf_counter() - started)
    if as_json:
        for fault in bank:
            print(json.dumps(line_of(fault, placed[fault.name])))
        print(json.dumps({"summary": summary}))
    else:
        _show(bank, placed, summary, Progress.console_for(sys.stdout))
    return 0 if summary["passed"] else 1


def _batches(bank: Sequence[Fault], models: Sequence[str], grids: Sequence[Grid] | None) -> list[Batch]:
    """By model, whose cases share what the oracle computed; the largest first. UsageError if nothing is left."""
    texts: dict[str, list[str]] = {}
    for fault in bank:
        for case in placements(fault, models, grids):
            texts.setdefault(case.model, []).append(f"{fault.name} {case}")
    if not texts:
        told = f"--grid {','.join(map(str, grids))}" if grids else f"--model {','.join(models)}"
        raise UsageError(
            f"{told}: none of the {len(bank)} chosen faults has a place there. Leave it out for the grids and models that show them"
        )
    for cases in texts.values():  # those that share weights and tokens, then those that share a grid, go together
        cases.sort(key=_shared_by)
    batches = [Batch(model, tuple(cases), "harness.faults.verb:planter") for model, cases in texts.items()]
    return sorted(batches, key=lambda batch: -len(batch.cases))


def _shared_by(text: str) -> tuple[str, int, str]:
    case = parse(text.split(" ")[1])
    return case.dtype, case.tokens, str(case.grid)


# ---- in a worker


def planter(model: str) -> Callable[[str], Placed]:
    """What a worker does with 'NAME CASE'."""
    import torch

    torch.set_num_threads(1)

    def plant(text: str) -> Placed:
        name, _, case = text.partition(" ")
        return planted(by_name()[name], parse(case))

    return plant


def planted(fault: Fault, case: Case) -> Placed:
    """Plant one fault in one case and judge it."""
    system = _system(fault)
    finding, outputs = _checked(case, system)
    if finding.verdict is Verdict.COULD_NOT_RUN:
        raise HarnessError(f"fault {fault.name} in {case}: {finding.diagnosis}")
    reason = None if finding.verdict is Verdict.MISMATCH else equivalent(case, fault)
    judged = {}
    if reason is None and outputs is not None:
        given = problem(case)
        judged = bars.judge(outputs, given.stages.output_MH, given.dtype, case.rows)
    told = case != parse(fault.case) or fault.words in finding.diagnosis
    told = told or finding.family in fault.also  # the same function by another name, whichever was told before
    return Placed(
        fault=fault.name, case=str(case), outcome="equivalent" if reason is not None else _outcome(fault, finding),
        family=finding.family, diagnosis=finding.diagnosis, reason=reason or "", bars=judged, as_told=told,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _system(fault: Fault) -> FaultyRunner:
    """One for all cases: what the probe of a grid said is remembered with it."""
    return FaultyRunner(fault)


def _checked(case: Case, system: FaultyRunner) -> tuple[Finding, list[Tensor] | None]:
    """What `check` says, and the output of each rank, None if there is none."""
    given = problem(case)
    try:
        run = run_system(case, system, given)
    except CouldNotRun:
        return check(case, system), None
    if run.broken is not None:
        return check(case, system), None
    probed = None if case.size == "labels" else probe(labelled_case(case), system)
    finding = judge(case, system, given, run, probed)
    if finding.verdict is not Verdict.MISMATCH:
        finding = check(case, system)  # the probe alone may see it
    return finding, [whole_output(out, given) for out in run.ranks]


def _outcome(fault: Fault, finding: Finding) -> str:
    if finding.verdict is not Verdict.MISMATCH:
        return "missed"
    if finding.family in (fault.family, *fault.also):
        return "named"
    if finding.family is not None:
        return "misnamed"
    return "named" if finding.stage in ("call", "collectives") and fault.words in finding.diagnosis else "unknown"


# ---- the report


def _placed(outcome: Outcome) -> Placed:
    if outcome.kind != "finding":
        raise HarnessError(f"planting {outcome.case}: {outcome.payload}")
    result: Placed = outcome.payload
    return result


def _as_finding(result: Placed) -> Finding:
    """For the progress bar, which shows what went wrong."""
    verdict = Verdict.MISMATCH if result.outcome in ("misnamed", "missed") else Verdict.OK
    return Finding(case=result.case, model="", system=result.fault, verdict=verdict)


def summary_of(placed: Sequence[Placed], seconds: float) -> dict[str, object]:
    """The totals, the kill matrix by family, and whether all limits are kept."""
    counts = Counter(each.outcome for each in placed)
    found = sum(counts[name] for name in ("named", "unknown", "misnamed"))
    visible = len(placed) - counts["equivalent"]
    not_as_told = sorted({each.fault for each in placed if not each.as_told})
    passed = (
        found >= FOUND_AT_LEAST * visible
        and counts["named"] >= NAMED_AT_LEAST * found
        and counts["misnamed"] == 0
        and not not_as_told
    )
    matrix = _matrix(placed)
    return {
        "faults": len({each.fault for each in placed}), "planted": len(placed), "found": found,
        **{name: counts[name] for name in OUTCOMES},
        "not_as_told": not_as_told,
        "bars": {row: {bar: [n.passed, n.planted] for bar, n in cells.items()} for row, cells in matrix.cells.items()},
        "seconds": round(seconds, 1), "passed": passed,
    }  # fmt: skip


def _matrix(placed: Iterable[Placed]) -> bars.Matrix:
    """A layer that stopped would be noticed under any bar."""
    families = {name: fault.family for name, fault in by_name().items()}
    no_bar = {bar.name: False for bar in bars.BARS}
    return bars.tally(
        (families[each.fault], {**(each.bars or no_bar), bars.OURS: not each.found})
        for each in placed
        if each.outcome != "equivalent"
    )


def line_of(fault: Fault, placed: Sequence[Placed]) -> dict[str, object]:
    """One fault for a machine: how often what happened, why it was equivalent, and each case that was not named."""
    counts = Counter(each.outcome for each in placed)
    return {
        "fault": fault.name, "family": fault.family, "computes": fault.computes, "references": fault.references,
        "planted": len(placed), "found": sum(each.found for each in placed),
        **{name: counts[name] for name in OUTCOMES},
        "as_told": all(each.as_told for each in placed),
        "equivalent_because": dict(Counter(each.reason for each in placed if each.reason)),
        "cases": [
            {"case": each.case, "outcome": each.outcome, "family": each.family, "diagnosis": each.diagnosis}
            for each in placed
            if each.outcome in ("unknown", "misnamed", "missed") or not each.as_told
        ],
    }  # fmt: skip


def _show(
    bank: Sequence[Fault], placed: Mapping[str, Sequence[Placed]], summary: Mapping[str, object], console: Console
) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for name in ("fault", "family", "computes"):
        table.add_column(name, no_wrap=True)
    for name in ("planted", "found", *OUTCOMES):
        table.add_column(name, justify="right")
    for fault in bank:
        results = placed[fault.name]
        counts = Counter(each.outcome for each in results)
        cells = [len(results), sum(each.found for each in results), *(counts[name] for name in OUTCOMES)]
        table.add_row(fault.name, fault.family, fault.computes, *(str(cell) if cell else "" for cell in cells))
    console.print(table, soft_wrap=True)
    every = [each for results in placed.values() for each in results]
    for outcome in ("missed", "misnamed", "unknown"):
        _lines(outcome, [each for each in every if each.outcome == outcome], console)
    _lines("without its words", [each for each in every if not each.as_told], console)
    reasons = Counter(each.reason.partition(";")[0] for each in every if each.reason)
    for reason, count in reasons.most_common():
        console.print(f"equivalent, {count} placements: {reason}", style="dim", highlight=False)
    console.print(_matrix(every).table())
    console.print(_totals(summary), highlight=False, soft_wrap=True)


def _lines(outcome: str, placed: Sequence[Placed], console: Console) -> None:
    """One line for each fault: its first case, and what was said there."""
    by_fault: dict[str, list[Placed]] = {}
    for each in placed:
        by_fault.setdefault(each.fault, []).append(each)
    for number, (name, group) in enumerate(by_fault.items()):
        if number == _LINES:
            console.print(f"... and {len(by_fault) - _LINES} more; all of them: add --json")
            return
        first = group[0]
        count = f" (first of {len(group)})" if len(group) > 1 else ""
        said = f" [{first.family}]" if first.family else ""
        console.print(
            f"{outcome} {name} in {first.case}{count}: {first.diagnosis}{said}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip


def _totals(summary: Mapping[str, object]) -> str:
    told = ", ".join(f"{summary[name]} {name}" for name in OUTCOMES)
    limits = f"limits: {FOUND_AT_LEAST:.0%} of those not equivalent found, {NAMED_AT_LEAST:.0%} of the found named, none misnamed"
    kept = "kept" if summary["passed"] else "not kept"
    return (
        f"{summary['faults']} faults in {summary['planted']} placements: {summary['found']} found; {told}; "
        f"{summary['seconds']} s\n{limits}: {kept}"
    )
