"""Who was counted how often: the coefficients of every rank's share in an output, as numbers, for tests to claim.

Independent of diagnose.py, which reads symbols: here is one least-squares fit of an output on the parts of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.compare import near_ties
from harness.execution import RankOutput, Run, run_system
from harness.layout import Layout
from harness.parts import Part, parts, rank_shares
from harness.problem import Problem, problem
from harness.systems import System

# how exactly a coefficient can be read: rounding of weights is common to a whole column
TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 8e-3}
# one or two rows may have shares that look alike, which rounding then moves from one to the other
FEWEST = 3


@dataclass(frozen=True)
class Attribution:
    """factors: (part, shard or None) -> its coefficient in one rank's output, in units of y.

    The shard is a rank for the routed experts and their biases, a tp rank for the shared ones. A part has none where all
    ranks hold it, or where experts have several places. Shares that no token of the rank needs are left out.
    """

    factors: dict[tuple[str, int | None], float]


def attributions(case: Case, system: System) -> dict[int, Attribution]:
    """By rank; those are left out whose tokens are too few to decide every factor."""
    given = problem(case)
    run = run_system(case, system, given)
    assert run.broken is None, run.broken
    columns = rank_shares(given, Layout(case.grid, owners(case, run))) or parts(given)
    found = {rank: _fit(out, columns, decided(given, system, out)) for rank, out in enumerate(run.ranks)}
    return {rank: each for rank, each in found.items() if each is not None}


def owners(case: Case, run: Run) -> tuple[int, ...] | None:
    """The ep rank of each expert, as the layer tells it; neighbours together where it tells nothing."""
    parted = torch.arange(case.spec.routing.num_experts).tensor_split(case.grid.ep)
    linear = tuple(rank for rank, part in enumerate(parted) for _ in part)
    return getattr(run.ranks[0].layer, "owners", linear)


def decided(given: Problem, system: System, out: RankOutput) -> Tensor:
    """Those of a rank's rows whose choice of experts rounding cannot change."""
    clear_M = ~near_ties(given, system.precision(given.spec))
    return torch.arange(len(clear_M))[out.rows][clear_M[out.rows]]


def _fit(out: RankOutput, columns: Sequence[Part], rows: Tensor) -> Attribution | None:
    columns = [part for part in columns if bool(part.value_MH[rows].any())]
    if len(rows) < FEWEST or len(rows) * out.output.shape[1] < 4 * len(columns) or not columns:
        return None
    output = out.output[rows - out.rows.start].double() / out.unit
    matrix = torch.stack([part.value_MH[rows].flatten() for part in columns], 1)
    solved = torch.linalg.lstsq(matrix, output.flatten()[:, None], driver="gelsd").solution[:, 0]
    return Attribution({(part.name, part.shard): float(value) for part, value in zip(columns, solved, strict=True)})
