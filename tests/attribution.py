"""Who was counted how often: the coefficients of every rank's share in an output, as numbers, for tests to claim.

Independent of diagnose.py, which reads symbols: here is one least-squares fit of an output on the parts of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.compare import near_ties
from harness.execution import Run, run_system
from harness.parts import shares
from harness.problem import Problem, problem
from harness.systems import System

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
    rows = decided(given, system)
    columns = shares(given, case.grid.tp)
    if len(rows) * given.spec.hidden_size < 4 * len(columns):
        return []
    matrix = torch.stack([part.value_MH[rows].flatten() for part in columns], 1)
    return [_fit(columns, matrix, output[rows]) for output in outputs(run)]


def outputs(run: Run) -> list[Tensor]:
    return [rank.output.double() / rank.unit for rank in run.ranks]


def decided(given: Problem, system: System) -> Tensor:
    """Rows whose choice of experts rounding cannot change."""
    return (~near_ties(given, system.precision(given.spec))).nonzero()[:, 0]


def _fit(columns, matrix: Tensor, output: Tensor) -> Attribution:
    solved = torch.linalg.lstsq(matrix, output.flatten()[:, None], driver="gelsd").solution[:, 0]
    return Attribution({(part.name, part.shard): float(value) for part, value in zip(columns, solved, strict=True)})
