"""What a router must have chosen, read off the output alone: the weight of every expert in every row.

Each row of the output, less the lawful rest, is solved for the experts' own outputs on that token. It needs no stages
from the system, only fewer experts than half the width, experts that are linear in their weight, and right experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence
from harness.problem import Problem
from reference.moe import Choice, forward


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """weights_ME: float64, in units of the router's weights before s.    picks_MK: the K experts of largest weight."""

    weights_ME: Tensor
    picks_MK: Tensor


def recover(evidence: Evidence) -> Recovered | None:
    """The router weights that explain rank 0's output; None if none do, or if the layer does not allow the question."""
    given = evidence.given
    spec, routing = given.spec, given.spec.routing
    inner = spec.experts.latent_size or spec.hidden_size
    if (
        spec.vision is not None
        or routing.weight_on == "input"
        or routing.num_zero_experts
        or routing.num_experts > inner // 2
    ):
        return None
    columns_EMH = _each_expert(given)
    rest_MH = given.stages.offset_H + given.stages.shared_MH
    target_MH = (evidence.outputs[0] / spec.output.share - rest_MH) / spec.scale
    matrix_MHE = columns_EMH.permute(1, 2, 0)
    weights_ME = torch.linalg.lstsq(matrix_MHE, target_MH[:, :, None], driver="gelsd").solution[:, :, 0]
    residual_M = ((matrix_MHE @ weights_ME[:, :, None])[:, :, 0] - target_MH).norm(dim=-1) * spec.scale
    naive_M = given.naive_error(evidence.tp, evidence.precision) / spec.output.share
    growth_M = (weights_ME.abs().sum(-1) / given.stages.topk_weights_MK.abs().sum(-1).clamp(min=1e-30)).clamp(min=1.0)
    if not bool((residual_M <= RESIDUAL_LIMIT * growth_M * (naive_M + naive_M.mean())).all()):
        return None
    return Recovered(weights_ME, weights_ME.abs().topk(routing.top_k, -1).indices)


@functools.lru_cache(maxsize=4)
def _each_expert(given: Problem) -> Tensor:
    """What every expert, alone and with weight 1, makes of every token: [E, M, H]."""
    x_MH, spec = given.tokens.hidden_states, given.spec
    ones_M1 = x_MH.new_ones(x_MH.shape[0], 1, dtype=torch.float64)
    alone = []
    for e in range(spec.routing.num_experts):
        choice = Choice(torch.full_like(ones_M1, e, dtype=torch.int64), ones_M1, given.stages.margin_M)
        alone.append(forward(spec, given.exact, x_MH, choice=choice).routed_MH)
    return torch.stack(alone)
