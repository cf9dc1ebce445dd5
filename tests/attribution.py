"""Who was counted how often: the coefficients of every rank's share in an output, as numbers, for tests to claim.

Independent of diagnose.py, which reads symbols: here is one least-squares fit of an output on the parts of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.execution import Run, run_system
from harness.parts import parts
from harness.problem import Problem, problem
from harness.systems import System
from reference.rounding import router_error
from reference.routes import undecided_rows

# how exactly a coefficient can be read: rounding of weights is common to a whole column
TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 8e-3}


@dataclass(frozen=True)
class Attribution:
    """factors: (part, shard or None) -> its coefficient in one rank's output, in units of y."""

    factors: dict[tuple[str, int | None], float]


def attributions(case: Case, system: System) -> list[Attribution]:
    """One for each rank; an empty list where no token decides every factor."""
    given = problem(case)
    run = run_system(case, system, given)
    assert run.broken is None, run.broken
    rows = decided(given, case, system)
    columns = parts(given, case.grid.tp)
    if len(rows) * given.spec.hidden_size < 4 * len(columns):
        return []
    matrix = torch.stack([part.value_MH[rows].flatten() for part in columns], 1)
    return [_fit(columns, matrix, output[rows]) for output in outputs(run)]


def outputs(run: Run) -> list[Tensor]:
    return [rank.output.double() / rank.unit for rank in run.ranks]


def decided(given: Problem, case: Case, system: System) -> Tensor:
    """Rows whose choice of experts rounding cannot change."""
    spec, tokens = given.spec, given.tokens
    precision = system.precision(spec)
    delta_ME = router_error(spec, given.weights, tokens.hidden_states, precision, tokens.is_vision)
    undecided_M = undecided_rows(
        spec.routing, given.stages.logits_ME, given.weights.get("e_score_correction_bias"), delta_ME
    )
    if spec.vision is not None and tokens.is_vision is not None:
        bias = given.weights.get("vision_e_score_correction_bias")
        other_M = undecided_rows(spec.vision.routing, given.stages.logits_ME, bias, delta_ME)
        undecided_M = torch.where(tokens.is_vision, other_M, undecided_M)
    return (~undecided_M).nonzero()[:, 0]


def _fit(columns, matrix: Tensor, output: Tensor) -> Attribution:
    solved = torch.linalg.lstsq(matrix, output.flatten()[:, None], driver="gelsd").solution[:, 0]
    return Attribution({(part.name, part.shard): float(value) for part, value in zip(columns, solved, strict=True)})
