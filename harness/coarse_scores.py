"""Scores that are multiples of a coarse step: a large number was added to them, in a short dtype, and taken off again.

A bias b of a checkpoint may lie far from ours, at b + c: then (score + b + c) - (b + c) in bf16 is a multiple of the step
that bf16 has there, next to the score, but not always the nearest one.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from harness.algebra import Evidence
from harness.recover import Recovered, Story
from reference.moe import renormalize

# Coarser than any score, down to what is still far above the error of a recovered weight.
_STEPS = tuple(2.0**-k for k in range(1, 7))
# How near a weight has to be, as a share of the largest of its token.
_NEAR = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def coarse_scores_story(evidence: Evidence, recovered: Recovered | None) -> Story | None:
    """The step that explains the weights of all tokens; None if none does, or if rounding to the nearest would as well."""
    given, rule = evidence.given, evidence.given.spec.routing
    if recovered is None or not rule.correction_bias or rule.scoring_func == "sparsemixer" or rule.top_k > 8:
        return None
    held_M = evidence.held_RM.any(0) if evidence.ranks_agree else evidence.held_RM[recovered.rank]
    rows = (evidence.decided_M & held_M).nonzero()[:, 0]
    ids_mK = given.stages.topk_ids_MK[rows]
    found_mK, scores_mK = recovered.weights_ME[rows].gather(1, ids_mK), given.stages.scores_ME[rows].gather(1, ids_mK)
    beside_ME = recovered.weights_ME[rows].scatter(1, ids_mK, 0.0)
    near_m1 = _NEAR[given.dtype] * found_mK.abs().amax(-1, keepdim=True)
    if len(rows) < 4 or rule.top_k < 2 or bool((beside_ME.abs() > near_m1).any()):
        return None  # other experts, or too few numbers to tell
    for step in _STEPS:
        elsewhere = 0
        for found_K, score_K, near in zip(found_mK, scores_mK, near_m1[:, 0].tolist(), strict=True):
            nearest = _nearest(found_K, score_K, step, near, evidence)
            if nearest is None:
                break
            elsewhere += not nearest
        else:
            if not elsewhere:
                return None  # a rounding, and multiples of this step are multiples of a finer one
            told = f"the scores are multiples of {step:g}: a large number is added to them in a short dtype and taken off again"
            return Story("D4", "topk_weights", told)
    return None


def _nearest(found_K: Tensor, score_K: Tensor, step: float, near: float, evidence: Evidence) -> bool | None:
    """Whether the multiples are the scores' nearest; None if none of those beside them gives these weights."""
    below_K = (score_K / step).floor()
    ups = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(score_K))), dtype=torch.float64)
    ups = ups[(((below_K + ups) * step - score_K).abs() < step).all(-1)]
    weights_NK = renormalize((below_K + ups) * step, evidence.given.spec.routing)
    fits_N = ((weights_NK - found_K).abs() <= near).all(-1)
    if not bool(fits_N.any()):
        return None
    return bool((ups[fits_N] == (score_K / step - below_K).round()).all(-1).any())
