"""The story of a run: from a case and a system to one finding. A reader starts here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harness import known
from harness.algebra import Evidence, explained_by
from harness.case import Case
from harness.compare import compare
from harness.diagnose import Diagnosis, diagnose
from harness.errors import CouldNotRun
from harness.execution import Run, run_system
from harness.finding import Finding, Verdict, repro_command
from harness.hazards import hazards
from harness.many_rows import many_rows_story
from harness.outputs import evidence, handed, whole_output
from harness.probe import Probe, labelled_case, probe, read, told_on_two_grids
from harness.problem import Problem, problem, ways
from harness.projection import Projected
from harness.second_look import second_look
from harness.stages import Handed, Looked, first_wrong
from harness.systems import System


def check(case: Case, system: System, *, alone: bool = False) -> Finding:
    """Run one case on one system and judge it. Whatever a system does wrong becomes part of the finding.

    First the decodable probe, once for all cases of a grid, dtype and options; then the case itself.
    alone: by the case's own tokens, without the probe.
    """
    try:
        reason = system.supports(case)
        if reason is not None:
            return _finding(case, system, Verdict.NOT_APPLICABLE, diagnosis=reason)
        probed = None if alone or case.size == "labels" else probe(labelled_case(case), system)
        if case.calls != "one":
            finding = _called_often(case, system)
            return finding if probed is None else _with_probe(finding, probed, case, system)
        given = problem(case)
        if not bool(given.stages.output_MH.isfinite().all()):
            told = "the law itself is not finite on these numbers: no layer can be judged by them"
            return _finding(case, system, Verdict.COULD_NOT_RUN, diagnosis=told)
        run = run_system(case, system, given)
    except CouldNotRun as error:
        return _finding(case, system, Verdict.COULD_NOT_RUN, diagnosis=str(error))
    if run.broken is not None:
        stage, sentence = run.broken
        return _finding(case, system, Verdict.MISMATCH, stage=stage, diagnosis=sentence)
    finding = judge(case, system, given, run, probed)
    return finding if probed is None else _with_probe(finding, probed, case, system)


def _called_often(case: Case, system: System) -> Finding:
    """A case of many calls: one has to be right before what later calls get wrong can be told apart from it."""
    plain = check(replace(case, calls="one"), system, alone=True)
    plain = replace(plain, case=str(case), repro=repro_command(case, system.name))
    if plain.verdict not in (Verdict.OK, Verdict.KNOWN):
        return plain
    report = hazards(case, system, full=case.calls == "every")
    figures: dict[str, object] = {"tried": list(report.tried), "skipped": report.skipped, "notes": list(report.notes)}
    if report.broken:
        told = "; ".join(f"{each.name}: {each.sentence}" for each in report.broken)
        families = {each.family for each in report.broken}
        family = families.pop() if len(families) == 1 else None
        return _finding(case, system, Verdict.MISMATCH, figures, stage="calls", family=family, diagnosis=told)
    if not report.tried and plain.verdict is Verdict.OK:
        told = "; ".join(dict.fromkeys(report.skipped.values()))
        return _finding(case, system, Verdict.COULD_NOT_RUN, figures, diagnosis=told)
    return replace(plain, figures=figures)


def judge(case: Case, system: System, given: Problem, run: Run, probed: Probe | None = None) -> Finding:
    """Compare the outputs of all ranks with the oracle, name the cause of a mismatch, look it up in the ledger.

    probed: may give a name where the outputs alone do not, if it explains them.
    """
    units = {out.unit for out in run.ranks}
    if len(units) > 1:
        told = ", ".join(f"rank {rank}: {out.unit:g}" for rank, out in enumerate(run.ranks))
        return _finding(
            case, system, Verdict.MISMATCH, stage="output", diagnosis=f"ranks declare different output units: {told}"
        )
    outputs = [whole_output(out, given) for out in run.ranks]
    if given.labels is not None:
        return _labelled(case, system, given, run, outputs)
    compared = compare(given, outputs, ways(given.spec, case.grid), system.precision(given.spec))
    if compared.wrong:
        if compared.undecided:  # what nobody can judge is no evidence
            judged_RM1 = ~compared.undecided_RM[..., None]
            outputs = [torch.where(judged_RM1[r], y, given.stages.output_MH) for r, y in enumerate(outputs)]
        seen = evidence(case, system, given, run, outputs, compared.wrong_RM)
        cause = _with_coefficients(diagnose(seen), seen, probed, case)
        cause = cause if probed is None else told_on_two_grids(cause, seen, case, system)
        if cause.family is None and cause.sentence.startswith("unknown"):
            cause = _asked_again(cause, second_look(case, system, given, run, compared.wrong_RM.any(0)))
        looked = Looked(given, outputs, seen.wrong_RM, case.grid, seen.precision, not system.foreign)
        placed = first_wrong(looked, handed(case, run))
        figures = compared.figures() | ({"stages": placed.read} if placed.read else {})
        return _settled(case, system, given, outputs, replace(cause, stage=placed.stage or cause.stage), figures)
    if compared.projection is not None:
        seen = evidence(case, system, given, run, outputs, torch.ones_like(compared.wrong_RM))
        cause, read_as = _seen_over_rows(compared.projection, seen, handed(case, run), not system.foreign)
        return _settled(case, system, given, outputs, cause, compared.figures() | read_as)
    if compared.undecided:
        return _finding(case, system, Verdict.UNDECIDED, compared.figures(), diagnosis=compared.why)
    return _passed(case, system, given, run, compared.figures())


def _seen_over_rows(
    projected: Projected, seen: Evidence, ranks: Sequence[Handed], exact: bool
) -> tuple[Diagnosis, dict[str, object]]:
    """What only many rows show: at which stage, by what is handed out, and of which family if it is the whole story."""
    nothing_RM = torch.zeros_like(seen.wrong_RM)
    looked = Looked(seen.given, seen.outputs, nothing_RM, seen.layout.grid, seen.precision, exact, many=True)
    placed, story = first_wrong(looked, ranks), many_rows_story(seen)
    by_stages = placed.stage if projected.stage == "output" or placed.is_seen else None
    family = None if story is None else story.family
    read_as: dict[str, object] = {"stages": placed.read} if placed.read else {}
    return Diagnosis(projected.sentence, family, by_stages or projected.stage), read_as


def _labelled(case: Case, system: System, given: Problem, run: Run, outputs: Sequence[Tensor]) -> Finding:
    """A labelled case is judged by its coefficients alone."""
    probed = read(case, system, given, run)
    if probed.verdict != "wrong":
        return _passed(case, system, given, run, probed.figures())
    cause = Diagnosis(probed.sentence, probed.family, coefficients=probed.symbols)
    return _settled(case, system, given, outputs, cause, probed.figures())


def _passed(case: Case, system: System, given: Problem, run: Run, figures: dict[str, object]) -> Finding:
    """The numbers are right; so have to be the ledgers, the one of known faults and the one of collectives."""
    entry = known.expected(case, system.name, given)
    if entry is not None:
        told = f"passes, but the ledger expects a fault: {entry.reference}"
        return _finding(case, system, Verdict.MISMATCH, figures, diagnosis=told)
    unannounced = _unannounced(run)
    if unannounced is not None:
        return _finding(case, system, Verdict.MISMATCH, figures, stage="collectives", diagnosis=unannounced)
    return _finding(case, system, Verdict.OK, figures)


def _settled(
    case: Case, system: System, given: Problem, outputs: Sequence[Tensor], cause: Diagnosis, figures: dict[str, object]
) -> Finding:
    """The numbers are wrong: as a ledger entry foretells, or not."""
    entry = known.expected(case, system.name, given)
    if entry is None:
        return _found(case, system, Verdict.MISMATCH, figures, cause)
    if known.agrees(entry, cause.coefficients, case, given):
        return _found(case, system, Verdict.KNOWN, figures, cause, entry.reference)
    if not cause.coefficients and known.explains(entry, outputs, case, given):
        return _found(case, system, Verdict.KNOWN, figures, Diagnosis(known.told(entry), None), entry.reference)
    told = f"the ledger expects another fault here: {entry.reference}"
    return _found(case, system, Verdict.MISMATCH, figures, cause, told)


def _asked_again(cause: Diagnosis, fact: str | None) -> Diagnosis:
    """An unknown cause with what a second look saw in the place of "unknown"."""
    return cause if fact is None else replace(cause, sentence=f"{fact}; {cause.sentence.partition('; ')[2]}")


def _with_coefficients(cause: Diagnosis, seen: Evidence, probed: Probe | None, case: Case) -> Diagnosis:
    """A cause that has no name takes the probe's if the probe's factors explain these outputs too, else its coefficients."""
    if cause.family is not None or probed is None or probed.verdict != "wrong":
        return cause
    if probed.family is not None and probed.symbols and explained_by(seen, probed.symbols):
        return Diagnosis(f"{probed.sentence} {_shown(case)}", probed.family, coefficients=probed.symbols)
    return replace(cause, sentence=f"{cause.sentence}; by source: {probed.sentence} {_shown(case)}")


def _with_probe(finding: Finding, probed: Probe, case: Case, system: System) -> Finding:
    """The finding of a case beside what the probe read: a coefficient that neither the law nor the ledger of known faults
    foretells is a mismatch whatever the case itself shows.
    """
    labelled = labelled_case(case)
    finding = replace(finding, figures={**finding.figures, "probe": {"case": str(labelled), **probed.figures()}})
    if probed.verdict == "not-run" or finding.verdict not in (Verdict.OK, Verdict.UNDECIDED, Verdict.KNOWN):
        return finding
    given = problem(labelled)
    entry = known.expected(labelled, system.name, given)
    told, family, reference = probed.sentence, probed.family, finding.reference
    if entry is None and probed.verdict != "wrong":
        return finding
    if entry is not None:
        if known.agrees(entry, probed.symbols, labelled, given):
            return finding
        held = _labelled_finding(labelled, system)
        if held.verdict is Verdict.KNOWN:
            return finding
        told, family, reference = held.diagnosis, held.family, held.reference or reference
    told = f"{told} {_shown(case)}"
    wrong = replace(finding, verdict=Verdict.MISMATCH, stage="output", family=family)
    return replace(wrong, diagnosis=told, reference=reference)


@functools.lru_cache(maxsize=1024)
def _labelled_finding(labelled: Case, system: System) -> Finding:
    """Of a labelled case by itself, in which the ledger foretells a fault that no factors of whole parts tell."""
    return check(labelled, system)


def _shown(case: Case) -> str:
    return f"(labelled probe: moe-harness check '{labelled_case(case)}')"


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
    case: Case,
    system: System,
    verdict: Verdict,
    figures: dict[str, object],
    cause: Diagnosis,
    reference: str | None = None,
) -> Finding:
    return _finding(
        case, system, verdict, figures,
        stage=cause.stage, family=cause.family, diagnosis=cause.sentence, reference=reference,
    )  # fmt: skip


def _finding(
    case: Case, system: System, verdict: Verdict, figures: dict[str, object] | None = None, *, stage: str | None = None,
    family: str | None = None, diagnosis: str = "", reference: str | None = None,
) -> Finding:  # fmt: skip
    return Finding(
        case=str(case), model=case.model, system=system.name, verdict=verdict, stage=stage, family=family,
        diagnosis=diagnosis, figures=figures or {}, reference=reference,
        repro=repro_command(case, system.name),
    )  # fmt: skip
