"""The story of a run: from a case and a system to one finding. A reader starts here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from harness import known
from harness.algebra import Evidence
from harness.case import Case
from harness.compare import Comparison, compare
from harness.diagnose import Diagnosis, diagnose
from harness.errors import CouldNotRun
from harness.execution import RankOutput, Run, run_system
from harness.finding import Finding, Verdict, repro_command
from harness.layout import Layout, linear_owners
from harness.problem import Problem, problem, ways
from harness.systems import System


def check(case: Case, system: System) -> Finding:
    """Run one case on one system and judge it. Whatever a system does wrong becomes part of the finding."""
    try:
        reason = system.supports(case)
        if reason is not None:
            return _finding(case, system, Verdict.NOT_APPLICABLE, diagnosis=reason)
        given = problem(case)
        run = run_system(case, system, given)
    except CouldNotRun as error:
        return _finding(case, system, Verdict.COULD_NOT_RUN, diagnosis=str(error))
    if run.broken is not None:
        stage, sentence = run.broken
        return _finding(case, system, Verdict.MISMATCH, stage=stage, diagnosis=sentence)
    return judge(case, system, given, run)


def judge(case: Case, system: System, given: Problem, run: Run) -> Finding:
    """Compare the outputs of all ranks with the oracle, name the cause of a mismatch, look it up in the ledger."""
    precision = system.precision(given.spec)
    units = {out.unit for out in run.ranks}
    if len(units) > 1:
        told = ", ".join(f"rank {rank}: {out.unit:g}" for rank, out in enumerate(run.ranks))
        return _finding(
            case, system, Verdict.MISMATCH, stage="output", diagnosis=f"ranks declare different output units: {told}"
        )
    outputs = [whole_output(out, given) for out in run.ranks]
    compared = compare(given, outputs, ways(given.spec, case.grid), precision)
    entry = known.expected(case, system.name, given)
    if not compared.wrong:
        if compared.undecided:
            rows = int(compared.undecided_RM.any(0).sum())
            return _finding(
                case,
                system,
                Verdict.UNDECIDED,
                compared,
                diagnosis=f"{rows} near ties with too many legal routes to list",
            )
        if entry is not None:
            return _finding(
                case,
                system,
                Verdict.MISMATCH,
                compared,
                diagnosis=f"passes, but the ledger expects a fault: {entry.reference}",
            )
        unannounced = _unannounced(run)
        if unannounced is not None:
            return _finding(case, system, Verdict.MISMATCH, compared, stage="collectives", diagnosis=unannounced)
        return _finding(case, system, Verdict.OK, compared)
    cause = diagnose(evidence(case, system, given, run, outputs, compared))
    if entry is None:
        return _found(case, system, Verdict.MISMATCH, compared, cause)
    if known.agrees(entry, cause.coefficients, case, given):
        return _found(case, system, Verdict.KNOWN, compared, cause, entry.reference)
    if not cause.coefficients and known.explains(entry, outputs, case, given):
        return _found(case, system, Verdict.KNOWN, compared, Diagnosis(known.told(entry), None), entry.reference)
    return _found(
        case, system, Verdict.MISMATCH, compared, cause, f"the ledger expects another fault here: {entry.reference}"
    )


def whole_output(out: RankOutput, given: Problem) -> Tensor:
    """What a rank returned, [M, H] float64 in units of y, between the law's own rows for the tokens of other ranks."""
    found_mH = out.output.double() / out.unit
    if found_mH.shape[0] == given.stages.output_MH.shape[0]:
        return found_mH
    whole_MH = given.stages.output_MH.clone()
    whole_MH[out.rows] = found_mH
    return whole_MH


def evidence(
    case: Case, system: System, given: Problem, run: Run, outputs: Sequence[Tensor], compared: Comparison
) -> Evidence:
    """What the diagnosis gets to see."""
    held_RM, wrong_RM, tp = torch.zeros(compared.wrong_RM.shape, dtype=torch.bool), compared.wrong_RM, case.grid.tp
    for rank, out in enumerate(run.ranks):
        held_RM[rank, _computed(out.rows, rank % tp, tp) if case.grid.sp > 1 else out.rows] = True
    if case.grid.sp > 1 and not bool((wrong_RM & held_RM).any()):  # what a rank computed is right: the gather is not
        held_RM = torch.stack([_mask(out.rows, wrong_RM.shape[1]) for out in run.ranks])
    wrong_RM = wrong_RM & held_RM
    stages: dict[str, Tensor] = getattr(run.ranks[0].layer, "stages", dict)() if case.grid.dp == 1 else {}
    linear = linear_owners(case.spec.routing.num_experts, case.grid.ep)
    layout = Layout(case.grid, getattr(run.ranks[0].layer, "owners", linear))
    return Evidence(given, outputs, held_RM, layout, system.precision(given.spec), wrong_RM, stages)


def _computed(rows: slice, rank: int, tp: int) -> slice:
    """Under sequence parallelism, the rows that a tp rank took through the layer."""
    share = -(-(rows.stop - rows.start) // tp)
    start = min(rows.start + rank * share, rows.stop)
    return slice(start, min(start + share, rows.stop))


def _mask(rows: slice, count: int) -> Tensor:
    held_M = torch.zeros(count, dtype=torch.bool)
    held_M[rows] = True
    return held_M


def _unannounced(run: Run) -> str | None:
    """Where a layer that announces its collectives made others, in one sentence."""
    for rank, (out, entries) in enumerate(zip(run.ranks, run.ledger, strict=True)):
        announced = getattr(out.layer, "announced", None)
        if announced is None:
            continue
        told = [f"{op} over {group}" for op, group in announced]
        made = [f"{entry.op} over {entry.group}" for entry in entries]
        for number, (plan, ledger) in enumerate(itertools.zip_longest(told, made, fillvalue="nothing")):
            if plan != ledger:
                return f"collective {number} of rank {rank}: the plan announced {plan}, the ledger shows {ledger}"
    return None


def _found(
    case: Case, system: System, verdict: Verdict, compared: Comparison, cause: Diagnosis, reference: str | None = None
) -> Finding:
    return _finding(
        case, system, verdict, compared,
        stage=cause.stage, family=cause.family, diagnosis=cause.sentence, reference=reference,
    )  # fmt: skip


def _finding(
    case: Case, system: System, verdict: Verdict, compared: Comparison | None = None, *, stage: str | None = None,
    family: str | None = None, diagnosis: str = "", reference: str | None = None,
) -> Finding:  # fmt: skip
    return Finding(
        case=str(case), model=case.model, system=system.name, verdict=verdict, stage=stage, family=family,
        diagnosis=diagnosis, figures=compared.figures() if compared else {}, reference=reference,
        repro=repro_command(case, system.name),
    )  # fmt: skip
