"""What the ranks returned, laid beside the law's rows: what is compared, and what a diagnosis gets to see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.algebra import Evidence
from harness.case import Case
from harness.execution import RankOutput, Run
from harness.labels.tensors import fold
from harness.layout import Layout, linear_owners
from harness.problem import Problem
from harness.stages import Handed
from harness.systems import Layer, System


def whole_output(out: RankOutput, given: Problem) -> Tensor:
    """What a rank returned, [M, H] float64 in units of y, between the law's own rows for the tokens of other ranks."""
    found_mH = out.output.double() if out.unit == 1.0 else out.output.double() / out.unit
    if given.labels is not None:
        found_mH = fold(given.labels, found_mH)
    if found_mH.shape[0] == given.stages.output_MH.shape[0]:
        return found_mH
    whole_MH = given.stages.output_MH.clone()
    whole_MH[out.rows] = found_mH
    return whole_MH


def evidence(
    case: Case, system: System, given: Problem, run: Run, outputs: Sequence[Tensor], wrong_RM: Tensor
) -> Evidence:
    """What the diagnosis gets to see. wrong_RM: bool, the rows that need an explanation."""
    held_RM, tp = torch.zeros(wrong_RM.shape, dtype=torch.bool), case.grid.tp
    for rank, out in enumerate(run.ranks):
        held_RM[rank, _computed(out.rows, rank % tp, tp) if case.grid.sp > 1 else out.rows] = True
    if case.grid.sp > 1 and not bool((wrong_RM & held_RM).any()):  # what a rank computed is right: the gather is not
        held_RM = torch.stack([_mask(out.rows, wrong_RM.shape[1]) for out in run.ranks])
    wrong_RM = wrong_RM & held_RM
    stages = told(run.ranks[0].layer)[0] if case.grid.dp == 1 else {}
    linear = linear_owners(case.spec.routing.num_experts, case.grid.ep)
    layout = Layout(case.grid, getattr(run.ranks[0].layer, "owners", linear))
    return Evidence(given, outputs, held_RM, layout, system.precision(given.spec), wrong_RM, stages)


def handed(case: Case, run: Run) -> list[Handed]:
    """The stages of each rank's layer with the tokens that they are of."""
    tp = case.grid.tp
    ranks = []
    for rank, out in enumerate(run.ranks):
        tensors, factors = told(out.layer)
        own = _computed(out.rows, rank % tp, tp) if case.grid.sp > 1 else out.rows
        ranks.append(Handed(tensors, factors, out.unit, out.rows, own))
    return ranks


def told(layer: Layer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a layer says of its last call: tensors with rows of tokens, and how often they count. What it cannot tell, even
    why, is its own business.
    """
    try:
        tensors, factors = dict(getattr(layer, "stages", dict)()), dict(getattr(layer, "stage_factors", {}))
        plain = {str(n): t.detach() for n, t in tensors.items() if isinstance(t, Tensor) and t.dim() == 2}
        return plain, {str(name): float(factor) for name, factor in factors.items() if float(factor) != 0.0}
    except Exception:
        return {}, {}


def _computed(rows: slice, rank: int, tp: int) -> slice:
    """Under sequence parallelism, the rows that a tp rank took through the layer."""
    share = -(-(rows.stop - rows.start) // tp)
    start = min(rows.start + rank * share, rows.stop)
    return slice(start, min(start + share, rows.stop))


def _mask(rows: slice, count: int) -> Tensor:
    held_M = torch.zeros(count, dtype=torch.bool)
    held_M[rows] = True
    return held_M
