"""Single experts: how often each counts, and whom each token visits, where the router follows no rule that is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence, fit_symbol, symbol_values
from harness.parts import expert_parts
from harness.recover import Recovered, Story, numbers_text, routing_story

# Over the tokens of an expert, what its factor leaves of the error, in naive runs. Measured with one expert of six models: 0.6
# to 2.6 if its output was multiplied, two of 270 above this; 1.1 to 9.5 if its gate was, and something else was wrong then.
_ROUNDING = 2.2
_LEAST = 0.02  # of the largest weight of a token; what is below may be noise


def expert_story(evidence: Evidence) -> Story | None:
    """Experts that count more or less often than their router weight says."""
    given = evidence.given
    routing = given.spec.routing
    if given.spec.vision is not None or routing.num_experts > 64 or routing.weight_on == "input":
        return None
    alone = [value for value in enumerate(expert_parts(given)) if bool(value[1].any())]
    rest = given.stages.output_MH / given.spec.output.share - given.spec.scale * given.stages.routed_MH
    matrix = torch.stack([value.flatten() for _, value in alone], 1)
    if not alone or matrix.shape[0] < 2 * matrix.shape[1]:
        return None
    naive_M = evidence.naive_M / given.spec.output.share
    names = symbol_values(given.spec.scale, {})  # an expert is spread over all ranks: tp is no factor of one
    visits_E = given.stages.topk_ids_MK.flatten().bincount(minlength=routing.num_logits).tolist()
    told = []
    outputs = [evidence.assembled_MH] if evidence.ranks_agree else evidence.outputs
    for output in outputs:
        target = output / given.spec.output.share - rest
        solved = torch.linalg.lstsq(matrix, target.flatten()[:, None], driver="gelsd").solution[:, 0]
        residual_M = (target - (matrix @ solved).view_as(target)).norm(dim=-1)
        if not bool((residual_M <= RESIDUAL_LIMIT * (naive_M + naive_M.mean())).all()):
            return None
        off_E = (solved / given.spec.scale - 1).abs() > 1e-3
        visitors_M = torch.stack([value.any(-1) for _, value in alone])[off_E].any(0)
        if float(residual_M[visitors_M].norm()) > _ROUNDING * float(naive_M[visitors_M].norm()):
            return (
                None  # what is left is more than roundings: those experts compute something else, not more of the same
            )
        noise = float(naive_M.norm()) / math.sqrt(target.numel())
        spread = torch.linalg.pinv(matrix.T @ matrix).diagonal().clamp(min=0).sqrt() * noise
        for (e, _), value, deviation in zip(alone, solved.tolist(), spread.tolist(), strict=True):
            symbol = fit_symbol(value, deviation, names, given.dtype)
            if symbol != ("s" if given.spec.scale != 1.0 else "1") and (e, symbol) not in told:
                told.append((e, symbol))
    if not told or 2 * len({e for e, _ in told}) > len(alone):
        return None  # most experts are off: the fault is not theirs
    if any(symbol not in names and visits_E[e] < 2 for e, symbol in told):
        return None  # with one visit, an expert's factor and a router weight are the same number
    by_symbol: dict[str, list[int]] = {}
    for e, symbol in sorted(told):
        by_symbol.setdefault(symbol, []).append(e)
    experts = ", ".join(
        f"expert{'s' if len(those) > 1 else ''} {numbers_text(those)} counted {symbol}"
        for symbol, those in by_symbol.items()
    )
    expected = "s" if given.spec.scale != 1.0 else "1"
    return Story("F7", "routed", f"{experts} (expected {expected}), all others right")


def visits_story(evidence: Evidence, recovered: Recovered | None) -> Story | None:
    """The output is a lawful sum of experts, but not of the experts, or with the weights, that the router has to choose."""
    if recovered is None:
        return None
    story = routing_story(evidence, recovered)
    if story is not None:
        return story
    stages = evidence.given.stages
    wrong_M = evidence.wrong_RM[recovered.rank]
    row = int(wrong_M.nonzero()[0, 0])
    lawful_ME = torch.zeros_like(recovered.weights_ME).scatter(1, stages.topk_ids_MK, stages.topk_weights_MK)
    other_sets = (recovered.picks_MK.sort(-1).values != stages.topk_ids_MK.sort(-1).values).any(-1) & wrong_M
    if bool(other_sets.any()):
        row = int(other_sets.nonzero()[0, 0])
    told, lawful = (
        _visits(recovered.weights_ME[row], recovered.picks_MK[row]),
        _visits(lawful_ME[row], stages.topk_ids_MK[row]),
    )
    what = (
        f"{int(other_sets.sum())} of {len(wrong_M)} tokens visit other experts than the law's"
        if bool(other_sets.any())
        else "the right experts have wrong weights"
    )
    stage = "topk_ids" if bool(other_sets.any()) else "topk_weights"
    return Story(
        None, stage, f"{what}, by no rule that is known here; token {row} visits {told}, the law says {lawful}"
    )


def _visits(weights_E: Tensor, ids_K: Tensor) -> str:
    """'3: 0.41, 7: 0.59', by expert; those that hardly count are none."""
    least = _LEAST * float(weights_E.abs().max())
    return ", ".join(f"{e}: {float(weights_E[e]):.3g}" for e in sorted(ids_K.tolist()) if weights_E[e].abs() > least)
