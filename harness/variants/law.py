"""What a wrong law is, and the oracle with another rule, choice, tensor or part: what every module here builds on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.problem import Problem
from reference.moe import Choice, Stages, forward, rank_scores, renormalize, router_logits, score, select_experts
from reference.spec import Activation, MoESpec, Routing

# What experts compute between their two products, from gate [*, I] and up [*, I] (None without a gate).
Act = Callable[[Tensor, Tensor | None, Activation], Tensor]


@dataclass(frozen=True, slots=True)
class Variant:
    """family: as in docs/faults.md.    stage: where the wrong rule sits.    sentence: what the layer does.

    compute: Stages of the wrong law.
    """

    family: str
    stage: str
    sentence: str
    compute: Callable[[], Stages]

    @property
    def routes(self) -> bool:
        """The router is wrong: the output still is a sum of the lawful experts' outputs."""
        return self.stage in ("logits", "topk_ids", "topk_weights")


def run(
    given: Problem,
    *,
    spec: MoESpec | None = None,
    weights: dict[str, Tensor] | None = None,
    choice: Choice | None = None,
    is_vision_M: Tensor | None = None,
) -> Stages:
    """The oracle on the problem's tokens, with what is given in place of the problem's own."""
    x_MH, is_vision_M = given.tokens.hidden_states, given.tokens.is_vision if is_vision_M is None else is_vision_M
    return forward(spec or given.spec, weights or given.exact, x_MH, is_vision_M=is_vision_M, choice=choice)


def with_rule(
    given: Problem, picks_MK: Tensor | None, family: str, stage: str, sentence: str, **changes: object
) -> Variant:
    """The law with fields of the routing rule changed, in both branches where images have their own."""
    return Variant(family, stage, sentence, partial(_with_routing, given, picks_MK, **changes))


def with_weights(given: Problem, weights_MK: Tensor) -> Stages:
    """The law with other weights for the lawful experts."""
    stages = given.stages
    return run(given, choice=Choice(stages.topk_ids_MK, weights_MK, stages.margin_M))


def weights_of(given: Problem, routing: Routing, logits_ME: Tensor, scores_ME: Tensor, ids_MK: Tensor) -> Tensor:
    """The weights [M, K] that a rule gives to experts, whoever chose them."""
    if routing.score_after_topk:
        weights_MK = score(logits_ME.gather(1, ids_MK), routing)
    else:
        weights_MK = scores_ME.gather(1, ids_MK)
    weights_MK = renormalize(weights_MK, routing)
    if routing.per_expert_scale:
        weights_MK = weights_MK * given.exact["per_expert_scale"][ids_MK]
    return weights_MK


def with_tensor(given: Problem, name: str, change: Callable[[Tensor], Tensor]) -> Stages:
    """The law with one tensor changed, in both branches where images have their own."""
    weights = {n: change(t) if n.removeprefix("vision_") == name else t for n, t in given.exact.items()}
    return run(given, weights=weights)


def with_parts(given: Problem, *, routed_MH: Tensor | None = None, shared_MH: Tensor | None = None) -> Stages:
    """The law with another R or another S."""
    stages, spec = given.stages, given.spec
    new_r, new_s = (
        (stages.routed_MH if routed_MH is None else routed_MH),
        (stages.shared_MH if shared_MH is None else shared_MH),
    )
    change_MH = spec.scale * (new_r - stages.routed_MH) + new_s - stages.shared_MH
    return replace(stages, routed_MH=new_r, shared_MH=new_s, output_MH=stages.output_MH + spec.output.share * change_MH)


def exchanged(given: Problem, *names: str) -> Stages:
    """The law with gate and up exchanged in these tensors."""

    def exchange(name: str, stored: Tensor) -> Tensor:
        experts = given.spec.experts
        routed = not name.startswith("shared_")
        dim = stored.dim() - 1 if name.endswith("b13") or (routed and experts.transposed) else stored.dim() - 2
        if routed and experts.layout == "interleaved":
            return stored.unflatten(dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1)
        return stored.unflatten(dim, (2, -1)).flip(dim).flatten(dim, dim + 1)

    weights = {n: exchange(n, t) if n.removeprefix("vision_") in names else t for n, t in given.exact.items()}
    return run(given, weights=weights)


def halves_of(h: Tensor, rule: Activation, *, interleaved: bool) -> tuple[Tensor, Tensor | None]:
    """Gate and up of a first product [*, 2I]; the product itself and None without a gate."""
    if not rule.gated:
        return h, None
    gate, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, -1)
    return gate, up


def _with_routing(given: Problem, picks_MK: Tensor | None, **changes: object) -> Stages:
    spec = given.spec

    def changed(routing: Routing) -> Routing:
        return replace(routing, **changes)  # type: ignore[arg-type]

    vision = spec.vision and replace(spec.vision, routing=changed(spec.vision.routing))
    wrong = replace(spec, routing=changed(spec.routing), vision=vision)
    if picks_MK is None or vision is not None or wrong.routing.top_k != picks_MK.shape[1]:
        return run(given, spec=wrong)
    return run(given, spec=wrong, choice=ties_as_picked(given, wrong.routing, picks_MK))


def ties_as_picked(
    given: Problem, routing: Routing, picks_MK: Tensor | None, logits_ME: Tensor | None = None
) -> Choice:
    """The choice of a wrong router; among exact ties, which groups filled with one value have, it is the picks.

    logits_ME: those of the rule by default.
    """
    weights = given.exact
    if logits_ME is None:
        logits_ME = router_logits(given.tokens.hidden_states.double(), weights, routing)
    scores_ME = score(logits_ME, routing)
    bias_E = weights["e_score_correction_bias"] if routing.correction_bias else None
    own = select_experts(logits_ME, scores_ME, bias_E, routing)
    if routing.per_expert_scale:
        own = replace(own, topk_weights_MK=own.topk_weights_MK * weights["per_expert_scale"][own.topk_ids_MK])
    if routing.scoring_func == "sparsemixer" or picks_MK is None:
        return own
    ranked_ME = rank_scores(logits_ME, scores_ME, bias_E, routing)
    least_M1 = ranked_ME.gather(1, own.topk_ids_MK[:, -1:])
    tied_M1 = (ranked_ME.gather(1, picks_MK) >= least_M1).all(-1, keepdim=True)
    ids_MK = torch.where(tied_M1, picks_MK, own.topk_ids_MK)
    weights_MK = weights_of(given, routing, logits_ME, scores_ME, ids_MK)
    return Choice(ids_MK, weights_MK, own.margin_M.masked_fill(tied_M1[:, 0], torch.inf))
