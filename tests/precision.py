"""The tables of docs/precision.md, measured again: what the moment of scaling costs in each dtype.

python -m tests.precision            all of them, in 15 s
python -m tests.precision range      one of them: placements, factors, int8 or range
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness import models
from harness.case import DTYPES, Case, Grid
from harness.compare import near_ties
from harness.execution import Run, run_system
from harness.faults.fault import OtherRules, layers_of
from harness.outputs import whole_output
from harness.problem import Problem, problem, ways
from harness.systems.runner import RunnerSystem
from harness.weights import Tokens
from reference.moe import forward
from reference.rounding import RoundingErrors, analyse
from reference.spec import MoESpec

# Who multiplies by s: the option of a case, and whether the runner works in units of s. Of itself it does so in fp16 alone;
# here every form is measured in every dtype. "w2" folds s into the float32 scales of quantised experts before the run.
PLACEMENTS = {"router": ("router", False), "kernel": ("kernel", False), "output": ("output", False),
              "unit": ("output", True), "w2": ("router", False)}  # fmt: skip
SCALED = tuple(name for name in models.names() if models.load(name).real.routing.routed_scaling_factor is not None)
WITH_SHARED = tuple(name for name in SCALED if models.load(name).twin.shared is not None)
TP_SIZES = (1, 4)
TOKENS = 33


class Placed(RunnerSystem):
    """The runner with s at one place, whatever the dtype."""

    def __init__(self, placement: str) -> None:
        self.name = placement
        self._scale, self._in_units = PLACEMENTS[placement]

    def build(self, case, weights, comm):
        case = replace(case, scale=self._scale)
        if self.name == "w2":
            weights, case = _folded(weights, case.spec.scale), OtherRules.of(case, _without_scale)
        block = super().build(case, weights, comm)
        for layer in layers_of(block):
            layer.runner.plan = _as_if(layer.runner.plan, torch.float16 if self._in_units else torch.float32)
        return block


def _as_if(plan: Callable, dtype: torch.dtype) -> Callable:
    """A plan reads of the dtype only whether it is fp16."""
    return lambda _, width: plan(dtype, width)


def _folded(weights: Mapping[str, Tensor], s: float) -> dict[str, Tensor]:
    return {**weights, "w2_scale": weights["w2_scale"] * s}


def _without_scale(spec: MoESpec) -> MoESpec:
    return replace(spec, routing=replace(spec.routing, routed_scaling_factor=1.0))


@dataclass(frozen=True)
class Errors:
    """By row: its L2 error over the worse naive run's, over the deviation, over |y|; its worst element over the bound."""

    naive: tuple[float, ...]
    deviation: tuple[float, ...]
    bound: tuple[float, ...]
    relative: tuple[float, ...]

    def median(self, unit: str) -> float:
        return statistics.median(getattr(self, unit))

    def worst(self, unit: str) -> float:
        return max(getattr(self, unit))


def errors(case: Case, placement: str) -> Errors:
    """Of the rows whose choice of experts rounding cannot change: the others are compared route by route elsewhere."""
    given, precision = problem(case), RunnerSystem().precision(case.spec)
    miss_RMH = misses(run_placed(case, placement, given), given)
    error_M, rounding = miss_RMH.norm(dim=-1).amax(0), _analysis(case)
    naive_M = given.naive_error(ways(given.spec, case.grid), precision)
    by_row = (
        error_M / naive_M, error_M / rounding.deviation_M, (miss_RMH.abs() / rounding.bound_MH).amax((0, 2)),
        error_M / given.stages.output_MH.norm(dim=-1),
    )  # fmt: skip
    clear_M = ~near_ties(given, precision)
    return Errors(*(tuple(each_M[clear_M].tolist()) for each_M in by_row))


def run_placed(case: Case, placement: str, given: Problem) -> Run:
    run = run_system(case, Placed(placement), given)
    assert run.broken is None, run.broken
    return run


def misses(run: Run, given: Problem) -> Tensor:
    """What each rank's output lacks of y, [R, M, H]."""
    return torch.stack([whole_output(out, given) for out in run.ranks]) - given.stages.output_MH


@functools.cache
def _analysis(case: Case) -> RoundingErrors:
    return analysis(case, problem(case))


def analysis(case: Case, given: Problem) -> RoundingErrors:
    cut, precision = ways(case.spec, case.grid), RunnerSystem().precision(case.spec)
    return analyse(
        given.spec, given.exact, given.tokens.hidden_states, given.stages, cut.routed, precision,
        shared_tp=cut.shared, packed=given.is_quantised,
    )  # fmt: skip


def together(placement: str, dtype: str, names: Iterable[str] = SCALED, **fields: str) -> Errors:
    """The rows of all models that have the placement, at both tensor-parallel sizes."""
    having = [name for name in names if placement != "unit" or name in WITH_SHARED]
    cases = (Case(model=m, dtype=dtype, tokens=TOKENS, grid=Grid(tp=tp), **fields) for m in having for tp in TP_SIZES)
    found = [errors(case, placement) for case in cases]
    units = [field.name for field in dataclasses.fields(Errors)]
    return Errors(*(tuple(itertools.chain(*(getattr(each, unit) for each in found))) for unit in units))


def placements(quant: str = "none") -> Iterator[str]:
    yield "| s multiplies in | dtype | error / naive run | error / deviation | element / bound | error / length of y |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for placement, dtype in itertools.product(PLACEMENTS, DTYPES):
        if placement == "w2" and quant == "none":
            continue
        rows = together(placement, dtype, quant=quant)
        told = [f"{rows.median(u):.2f}, {rows.worst(u):.2f}" for u in ("naive", "deviation")]
        told.append(f"{rows.median('bound'):.3f}, {rows.worst('bound'):.3f}")
        told.append(f"{rows.median('relative'):.1e}, {rows.worst('relative'):.1e}")
        yield f"| {placement} | {dtype} | {' | '.join(told)} |"


def factors() -> Iterator[str]:
    shown = [name for name in PLACEMENTS if name not in ("kernel", "w2")]
    by_s: dict[float, list[str]] = {}
    for name in WITH_SHARED:
        by_s.setdefault(float(models.load(name).real.routing.routed_scaling_factor), []).append(name)
    yield f"| s | dtype | {' | '.join(shown)} | models |"
    yield f"| --- | --- |{' --- |' * len(shown)} --- |"
    for (s, names), dtype in itertools.product(sorted(by_s.items()), DTYPES):
        rows = [together(placement, dtype, names, s="real") for placement in shown]
        told = [f"{e.median('naive'):.2f}, {e.worst('naive'):.2f}; {e.worst('bound'):.3f}" for e in rows]
        yield f"| {s:g} | {dtype} | {' | '.join(told)} | {', '.join(names)} |"


def louder(given: Problem, by: float, what: str) -> Problem:
    """The same layer with tokens, or with second matrices of routed and shared experts ("w2"), so many times as large."""
    tokens, weights = given.tokens, given.weights
    if what == "tokens":
        tokens = Tokens((tokens.hidden_states * by).to(given.dtype), tokens.is_vision)
    else:
        weights = {name: (t * by).to(t.dtype) if name in ("w2", "shared_w2") else t for name, t in weights.items()}
    exact = {name: t.double() for name, t in weights.items()}
    stages = forward(given.spec, exact, tokens.hidden_states, is_vision_M=tokens.is_vision)
    return Problem(given.spec, given.dtype, weights, exact, tokens, stages)


@dataclass(frozen=True)
class Loud:
    """largest: of the law's R, s*R, y and R + S/s, the largest element by size.    finite: by row, whether all ranks
    returned numbers.    deviations: of the finite rows, their errors over the deviation; naive runs overflow themselves.
    """

    largest: dict[str, float]
    finite: list[bool]
    deviations: list[float]


def loud(case: Case, placement: str, by: float, what: str) -> Loud:
    given = louder(problem(case), by, what)
    stages, s = given.stages, given.spec.scale
    law = {"R": stages.routed_MH, "s*R": s * stages.routed_MH, "y": stages.output_MH, "R + S/s": stages.output_MH / s}
    miss_RMH = misses(run_placed(case, placement, given), given)
    finite_M = miss_RMH.isfinite().all(-1).all(0)
    clear_M = finite_M & ~near_ties(given, RunnerSystem().precision(case.spec))
    deviations_M = miss_RMH.norm(dim=-1).amax(0) / analysis(case, given).deviation_M
    return Loud({n: float(t.abs().max()) for n, t in law.items()}, finite_M.tolist(), deviations_M[clear_M].tolist())


def first_overflow(case: Case, placement: str, what: str) -> float:
    """The loudness from which on a row is not finite, to an eighth."""
    steps = [2 ** (k / 6) for k in range(100)]
    return steps[bisect.bisect_left(steps, True, key=lambda by: not all(loud(case, placement, by, what).finite))]


def in_range() -> Iterator[str]:
    shown = [name for name in PLACEMENTS if name not in ("kernel", "w2")]
    heads = [f"{what}: {placement}" for what in ("tokens", "w2") for placement in shown]
    yield f"| model | s | {' | '.join(heads)} |"
    yield f"| --- | --- |{' --- |' * len(heads)}"
    for name in WITH_SHARED:
        case = Case(model=name, dtype="fp16", tokens=TOKENS, s="real")
        found = [first_overflow(case, placement, what) for what in ("tokens", "w2") for placement in shown]
        yield f"| {name} | {case.spec.scale:g} | {' | '.join(f'{by:.0f}' for by in found)} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "placements": placements,
    "factors": factors,
    "int8": functools.partial(placements, "int8"),
    "range": in_range,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        for table in sys.argv[1:] or TABLES:
            print(f"\n{table}\n", *TABLES[table](), sep="\n")
