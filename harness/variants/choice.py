"""Who is chosen: the logits, the correction bias, how many experts, and what they are ranked by. Groups: groups.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.problem import Problem
from harness.variants.law import Variant, run, weights_of, with_rule, with_tensor, with_weights
from reference.moe import Choice, Stages, rank_scores, renormalize, router_logits, score, select_experts

# What becomes of the correction bias [E].
_BIASES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("is subtracted", torch.neg),
    ("is added twice", lambda b: 2 * b),
    ("is halved", lambda b: b / 2),
    ("belongs to the expert before", lambda b: b.roll(1)),
    ("belongs to the expert after", lambda b: b.roll(-1)),
)

_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def correction_bias(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """It takes part in the choice and never in the weights."""
    if not given.spec.routing.correction_bias:
        return
    one_branch, name = given.spec.vision is None, "e_score_correction_bias"
    if one_branch:
        yield Variant(
            "D1", "topk_weights", "the correction bias is in the weights; it may only choose the experts",
            partial(_biased_weights, given),
        )  # fmt: skip
    yield with_rule(given, picks_MK, "D2", "topk_ids", "the correction bias is dropped", correction_bias=False)
    if one_branch:
        yield Variant(
            "D3", "topk_ids", "the correction bias is rounded to bf16",
            partial(with_tensor, given, name, lambda b: b.bfloat16().double()),
        )  # fmt: skip
    for what, change in _BIASES:
        yield Variant("D2", "topk_ids", f"the correction bias {what}", partial(with_tensor, given, name, change))
    if one_branch:
        yield Variant(
            "D1", "logits", "the correction bias is added to the logits, before they are scored",
            partial(_bias_on_logits, given),
        )  # fmt: skip


def rounded_logits(given: Problem, dtype: torch.dtype) -> Iterator[Variant]:
    """The router computes in a shorter dtype than its model says."""
    yield Variant(
        "D9", "logits", f"the router logits are rounded to {_FORMATS[dtype]}", partial(_rounded_logits, given, dtype)
    )


def counts(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """One expert too few or too many for each token."""
    top_k, wrong = given.spec.routing.top_k, partial(with_rule, given, picks_MK, "D13", "topk_ids")
    if top_k != 1:
        yield wrong("one expert too few is chosen", top_k=top_k - 1)
    yield wrong("one expert too many is chosen", top_k=top_k + 1)
    yield wrong("every expert is chosen", top_k=given.spec.routing.num_experts)
    if top_k != 1 and given.spec.vision is None:
        yield Variant("G6", "topk_ids", "the first choice of a token is all its choices", partial(_first_again, given))
    shared, width = given.spec.shared, given.spec.experts.intermediate_size
    if shared is not None and given.spec.vision is None and shared.intermediate_size % width == 0:
        more = shared.intermediate_size // width
        slot = f"{more} more routed expert{'s take' if more > 1 else ' takes'} the place of the shared experts"
        yield Variant("E3", "output", slot, partial(_in_place_of_shared, given, more))


def router_terms(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """What some routers do beside the product with their matrix."""
    rule, wrong = given.spec.routing, partial(with_rule, given, picks_MK)
    if rule.router_bias:
        yield wrong("D2", "logits", "the router's bias is dropped", router_bias=False)
    if rule.router_norm_epsilon is not None:
        yield wrong("D9", "logits", "the router reads the token without its norm", router_norm_epsilon=None)


def rankings(given: Problem) -> Iterator[Variant]:
    """Other experts by another ranking."""
    rule, stages = given.spec.routing, given.stages
    if rule.top_k > 1 and rule.scoring_func != "sparsemixer":
        yield Variant(
            "D13", "topk_ids", "the best expert is passed over: the second to the one after the last are chosen",
            lambda: ranked_by(given, _without_best(ranking(given))),
        )  # fmt: skip
        yield Variant(
            "D13", "topk_ids", "the lowest scores are chosen, not the highest",
            lambda: ranked_by(given, -ranking(given)),
        )  # fmt: skip
    if rule.correction_bias:
        by_logits = "the experts are chosen by logit + correction bias, not by score + correction bias"
        bias_E = given.exact["e_score_correction_bias"]
        yield Variant(
            "D2",
            "topk_ids",
            by_logits,
            lambda: ranked_by(given, rank_scores(stages.logits_ME, stages.logits_ME, bias_E, rule)),
        )


def ranking(given: Problem) -> Tensor:
    """What the choice compares before groups are dropped, [M, E]."""
    stages, routing = given.stages, replace(given.spec.routing, n_group=1, topk_group=1)
    return rank_scores(stages.logits_ME, stages.scores_ME, given.exact.get("e_score_correction_bias"), routing)


def ranked_by(given: Problem, ranked_ME: Tensor) -> Stages:
    """The law with the K best of another ranking."""
    stages, routing = given.stages, given.spec.routing
    best = ranked_ME.topk(min(routing.top_k + 1, ranked_ME.shape[1]), -1)
    ids_MK = best.indices[:, : routing.top_k]
    weights_MK = weights_of(given, routing, stages.logits_ME, stages.scores_ME, ids_MK)
    margin_M = torch.nan_to_num(best.values[:, -2] - best.values[:, -1], nan=torch.inf, posinf=torch.inf)
    return run(given, choice=Choice(ids_MK, weights_MK, margin_M))


def _first_again(given: Problem) -> Stages:
    stages = given.stages
    ids_MK, weights_MK = (t[:, :1].expand_as(t).contiguous() for t in (stages.topk_ids_MK, stages.topk_weights_MK))
    return run(given, choice=Choice(ids_MK, weights_MK, stages.margin_M))


def _in_place_of_shared(given: Problem, more: int) -> Stages:
    """R over more experts, and no S."""
    spec = given.spec
    routing = replace(spec.routing, top_k=spec.routing.top_k + more)
    stages = run(given, spec=replace(spec, routing=routing))
    return replace(stages, output_MH=stages.output_MH - spec.output.share * stages.shared_MH)


def _without_best(ranked_ME: Tensor) -> Tensor:
    return ranked_ME.scatter(1, ranked_ME.argmax(-1, keepdim=True), -torch.inf)


def _biased_weights(given: Problem) -> Stages:
    stages, routing = given.stages, given.spec.routing
    biased_ME = stages.scores_ME + given.exact["e_score_correction_bias"]
    return with_weights(given, renormalize(biased_ME.gather(1, stages.topk_ids_MK), routing))


def _bias_on_logits(given: Problem) -> Stages:
    spec, weights = given.spec, dict(given.exact)
    bias_E = weights.pop("e_score_correction_bias")
    weights["router_bias"] = weights.get("router_bias", 0) + bias_E
    routing = replace(spec.routing, correction_bias=False, router_bias=True)
    return run(given, spec=replace(spec, routing=routing), weights=weights)


def _rounded_logits(given: Problem, dtype: torch.dtype) -> Stages:
    routing = given.spec.routing
    weights = given.exact
    logits_ME = router_logits(given.tokens.hidden_states.double(), weights, routing).to(dtype).double()
    chosen = select_experts(logits_ME, score(logits_ME, routing), weights.get("e_score_correction_bias"), routing)
    if routing.per_expert_scale:
        weights_MK = chosen.topk_weights_MK * weights["per_expert_scale"][chosen.topk_ids_MK]
        chosen = replace(chosen, topk_weights_MK=weights_MK)
    return run(given, choice=chosen)
