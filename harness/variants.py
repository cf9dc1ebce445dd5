"""Wrong laws: each one is what a layer computes that gets a single rule of its model wrong.

A variant is the oracle itself with one field of the spec, one tensor or the choice of experts replaced. Diagnosis asks
which of them explains an output that the law does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.problem import Problem
from reference.moe import (
    Choice,
    Stages,
    forward,
    rank_scores,
    renormalize,
    router_logits,
    score,
    select_experts,
    shared_experts,
)  # fmt: skip
from reference.spec import Activation, MoESpec, Routing


@dataclass(frozen=True, slots=True)
class Variant:
    """family: as in docs/faults.md.    stage: where the wrong rule sits.    sentence: what the layer does.

    compute: Stages of the wrong law.
    """

    family: str
    stage: str
    sentence: str
    compute: Callable[[], Stages]


def variants(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """Every wrong law that differs from this layer's, the commonest first.

    picks_MK: the experts that an output must come from, if known: they decide where a wrong law leaves exact ties.
    """
    yield from _routing(given, picks_MK)
    yield from _experts(given)
    if given.spec.shared is not None:
        yield from _shared(given)


def _routing(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    rule = given.spec.routing

    def with_rule(family: str, sentence: str, **changes: object) -> Variant:
        return Variant(family, "topk_weights", sentence, lambda: _with_routing(given, picks_MK, **changes))

    if rule.correction_bias:
        if given.spec.vision is None:
            yield Variant(
                "D1", "topk_weights", "the correction bias is in the weights; it may only choose the experts",
                lambda: _biased_weights(given),
            )  # fmt: skip
        yield replace(with_rule("D2", "the correction bias is dropped", correction_bias=False), stage="topk_ids")
        if given.spec.vision is None:
            yield Variant(
                "D3", "topk_ids", "the correction bias is rounded to bf16",
                lambda: _with_tensor(given, "e_score_correction_bias", lambda b: b.bfloat16().double()),
            )  # fmt: skip
    if rule.n_group > 1:
        fill = "experts of dropped groups get 0 instead of -inf, which beats a negative biased score"
        yield replace(with_rule("D5", fill, group_fill=0.0), stage="topk_ids")
        yield replace(with_rule("D5", "the expert groups are ignored", n_group=1, topk_group=1), stage="topk_ids")
        other = "max" if rule.group_score == "top2" else "top2"
        yield replace(with_rule("D5", f"groups are ranked by {other}", group_score=other), stage="topk_ids")
    flipped = "not renormalised" if rule.renormalize else "renormalised although the model does not"
    yield with_rule("D6", f"the weights are {flipped}", renormalize=not rule.renormalize, renormalize_epsilon=1e-20)
    if rule.scoring_func != "sparsemixer":
        for other in ("softmax", "sigmoid", "sqrtsoftplus"):
            if other != rule.scoring_func:
                yield with_rule("D8", f"scored by {other} instead of {rule.scoring_func}", scoring_func=other)
        order = "chosen after scoring" if rule.score_after_topk else "chosen before scoring"
        if not rule.correction_bias and rule.n_group == 1:
            yield with_rule("D8", f"the experts are {order}", score_after_topk=not rule.score_after_topk)
    else:
        yield with_rule("D8", "plain softmax instead of sparsemixer", scoring_func="softmax", sparsemixer_epsilon=None)
    if given.spec.vision is None:
        yield Variant("D7", "topk_weights", "the raw logits are the weights", lambda: _logits_as_weights(given))
        yield Variant("D9", "logits", "the router logits are rounded to bf16", lambda: _rounded_logits(given))
    yield Variant("D11", "topk_weights", "the router weights are not used", lambda: _weights_of_one(given))
    if rule.top_k == 1:
        side = "output" if rule.weight_on == "input" else "input"
        yield with_rule("D10", f"the weight multiplies the expert's {side}, not its {rule.weight_on}", weight_on=side)
    else:
        yield replace(with_rule("D13", "one expert too few is chosen", top_k=rule.top_k - 1), stage="topk_ids")
    if rule.per_expert_scale:
        yield with_rule("D6", "the per-expert scale is dropped", per_expert_scale=False)
    if rule.router_bias:
        yield replace(with_rule("D2", "the router's bias is dropped", router_bias=False), stage="logits")
    if rule.router_norm_epsilon is not None:
        yield replace(
            with_rule("D9", "the router reads the token without its norm", router_norm_epsilon=None), stage="logits"
        )


def _experts(given: Problem) -> Iterator[Variant]:
    experts = given.spec.experts
    act = experts.activation

    def with_act(family: str, sentence: str, **changes: object) -> Variant:
        return Variant(family, "routed", sentence, lambda: _with_activation(given, **changes))

    if act.gated:
        yield Variant(
            "F1", "routed", "gate and up are exchanged in the routed experts", lambda: _exchanged(given, "w13", "b13")
        )
        other = "halved" if experts.layout == "interleaved" else "interleaved"
        yield Variant(
            "F2", "routed", f"w13 is read as {other}, it is stored {experts.layout}",
            lambda: _with_experts(given, layout=other),
        )  # fmt: skip
    if act.clamp != "none":
        other = "after" if act.clamp == "before" else "before"
        yield with_act("F3", "the routed experts are not clamped", clamp="none", limit=None)
        yield with_act("F3", f"the clamp stands {other} the activation, not {act.clamp} it", clamp=other)
    if act.alpha != 1.0:
        yield with_act("F3", f"alpha={act.alpha} of the activation is dropped", alpha=1.0)
    if act.up_offset:
        yield with_act("F3", f"the up half is taken without its +{act.up_offset:g}", up_offset=0.0)
    if experts.bias:
        yield Variant(
            "F4", "routed", "the second expert bias is not multiplied by the router weight", lambda: _plain_bias(given)
        )
        yield Variant(
            "F5", "routed", "the first expert bias is dropped", lambda: _with_tensor(given, "b13", torch.zeros_like)
        )
    for kind in ("silu", "gelu", "gelu_tanh", "relu2"):
        if kind != act.kind:
            yield with_act("F6", f"the routed experts use {kind} instead of {act.kind}", kind=kind, alpha=1.0)


def _shared(given: Problem) -> Iterator[Variant]:
    shared = given.spec.shared
    assert shared is not None
    act = shared.activation

    def with_shared(family: str, sentence: str, **changes: object) -> Variant:
        spec = replace(given.spec, shared=replace(shared, **changes))  # type: ignore[arg-type]
        return Variant(family, "shared", sentence, lambda: _run(given, spec=spec))

    if shared.sigmoid_gate:
        yield with_shared("E1", "the shared experts' sigmoid gate is dropped", sigmoid_gate=False)
    yield Variant(
        "C1", "shared", "the shared experts read a buffer that holds R", lambda: _shared_reads(given, given.spec.scale)
    )
    if given.spec.scale != 1.0:
        yield Variant(
            "C1", "shared", "the shared experts read a buffer that holds R", lambda: _shared_reads(given, 1.0)
        )
    if act.clamp != "none":
        plain = replace(act, clamp="none", limit=None)
        yield with_shared("E5", "the shared experts are not clamped", activation=plain)
        limit = given.spec.experts.activation.limit
        if limit is not None and limit != act.limit:
            yield with_shared(
                "E5", "the shared experts use the routed experts' limit", activation=replace(act, limit=limit)
            )
    if act.gated:
        yield Variant(
            "F1", "shared", "gate and up are exchanged in the shared experts", lambda: _exchanged(given, "shared_w13")
        )
    if act.gated and given.spec.experts.activation.gated:
        names = ("w13", "b13", "shared_w13", "shared_b13")
        both = "gate and up are exchanged in the routed and in the shared experts"
        yield Variant("F1", "routed", both, lambda: _exchanged(given, *names))
    for kind in ("silu", "gelu", "gelu_tanh", "relu2"):
        if kind != act.kind:
            yield with_shared(
                "F6",
                f"the shared experts use {kind} instead of {act.kind}",
                activation=replace(act, kind=kind, alpha=1.0),
            )
    if shared.bias:
        yield Variant(
            "F5",
            "shared",
            "the first shared bias is dropped",
            lambda: _with_tensor(given, "shared_b13", torch.zeros_like),
        )


def _run(
    given: Problem,
    *,
    spec: MoESpec | None = None,
    weights: dict[str, Tensor] | None = None,
    choice: Choice | None = None,
) -> Stages:
    x_MH, is_vision = given.tokens.hidden_states, given.tokens.is_vision
    return forward(spec or given.spec, weights or given.exact, x_MH, is_vision_M=is_vision, choice=choice)


def _with_routing(given: Problem, picks_MK: Tensor | None, **changes: object) -> Stages:
    spec = given.spec

    def changed(routing: Routing) -> Routing:
        return replace(routing, **changes)  # type: ignore[arg-type]

    vision = spec.vision and replace(spec.vision, routing=changed(spec.vision.routing))
    wrong = replace(spec, routing=changed(spec.routing), vision=vision)
    if picks_MK is None or vision is not None or wrong.routing.top_k != picks_MK.shape[1]:
        return _run(given, spec=wrong)
    return _run(given, spec=wrong, choice=_ties_as_picked(given, wrong.routing, picks_MK))


def _ties_as_picked(given: Problem, routing: Routing, picks_MK: Tensor) -> Choice:
    """The choice of a wrong router; among exact ties, which groups filled with one value have, it is the picks."""
    weights = given.exact
    logits_ME = router_logits(given.tokens.hidden_states.double(), weights, routing)
    scores_ME = score(logits_ME, routing)
    bias_E = weights["e_score_correction_bias"] if routing.correction_bias else None
    own = select_experts(logits_ME, scores_ME, bias_E, routing)
    if routing.scoring_func == "sparsemixer":
        return own
    ranked_ME = rank_scores(logits_ME, scores_ME, bias_E, routing)
    least_M1 = ranked_ME.gather(1, own.topk_ids_MK[:, -1:])
    tied_M1 = (ranked_ME.gather(1, picks_MK) >= least_M1).all(-1, keepdim=True)
    ids_MK = torch.where(tied_M1, picks_MK, own.topk_ids_MK)
    weights_MK = (
        score(logits_ME.gather(1, ids_MK), routing) if routing.score_after_topk else scores_ME.gather(1, ids_MK)
    )
    weights_MK = renormalize(weights_MK, routing)
    if routing.per_expert_scale:
        weights_MK = weights_MK * weights["per_expert_scale"][ids_MK]
    return Choice(ids_MK, weights_MK, own.margin_M.masked_fill(tied_M1[:, 0], torch.inf))


def _with_experts(given: Problem, **changes: object) -> Stages:
    spec = given.spec
    vision = spec.vision and replace(spec.vision, experts=replace(spec.vision.experts, **changes))  # type: ignore[arg-type]
    return _run(given, spec=replace(spec, experts=replace(spec.experts, **changes), vision=vision))  # type: ignore[arg-type]


def _with_activation(given: Problem, **changes: object) -> Stages:
    changed: Activation = replace(given.spec.experts.activation, **changes)  # type: ignore[arg-type]
    return _with_experts(given, activation=changed)


def _with_tensor(given: Problem, name: str, change: Callable[[Tensor], Tensor]) -> Stages:
    weights = {n: change(t) if n.removeprefix("vision_") == name else t for n, t in given.exact.items()}
    return _run(given, weights=weights)


def _exchanged(given: Problem, *names: str) -> Stages:
    def exchange(name: str, stored: Tensor) -> Tensor:
        experts = given.spec.experts
        routed = not name.startswith("shared_")
        dim = stored.dim() - 1 if name.endswith("b13") or (routed and experts.transposed) else stored.dim() - 2
        if routed and experts.layout == "interleaved":
            return stored.unflatten(dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1)
        return stored.unflatten(dim, (2, -1)).flip(dim).flatten(dim, dim + 1)

    weights = {n: exchange(n, t) if n.removeprefix("vision_") in names else t for n, t in given.exact.items()}
    return _run(given, weights=weights)


def _biased_weights(given: Problem) -> Stages:
    stages, routing = given.stages, given.spec.routing
    biased_ME = stages.scores_ME + given.exact["e_score_correction_bias"]
    weights_MK = renormalize(biased_ME.gather(1, stages.topk_ids_MK), routing)
    return _run(given, choice=Choice(stages.topk_ids_MK, weights_MK, stages.margin_M))


def _logits_as_weights(given: Problem) -> Stages:
    stages = given.stages
    weights_MK = stages.logits_ME.gather(1, stages.topk_ids_MK)
    return _run(given, choice=Choice(stages.topk_ids_MK, weights_MK, stages.margin_M))


def _weights_of_one(given: Problem) -> Stages:
    stages = given.stages
    return _run(given, choice=Choice(stages.topk_ids_MK, torch.ones_like(stages.topk_weights_MK), stages.margin_M))


def _rounded_logits(given: Problem) -> Stages:
    routing = given.spec.routing
    weights = given.exact
    logits_ME = router_logits(given.tokens.hidden_states.double(), weights, routing).bfloat16().double()
    chosen = select_experts(logits_ME, score(logits_ME, routing), weights.get("e_score_correction_bias"), routing)
    if routing.per_expert_scale:
        weights_MK = chosen.topk_weights_MK * weights["per_expert_scale"][chosen.topk_ids_MK]
        chosen = replace(chosen, topk_weights_MK=weights_MK)
    return _run(given, choice=chosen)


def _plain_bias(given: Problem) -> Stages:
    """R with sum of b2 in place of the weighted sum: the unweighted bias stands beside experts without one."""
    stages = given.stages
    ones = Choice(stages.topk_ids_MK, torch.ones_like(stages.topk_weights_MK), stages.margin_M)
    no_products = {n: torch.zeros_like(t) if n.removeprefix("vision_") == "w2" else t for n, t in given.exact.items()}
    bias_MH = _run(given, weights=no_products, choice=ones).routed_MH
    plain = _with_tensor(given, "b2", torch.zeros_like)
    output_MH = plain.output_MH + bias_MH * given.spec.scale * given.spec.output.share
    return replace(plain, output_MH=output_MH)


def _shared_reads(given: Problem, scale: float) -> Stages:
    shared, stages = given.spec.shared, given.stages
    assert shared is not None
    weights = given.exact
    wrong_MH = shared_experts(stages.routed_MH * scale, weights, shared)
    output_MH = stages.output_MH + (wrong_MH - stages.shared_MH) * given.spec.output.share
    return replace(stages, output_MH=output_MH)
