"""Where a wrong output first went wrong: the stages that a layer hands out, each held to the law's, in the order of the pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from harness.compare import RUN_LIMIT, near_ties
from harness.problem import Problem
from reference.spec import RouterPrecision

# Logits in a short dtype may be off by so many of its roundings of all addends together.
_LOGITS = 4.0
# Weights may be off by this many roundings beside what the logits' error makes of them.
_WEIGHTS = 16.0


def first_wrong(
    given: Problem, told: Mapping[str, Tensor], precision: RouterPrecision, naive_M: Tensor | None
) -> str | None:
    """The first of logits, topk_ids, topk_weights, routed and shared that is wrong; "sum" if all of them are right.

    told: what the layer handed out of the judged call, whole rows; names that it has not are passed over.
    naive_M: what a part may be off by, in units of y; None where a rank's parts are partial sums, which are not looked at.
    None where a layer hands out too little to say.
    """
    rows, stages = given.stages.output_MH.shape[0], given.stages
    known = {name: tensor for name, tensor in told.items() if tensor.shape[:1] == (rows,)}
    decided_M = ~near_ties(given, precision)
    if not known or not bool(decided_M.any()):
        return None
    delta_ME = _logits_error(given, precision)
    checks: dict[str, Callable[[Tensor], bool]] = {
        "logits": lambda found: bool(((found.double() - stages.logits_ME).abs() <= delta_ME)[decided_M].all()),
        "topk_ids": lambda found: _same_sets(found[decided_M], stages.topk_ids_MK[decided_M]),
        "topk_weights": lambda found: _weights_right(given, known, found, delta_ME, decided_M),
    }
    parts = {"routed": stages.routed_MH, "shared": stages.shared_MH}
    if naive_M is not None:
        checks |= {name: partial(_part_right, given, law_MH, naive_M, decided_M) for name, law_MH in parts.items()}
    for name, right in checks.items():
        if name in known and known[name].shape == _shape(given, name) and not right(known[name]):
            return name
    due = {"routed", *({"shared"} if given.spec.shared is not None else set())}
    return "sum" if naive_M is not None and due <= known.keys() else None


def _shape(given: Problem, name: str) -> torch.Size:
    stages = given.stages
    law = {"logits": stages.logits_ME, "topk_ids": stages.topk_ids_MK, "topk_weights": stages.topk_weights_MK}
    return law.get(name, stages.output_MH).shape


def _logits_error(given: Problem, precision: RouterPrecision) -> Tensor:
    """What logits may be off by, [M, E]: roundings of the products, of their sum and, where a norm comes first, of it."""
    x_MH, half = given.tokens.hidden_states.double().abs(), torch.finfo(given.dtype).eps / 2
    addends_ME = x_MH @ given.exact["router_weight"].abs().T
    if given.spec.vision is not None:
        addends_ME = torch.maximum(addends_ME, x_MH @ given.exact["vision_router_weight"].abs().T)
    if given.spec.routing.router_norm_epsilon is not None:
        addends_ME = x_MH.shape[1] ** 0.5 * given.stages.logits_ME.abs().amax(-1, keepdim=True).expand_as(addends_ME)
    u = half if precision.logits == "model" else 2.0**-24
    normed = half if given.spec.routing.router_norm_epsilon is not None else 0.0
    return (_LOGITS * u + x_MH.shape[1] * 2.0**-24 + 4 * normed) * addends_ME


def _same_sets(found_MK: Tensor, law_MK: Tensor) -> bool:
    return torch.equal(found_MK.sort(-1).values.long(), law_MK.sort(-1).values)


def _weights_right(
    given: Problem, told: Mapping[str, Tensor], found_MK: Tensor, delta_ME: Tensor, decided_M: Tensor
) -> bool:
    """By expert, with s or without: whoever scales is another stage's business."""
    ids_MK, stages = told.get("topk_ids"), given.stages
    if ids_MK is None or not _same_sets(ids_MK[decided_M], stages.topk_ids_MK[decided_M]):
        return True  # whose weight is whose cannot be told
    law_MK = stages.topk_weights_MK.gather(1, stages.topk_ids_MK.argsort(-1))
    found_MK = found_MK.double().gather(1, ids_MK.long().argsort(-1))
    u = torch.finfo(given.dtype).eps / 2
    off_M1 = delta_ME.amax(-1, keepdim=True) + _WEIGHTS * u
    return any(
        bool(((found_MK / scale - law_MK).abs() <= off_M1 * law_MK.abs().amax(-1, keepdim=True))[decided_M].all())
        for scale in {1.0, given.spec.scale}
    )


def _part_right(given: Problem, law_MH: Tensor, naive_M: Tensor, decided_M: Tensor, found_MH: Tensor) -> bool:
    limit_M = RUN_LIMIT * naive_M + 16 * torch.finfo(given.dtype).eps * law_MH.norm(dim=-1)
    return any(
        bool(((found_MH.double() / scale - law_MH).norm(dim=-1) <= limit_M)[decided_M].all())
        for scale in {1.0, given.spec.scale}
    )
