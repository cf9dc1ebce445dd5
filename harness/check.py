"""The story of a run: from a case and a system to one finding. A reader starts here."""

from __future__ import annotations

from torch import Tensor

from harness import known
from harness.algebra import Evidence
from harness.case import Case
from harness.compare import Comparison, compare
from harness.diagnose import Diagnosis, diagnose
from harness.errors import CouldNotRun
from harness.execution import Run, run_system
from harness.finding import Finding, Verdict, repro_command
from harness.problem import Problem, problem
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
    precision, tp = system.precision(given.spec), case.grid.tp
    units = {out.unit for out in run.ranks}
    if len(units) > 1:
        told = ", ".join(f"rank {rank}: {out.unit:g}" for rank, out in enumerate(run.ranks))
        return _finding(
            case, system, Verdict.MISMATCH, stage="output", diagnosis=f"ranks declare different output units: {told}"
        )
    unit = units.pop()
    compared = compare(given, [out.output for out in run.ranks], unit, tp, precision)
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
        return _finding(case, system, Verdict.OK, compared)
    outputs = [out.output.double() / unit for out in run.ranks]
    stages: dict[str, Tensor] = getattr(run.ranks[0].layer, "stages", dict)()
    cause = diagnose(Evidence(given, outputs, tp, precision, compared.wrong_RM, stages))
    if entry is None:
        return _found(case, system, Verdict.MISMATCH, compared, cause)
    if known.agrees(entry, cause.coefficients, case, given):
        return _found(case, system, Verdict.KNOWN, compared, cause, entry.reference)
    if not cause.coefficients and known.explains(entry, outputs, case, given):
        return _found(case, system, Verdict.KNOWN, compared, Diagnosis(known.told(entry), None), entry.reference)
    return _found(
        case, system, Verdict.MISMATCH, compared, cause, f"the ledger expects another fault here: {entry.reference}"
    )


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
