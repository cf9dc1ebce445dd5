"""How the chosen experts are weighed: scores, their normalisation, and where and how often a weight is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from harness.problem import Problem
from harness.variants.law import Variant, with_rule, with_weights

# What a wrong router makes of the lawful weights [M, K]: the family, the sentence, the function.
_WEIGHINGS: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("D10", "the router weight is applied twice (squared)", lambda w: w * w),
    ("D11", "every chosen expert has the same weight 1/K", lambda w: torch.full_like(w, 1 / w.shape[1])),
    ("D6", "the weights go through a softmax over the K chosen once more", lambda w: w.softmax(-1)),
    ("D6", "the weights are divided by their largest", lambda w: w / w.amax(-1, keepdim=True)),
    ("D6", "the weights are divided by their length, not by their sum", lambda w: w / w.norm(dim=-1, keepdim=True)),
)  # fmt: skip


def scores(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """Normalised or not, scored by another function, or not scored."""
    rule, stages = given.spec.routing, given.stages

    def wrong(family: str, sentence: str, **changes: object) -> Variant:
        return with_rule(given, picks_MK, family, "topk_weights", sentence, **changes)

    flipped = "not renormalised" if rule.renormalize else "renormalised although the model does not"
    yield wrong("D6", f"the weights are {flipped}", renormalize=not rule.renormalize, renormalize_epsilon=1e-20)
    if rule.scoring_func != "sparsemixer":
        for other in ("softmax", "sigmoid", "sqrtsoftplus"):
            if other != rule.scoring_func:
                yield wrong("D8", f"scored by {other} instead of {rule.scoring_func}", scoring_func=other)
        order = "chosen after scoring" if rule.score_after_topk else "chosen before scoring"
        if not rule.correction_bias and rule.n_group == 1:
            yield wrong("D8", f"the experts are {order}", score_after_topk=not rule.score_after_topk)
    else:
        yield wrong("D8", "plain softmax instead of sparsemixer", scoring_func="softmax", sparsemixer_epsilon=None)
        width = rule.sparsemixer_epsilon or 0.0
        for factor, word in ((0.5, "half"), (2.0, "twice")):
            yield wrong("D8", f"sparsemixer's mask is {word} as wide", sparsemixer_epsilon=width * factor)
    if given.spec.vision is None:
        raw = "the raw logits are the weights"
        yield _weighed(given, "D7", raw, lambda: stages.logits_ME.gather(1, stages.topk_ids_MK))


def uses(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """The weight is not used, or at the other side of the expert."""
    rule, weights_MK = given.spec.routing, given.stages.topk_weights_MK
    yield _weighed(given, "D11", "the router weights are not used", partial(torch.ones_like, weights_MK))
    if rule.top_k == 1:
        side = "output" if rule.weight_on == "input" else "input"
        other = f"the weight multiplies the expert's {side}, not its {rule.weight_on}"
        yield with_rule(given, picks_MK, "D10", "topk_weights", other, weight_on=side)


def scale(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """The learned factor of each expert, where a model has it."""
    if given.spec.routing.per_expert_scale:
        dropped = "the per-expert scale is dropped"
        yield with_rule(given, picks_MK, "D6", "topk_weights", dropped, per_expert_scale=False)


def other_weights(given: Problem) -> Iterator[Variant]:
    """Lawful experts with other weights."""
    rule, stages = given.spec.routing, given.stages
    ids_MK, weights_MK = stages.topk_ids_MK, stages.topk_weights_MK
    for family, sentence, weigh in _WEIGHINGS:
        yield _weighed(given, family, sentence, partial(weigh, weights_MK))
    if given.spec.scale != 1.0:
        squared = "the router weight, with s in it, is applied twice (squared)"
        yield _weighed(given, "D10", squared, lambda: given.spec.scale * weights_MK.square())
    if rule.top_k <= 1 or rule.scoring_func == "sparsemixer":
        return
    if rule.renormalize and rule.scoring_func != "softmax":
        total = "the weights are divided by the sum over all experts, not over the K chosen"
        yield _weighed(
            given, "D6", total, lambda: stages.scores_ME.gather(1, ids_MK) / stages.scores_ME.sum(-1, keepdim=True)
        )
    if not (rule.scoring_func == "softmax" and (rule.renormalize or rule.score_after_topk)):
        over_k = "the weights are a softmax over the logits of the K chosen"
        yield _weighed(given, "D8", over_k, lambda: stages.logits_ME.gather(1, ids_MK).softmax(-1))


def final_weights(given: Problem) -> Iterator[Variant]:
    """What is done once more to weights that are final, or done too early."""
    rule, stages = given.spec.routing, given.stages
    weights_MK = stages.topk_weights_MK
    if rule.per_expert_scale or rule.scoring_func == "sparsemixer":
        normalised = "the final weights are normalised to a sum of 1"
        yield _weighed(given, "D6", normalised, lambda: weights_MK / weights_MK.sum(-1, keepdim=True))
    if rule.per_expert_scale:
        twice = "the per-expert scale is applied twice"
        yield _weighed(given, "D6", twice, lambda: weights_MK * given.exact["per_expert_scale"][stages.topk_ids_MK])
    if given.dtype is torch.float32:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            rounded = f"the router weights are rounded to {name}"
            yield _weighed(given, "D9", rounded, partial(_rounded, weights_MK, dtype))


def _rounded(weights_MK: Tensor, dtype: torch.dtype) -> Tensor:
    return weights_MK.float().to(dtype).double()


def _weighed(given: Problem, family: str, sentence: str, weigh: Callable[[], Tensor]) -> Variant:
    return Variant(family, "topk_weights", sentence, lambda: with_weights(given, weigh()))
