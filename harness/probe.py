"""The decodable probe: one forward of the labelled twin, read as the list of who was added how often, times what.

Exact where s and the weights are exact in the dtype, within 4 u elsewhere; a coefficient further off still counts as
rounding within the certified bound of the error analysis. It is a test at one point (positive labels, saturated
activations): signs, magnitudes and what branches on a partial sum are the generic run's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from harness import known
from harness.algebra import Evidence
from harness.case import Case
from harness.coefficients import read_coefficients, sources
from harness.diagnose import Diagnosis, algebra_sentence
from harness.errors import CouldNotRun
from harness.execution import Run, run_system
from harness.outputs import evidence, whole_output
from harness.problem import Problem, Ways, problem, ways
from harness.recover import numbers_text
from harness.second_grid import Asked, told_apart
from harness.systems import System
from reference.rounding import analyse
from reference.spec import RouterPrecision

SCOPE = "one point: positive labels, saturated activations; signs and magnitudes are the case's own"
LIMIT = 4.0  # of u = half a unit in the last place of 1, relative to the coefficient


@dataclass(frozen=True, slots=True)
class Probe:
    """verdict: "exact" or "rounded" coefficients, "wrong" ones, or "not-run" with the reason as its sentence.

    coefficients: how many were read, over all ranks and tokens.    exact: how many without any error.
    worst: the largest error in u.
    not_exercised: sources that no token reached.    symbols: part -> factor, where one holds for all of a part.
    """

    verdict: Literal["exact", "rounded", "wrong", "not-run"]
    sentence: str
    family: str | None = None
    coefficients: int = 0
    exact: int = 0
    worst: float = 0.0
    not_exercised: tuple[str, ...] = ()
    symbols: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, object]:
        """What a finding keeps of it; the words say how far it goes."""
        told: dict[str, object] = {"verdict": self.verdict, "told": self.sentence}
        if self.verdict in ("exact", "rounded"):
            told |= {"coefficients": self.coefficients, "exact": self.exact, "worst_u": float(f"{self.worst:.3g}")}
            told["scope"] = SCOPE
        return told


@functools.lru_cache(maxsize=1024)
def labelled_case(case: Case) -> Case:
    """The labelled case that goes with a case: its grid, dtype and options, tokens of its own."""
    return replace(case, size="labels", quant="none", calls="one", tokens=0, split=None, seed=0)


@functools.lru_cache(maxsize=4096)
def probe(labelled: Case, system: System) -> Probe:
    """`run_probe`, remembered, since it depends on nothing else."""
    return run_probe(labelled, system)


@functools.lru_cache(maxsize=4096)
def _of_one_grid(labelled: Case, system: System) -> Probe:
    return run_probe(labelled, system, on_two_grids=False)


def run_probe(labelled: Case, system: System, *, on_two_grids: bool = True) -> Probe:
    """Run and read a labelled case; "not-run" where the system has no such layer or cannot build it.

    on_two_grids: whether factors that may be one of several sizes are asked for on another grid.
    """
    try:
        reason = system.supports(labelled)
        if reason is not None:
            return Probe("not-run", reason)
        given = problem(labelled)
        run = run_system(labelled, system, given)
    except CouldNotRun as error:
        return Probe("not-run", str(error))
    if run.broken is not None:
        return Probe("not-run", run.broken[1])
    return read(labelled, system, given, run, on_two_grids=on_two_grids)


def read(case: Case, system: System, given: Problem, run: Run, *, on_two_grids: bool = True) -> Probe:
    """Read the coefficients of a labelled run on every rank, and say what is wrong with them."""
    outputs = [whole_output(out, given) for out in run.ranks]
    due, off_RMH = _due(given), torch.stack(outputs).sub_(given.stages.output_MH).abs_()
    worst = float((off_RMH / due.u_MH).amax())
    count, silent = due.total * len(outputs), _not_exercised(given)
    if not worst <= LIMIT:  # the negation also catches NaN
        beyond_RMH = ~(off_RMH <= LIMIT * due.u_MH)
        beyond_RMH &= ~(off_RMH <= _bound(given, ways(given.spec, case.grid), system.precision(given.spec)))
        if bool(beyond_RMH.any()):
            seen = evidence(case, system, given, run, outputs, beyond_RMH.any(-1))
            found, cause = _wrong(seen, beyond_RMH, count, silent)
            if cause is None or not on_two_grids:
                return found
            sure = told_on_two_grids(cause, seen, case, system)
            return replace(found, sentence=sure.sentence, family=sure.family, symbols=dict(sure.coefficients))
    same = [out == _rounded(given, r.unit) for out, r in zip(outputs, run.ranks, strict=True)]
    exact = int((torch.stack(same) & due.where_MH).sum())
    rest = "" if exact == count else f", the others within {worst:.1f} u"
    told = f"; not exercised: {', '.join(silent)}" if silent else ""
    verdict: Literal["exact", "rounded"] = "exact" if exact == count else "rounded"
    return Probe(verdict, f"{count} coefficients: {exact} exact{rest}{told}", None, count, exact, worst, silent)


class _Due(NamedTuple):
    """where_MH: bool, the coefficients that are not 0.    total: how many.    u_MH: the u of each, next to nothing for a 0."""

    where_MH: Tensor
    total: int
    u_MH: Tensor


@functools.lru_cache(maxsize=16)
def _due(given: Problem) -> _Due:
    law_MH, u = given.stages.output_MH, torch.finfo(given.dtype).eps / 2
    where_MH = law_MH != 0
    return _Due(where_MH, int(where_MH.sum()), torch.where(where_MH, u * law_MH.abs(), math.ulp(0.0)))


@functools.lru_cache(maxsize=16)
def _rounded(given: Problem, unit: float) -> Tensor:
    """What an exact layer returns in that unit, read as `whole_output` reads it."""
    return (given.stages.output_MH * unit).to(given.dtype).double() / unit


@functools.lru_cache(maxsize=16)
def _bound(given: Problem, cut: Ways, precision: RouterPrecision) -> Tensor:
    """The certified bound of each element, float64 [M, H]."""
    x_MH, is_vision = given.tokens.hidden_states, given.tokens.is_vision
    return analyse(
        given.spec, given.exact, x_MH, given.stages, cut.routed, precision, is_vision, shared_tp=cut.shared
    ).bound_MH


@functools.lru_cache(maxsize=16)
def _not_exercised(given: Problem) -> tuple[str, ...]:
    labels, reached_H = given.labels, (given.stages.output_MH != 0).any(0)
    assert labels is not None  # the caller's case has size=labels
    silent = []
    for block in labels.blocks:
        columns = reached_H[block.first : block.stop].view(block.count, block.each).any(1)
        missed = (~columns).nonzero()[:, 0].tolist()
        if missed:
            silent.append(block.part if block.count == 1 else f"{block.part} of {numbers_text(missed)}")
    return tuple(silent)


def told_on_two_grids(cause: Diagnosis, seen: Evidence, case: Case, system: System) -> Diagnosis:
    """A cause whose factor may be one of several sizes, with what the probe reads on another grid; the ledger's own needs none."""
    entry = known.expected(case, system.name, seen.given)
    if entry is not None and known.agrees(entry, cause.coefficients, case, seen.given):
        return cause

    def ask(other: Case) -> Asked:
        found = _of_one_grid(labelled_case(other), system)
        return found.verdict, found.symbols

    return told_apart(cause, seen, case, ask)


def _wrong(seen: Evidence, beyond_RMH: Tensor, count: int, silent: tuple[str, ...]) -> tuple[Probe, Diagnosis | None]:
    """By the factors of whole parts where they explain all of it, with their cause, else source by source."""
    held = [rank for rank in range(len(seen.outputs)) if bool(seen.held_RM[rank].any())]
    readings = {rank: reading for rank in held if (reading := read_coefficients(seen, rank)) is not None}
    if len(readings) == len(held) and all(reading.is_symbolic for reading in readings.values()):
        cause = algebra_sentence(seen, readings)
        lost = "0" in (cause.coefficients.get("routed"), cause.coefficients.get("shared"))
        # a part that is gone may be what an input without tokens gives, as in a buffer that was overwritten
        cause = replace(cause, family=None) if lost else cause
        symbols = dict(cause.coefficients)
        return Probe("wrong", cause.sentence, cause.family, count, 0, torch.inf, silent, symbols), cause
    found = Probe("wrong", sources(seen, beyond_RMH), None, count, 0, torch.inf, silent)
    first = next(iter(readings.values()), None)
    if first is None or len(readings) < len(held) or any(reading != first for reading in readings.values()):
        return found, None
    return (found if first.own_only or first.uneven else replace(found, symbols=dict(first.symbols))), None
