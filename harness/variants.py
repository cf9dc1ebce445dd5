"""Wrong laws: each one is what a layer computes that gets a single rule of its model wrong.

A variant is the oracle itself with one field of the spec, one tensor or the choice of experts replaced. Diagnosis asks
which of them explains an output that the law does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from harness.parts import shares
from harness.problem import Problem
from reference.moe import (
    Choice,
    Stages,
    activate,
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

    @property
    def routes(self) -> bool:
        """The router is wrong: the output still is a sum of the lawful experts' outputs."""
        return self.stage in ("logits", "topk_ids", "topk_weights")


def variants(given: Problem, picks_MK: Tensor | None, tp: int) -> Iterator[Variant]:
    """Every wrong law that differs from this layer's, the commonest first.

    picks_MK: the experts that an output must come from, if known: they decide where a wrong law leaves exact ties.
    """
    yield from _routing(given, picks_MK)
    if given.spec.vision is None:
        yield from _more_routing(given)
    shared = () if given.spec.shared is None else _shared(given, tp)
    yield from _in_both(given, [*_experts(given), *shared, *_activations(given), *_slices(given, tp)])
    if given.spec.vision is not None:
        yield from _modalities(given)


def _in_both(given: Problem, variants: Sequence[Variant]) -> Iterator[Variant]:
    """The given ones, and each that routed and shared experts can have alike in both: one loader or kernel serves them."""
    kept = [replace(variant, compute=cache(variant.compute)) for variant in variants]
    by_sentence = {variant.sentence: variant for variant in kept}
    for variant in kept:
        yield variant
        sentence = variant.sentence
        twin = by_sentence.get(sentence.replace("the routed experts", "the shared experts"))
        if twin is not None and twin is not variant:
            both = sentence.replace("the routed experts", "the routed and the shared experts")
            yield replace(variant, stage="output", sentence=both, compute=partial(_sum_of, given, variant, twin))


def _sum_of(given: Problem, one: Variant, other: Variant) -> Stages:
    """Two variants at once, one of R and one of S."""
    first, second = one.compute(), other.compute()
    return replace(first, output_MH=first.output_MH + second.output_MH - given.stages.output_MH)


def _modalities(given: Problem) -> Iterator[Variant]:
    is_vision_M = given.tokens.is_vision
    assert is_vision_M is not None
    for sentence, wrong_M in (
        ("image tokens take the text branch and text tokens the image branch", ~is_vision_M),
        ("all tokens take the text branch", torch.zeros_like(is_vision_M)),
        ("all tokens take the image branch", torch.ones_like(is_vision_M)),
    ):
        yield Variant("H3", "output", sentence, partial(_run, given, is_vision_M=wrong_M))


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
        changes: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
            ("is subtracted", torch.neg),
            ("is added twice", lambda b: 2 * b),
            ("is halved", lambda b: b / 2),
            ("belongs to the expert before", lambda b: b.roll(1)),
            ("belongs to the expert after", lambda b: b.roll(-1)),
        )
        for what, change in changes:
            yield Variant(
                "D2", "topk_ids", f"the correction bias {what}",
                partial(_with_tensor, given, "e_score_correction_bias", change),
            )  # fmt: skip
        if given.spec.vision is None:
            yield Variant(
                "D1", "logits", "the correction bias is added to the logits, before they are scored",
                lambda: _bias_on_logits(given),
            )  # fmt: skip
    if rule.n_group > 1:
        for sentence, choose in _GROUPINGS.items():
            yield Variant("D5", "topk_ids", sentence, partial(_grouped, given, choose))
        for step, word in ((1, "many"), (-1, "few")):
            kept = rule.topk_group + step
            yield replace(with_rule("D5", f"one group too {word} is kept", topk_group=kept), stage="topk_ids")
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
        width = rule.sparsemixer_epsilon or 0.0
        for factor, word in ((0.5, "half"), (2.0, "twice")):
            yield with_rule("D8", f"sparsemixer's mask is {word} as wide", sparsemixer_epsilon=width * factor)
    if given.spec.vision is None:
        yield Variant("D7", "topk_weights", "the raw logits are the weights", lambda: _logits_as_weights(given))
        yield Variant("D9", "logits", "the router logits are rounded to bf16", lambda: _rounded_logits(given))
    yield Variant("D11", "topk_weights", "the router weights are not used", lambda: _weights_of_one(given))
    if rule.top_k == 1:
        side = "output" if rule.weight_on == "input" else "input"
        yield with_rule("D10", f"the weight multiplies the expert's {side}, not its {rule.weight_on}", weight_on=side)
    else:
        yield replace(with_rule("D13", "one expert too few is chosen", top_k=rule.top_k - 1), stage="topk_ids")
    yield replace(with_rule("D13", "one expert too many is chosen", top_k=rule.top_k + 1), stage="topk_ids")
    if rule.per_expert_scale:
        yield with_rule("D6", "the per-expert scale is dropped", per_expert_scale=False)
    if rule.router_bias:
        yield replace(with_rule("D2", "the router's bias is dropped", router_bias=False), stage="logits")
    if rule.router_norm_epsilon is not None:
        yield replace(
            with_rule("D9", "the router reads the token without its norm", router_norm_epsilon=None), stage="logits"
        )


# What a wrong router makes of the lawful weights [M, K]: the family, the sentence, the function.
_WEIGHINGS: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("D10", "the router weight is applied twice (squared)", lambda w: w * w),
    ("D11", "every chosen expert has the same weight 1/K", lambda w: torch.full_like(w, 1 / w.shape[1])),
    ("D6", "the weights go through a softmax over the K chosen once more", lambda w: w.softmax(-1)),
    ("D6", "the weights are divided by their largest", lambda w: w / w.amax(-1, keepdim=True)),
    ("D6", "the weights are divided by their length, not by their sum", lambda w: w / w.norm(dim=-1, keepdim=True)),
)  # fmt: skip


def _more_routing(given: Problem) -> Iterator[Variant]:
    """Lawful experts with other weights, or other experts by another ranking."""
    rule, stages = given.spec.routing, given.stages
    ids_MK, weights_MK = stages.topk_ids_MK, stages.topk_weights_MK

    def weighed(family: str, sentence: str, weigh: Callable[[], Tensor]) -> Variant:
        return Variant(
            family, "topk_weights", sentence, lambda: _run(given, choice=Choice(ids_MK, weigh(), stages.margin_M))
        )

    for family, sentence, weigh in _WEIGHINGS:
        yield weighed(family, sentence, partial(weigh, weights_MK))
    if rule.top_k > 1 and rule.scoring_func != "sparsemixer":
        if rule.renormalize and rule.scoring_func != "softmax":
            total = "the weights are divided by the sum over all experts, not over the K chosen"
            yield weighed(
                "D6", total, lambda: stages.scores_ME.gather(1, ids_MK) / stages.scores_ME.sum(-1, keepdim=True)
            )
        if not (rule.scoring_func == "softmax" and (rule.renormalize or rule.score_after_topk)):
            over_k = "the weights are a softmax over the logits of the K chosen"
            yield weighed("D8", over_k, lambda: stages.logits_ME.gather(1, ids_MK).softmax(-1))
        yield Variant(
            "D13", "topk_ids", "the best expert is passed over: the second to the one after the last are chosen",
            lambda: _ranked_by(given, _without_best(_ranking(given))),
        )  # fmt: skip
        yield Variant(
            "D13",
            "topk_ids",
            "the lowest scores are chosen, not the highest",
            lambda: _ranked_by(given, -_ranking(given)),
        )
    if rule.correction_bias and rule.n_group == 1:
        by_logits = "the experts are chosen by logit + correction bias, not by score + correction bias"
        bias_E = given.exact["e_score_correction_bias"]
        yield Variant("D2", "topk_ids", by_logits, lambda: _ranked_by(given, stages.logits_ME + bias_E))
    if rule.per_expert_scale or rule.scoring_func == "sparsemixer":
        yield weighed(
            "D6",
            "the final weights are normalised to a sum of 1",
            lambda: weights_MK / weights_MK.sum(-1, keepdim=True),
        )
    if rule.per_expert_scale:
        twice = "the per-expert scale is applied twice"
        yield weighed("D6", twice, lambda: weights_MK * given.exact["per_expert_scale"][ids_MK])
    if given.dtype is torch.float32:
        yield weighed("D9", "the router weights are rounded to bf16", lambda: weights_MK.bfloat16().double())
        yield Variant(
            "D9", "logits", "the router logits are rounded to fp16", lambda: _rounded_logits(given, torch.float16)
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
            "F2", "routed", f"w13 is read as {other}, it is stored {experts.layout}, in the routed experts",
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


def _shared(given: Problem, tp: int) -> Iterator[Variant]:
    shared = given.spec.shared
    assert shared is not None
    act = shared.activation

    def with_shared(family: str, sentence: str, **changes: object) -> Variant:
        spec = replace(given.spec, shared=replace(shared, **changes))  # type: ignore[arg-type]
        return Variant(family, "shared", sentence, lambda: _run(given, spec=spec))

    if shared.sigmoid_gate:
        yield with_shared("E1", "the shared experts' sigmoid gate is dropped", sigmoid_gate=False)
    yield Variant(
        "C1",
        "shared",
        "the shared experts read a buffer that holds R",
        lambda: _shared_of(given, given.stages.routed_MH * given.spec.scale),
    )
    if given.spec.scale != 1.0:
        yield Variant(
            "C1",
            "shared",
            "the shared experts read a buffer that holds R",
            lambda: _shared_of(given, given.stages.routed_MH),
        )
    if tp > 1 and not shared.bias:
        for scale in {given.spec.scale, 1.0}:
            own_share = "the shared experts read a buffer that holds the rank's own share of R"
            yield Variant("C1", "shared", own_share, partial(_shared_of_shares, given, scale, tp))
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
    is_vision_M: Tensor | None = None,
) -> Stages:
    x_MH, is_vision_M = given.tokens.hidden_states, given.tokens.is_vision if is_vision_M is None else is_vision_M
    return forward(spec or given.spec, weights or given.exact, x_MH, is_vision_M=is_vision_M, choice=choice)


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


def _rounded_logits(given: Problem, dtype: torch.dtype = torch.bfloat16) -> Stages:
    routing = given.spec.routing
    weights = given.exact
    logits_ME = router_logits(given.tokens.hidden_states.double(), weights, routing).to(dtype).double()
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


def _shared_of_shares(given: Problem, scale: float, tp: int) -> Stages:
    """Each rank's shared experts read the rank's own share of R, which its kernel wrote over x."""
    shared, weights = given.spec.shared, given.exact
    assert shared is not None
    total_MH, width = torch.zeros_like(given.stages.output_MH), shared.intermediate_size // tp
    for part in shares(given, tp):
        if part.name == "routed" and part.shard is not None:
            own = torch.zeros_like(weights["shared_w2"])
            columns = slice(part.shard * width, (part.shard + 1) * width)
            own[:, columns] = weights["shared_w2"][:, columns]
            total_MH = total_MH + shared_experts(part.value_MH * scale, {**weights, "shared_w2": own}, shared)
    return _with_parts(given, shared_MH=total_MH)


def _shared_of(given: Problem, buffer_MH: Tensor) -> Stages:
    """The shared experts read another buffer than x."""
    assert given.spec.shared is not None
    return _with_parts(given, shared_MH=shared_experts(buffer_MH, given.exact, given.spec.shared))


def _ranking(given: Problem) -> Tensor:
    """What the choice compares before groups are dropped, [M, E]."""
    stages, routing = given.stages, replace(given.spec.routing, n_group=1, topk_group=1)
    return rank_scores(stages.logits_ME, stages.scores_ME, given.exact.get("e_score_correction_bias"), routing)


def _without_best(ranked_ME: Tensor) -> Tensor:
    return ranked_ME.scatter(1, ranked_ME.argmax(-1, keepdim=True), -torch.inf)


def _ranked_by(given: Problem, ranked_ME: Tensor) -> Stages:
    """The law with the K best of another ranking."""
    stages, routing = given.stages, given.spec.routing
    best = ranked_ME.topk(min(routing.top_k + 1, ranked_ME.shape[1]), -1)
    ids_MK = best.indices[:, : routing.top_k]
    if routing.score_after_topk:
        weights_MK = score(stages.logits_ME.gather(1, ids_MK), routing)
    else:
        weights_MK = stages.scores_ME.gather(1, ids_MK)
    weights_MK = renormalize(weights_MK, routing)
    if routing.per_expert_scale:
        weights_MK = weights_MK * given.exact["per_expert_scale"][ids_MK]
    margin_M = torch.nan_to_num(best.values[:, -2] - best.values[:, -1], nan=torch.inf, posinf=torch.inf)
    return _run(given, choice=Choice(ids_MK, weights_MK, margin_M))


def _grouped(given: Problem, choose: Callable[[Problem, Tensor], Tensor]) -> Stages:
    """choose: the mask [M, E] of experts whose group is kept."""
    ranked_ME = _ranking(given)
    return _ranked_by(given, ranked_ME.masked_fill(~choose(given, ranked_ME), -torch.inf))


def _kept(given: Problem, scores_MG: Tensor, *, largest: bool = True) -> Tensor:
    """The mask [M, E] of the experts in the topk_group groups of highest (or lowest) score."""
    routing = given.spec.routing
    best = scores_MG.topk(routing.topk_group, -1, largest=largest).indices
    kept_MG = torch.zeros_like(scores_MG, dtype=torch.bool).scatter(1, best, True)
    return kept_MG.repeat_interleave(routing.num_logits // routing.n_group, dim=1)


def _group_scores(given: Problem, ranked_ME: Tensor) -> Tensor:
    best = 1 if given.spec.routing.group_score == "max" else 2
    return ranked_ME.unflatten(1, (given.spec.routing.n_group, -1)).topk(best, -1).values.sum(-1)


def _strided_groups(given: Problem, ranked_ME: Tensor) -> Tensor:
    groups, count = given.spec.routing.n_group, ranked_ME.shape[1]
    order = torch.arange(count).view(-1, groups).T.flatten()  # group g holds experts g, g + groups, ...
    kept_ME = _kept(given, _group_scores(given, ranked_ME[:, order]))
    return torch.zeros_like(kept_ME).index_copy(1, order, kept_ME)


_GROUPINGS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "the best groups are dropped and the others kept": lambda g, r: ~_kept(g, _group_scores(g, r)),
    "the worst groups are kept, not the best": lambda g, r: _kept(g, _group_scores(g, r), largest=False),
    "the kept groups are those after the best": lambda g, r: _kept(g, _group_scores(g, r).roll(1, 1)),
    "groups are made of every n-th expert, not of neighbours": _strided_groups,
    "groups are ranked by the sum of all their scores": lambda g, r: _kept(
        g, r.unflatten(1, (g.spec.routing.n_group, -1)).sum(-1)
    ),
    "groups are ranked by their lowest score": lambda g, r: _kept(
        g, r.unflatten(1, (g.spec.routing.n_group, -1)).amin(-1)
    ),
    "groups are ranked without the correction bias": lambda g, r: _kept(g, _group_scores(g, g.stages.scores_ME)),
}


def _bias_on_logits(given: Problem) -> Stages:
    spec, weights = given.spec, dict(given.exact)
    bias_E = weights.pop("e_score_correction_bias")
    weights["router_bias"] = weights.get("router_bias", 0) + bias_E
    routing = replace(spec.routing, correction_bias=False, router_bias=True)
    return _run(given, spec=replace(spec, routing=routing), weights=weights)


# ---- other activations: what a kernel makes of gate [*, I] and up [*, I] (None without a gate)

Act = Callable[[Tensor, Tensor | None, Activation], Tensor]


def _clamped(bounds: tuple[bool, bool, bool, bool], gate: Tensor, up: Tensor | None, rule: Activation) -> Tensor:
    """bounds: whether gate has a lower and an upper limit, and up."""
    limit = float("inf") if rule.limit is None else rule.limit
    gate_low, gate_high, up_low, up_high = (limit if bound else float("inf") for bound in bounds)
    plain = replace(rule, clamp="none", limit=None)
    assert up is not None
    if rule.clamp == "before":
        return activate(gate.clamp(-gate_low, gate_high), up.clamp(-up_low, up_high), plain)
    act = activate(gate, None, plain).clamp(-gate_low, gate_high)
    return act * (up.clamp(-up_low, up_high) + rule.up_offset)


def _times(act: Tensor, up: Tensor | None, rule: Activation) -> Tensor:
    return act if up is None else act * (up + rule.up_offset)


_CLAMPS: tuple[tuple[str, tuple[bool, bool, bool, bool]], ...] = (
    ("clamp the gate on both sides", (True, True, True, True)),
    ("clamp the up half from above alone", (False, True, False, True)),
    ("clamp the gate alone", (False, True, False, False)),
    ("clamp the up half alone", (False, False, True, True)),
)

# who, what they do, the family, and for which rules it is another function than the law's
_ACTS: tuple[tuple[str, str, Callable[[Activation], bool], Act], ...] = (
    ("F6", "use relu", lambda a: True, lambda g, u, a: _times(g.relu(), u, a)),
    ("F6", "have no activation", lambda a: True, lambda g, u, a: _times(g, u, a)),
    ("F6", "use sigmoid", lambda a: True, lambda g, u, a: _times(g.sigmoid(), u, a)),
    ("F6", "use tanh", lambda a: True, lambda g, u, a: _times(g.tanh(), u, a)),
    ("F6", "square without relu", lambda a: a.kind == "relu2", lambda g, u, a: _times(g.square(), u, a)),
    ("F6", "use silu with a slope of 1.702", lambda a: a.kind != "silu" or a.alpha == 1, lambda g, u, a: _times(g * torch.sigmoid(1.702 * g), u, a)),
    ("F1", "do not multiply by the up half", lambda a: a.gated, lambda g, u, a: activate(g, None, replace(a, clamp="none", limit=None))),
    ("F1", "do not use the gate half", lambda a: a.gated, lambda g, u, a: g * 0 if u is None else u),
    ("F1", "activate both halves", lambda a: a.gated, lambda g, u, a: _times(activate(g, None, replace(a, clamp="none", limit=None)), None if u is None else torch.nn.functional.silu(u), a)),
    ("F3", "add the offset to the gate instead of the up half", lambda a: a.up_offset != 0, lambda g, u, a: activate(g, u, replace(a, up_offset=0.0)) + a.up_offset * _bounded(u, a)),
    ("F3", "add 1 to the up half", lambda a: a.gated and a.up_offset == 0, lambda g, u, a: activate(g, u, replace(a, up_offset=1.0))),
    ("F3", "halve the clamp's limit", lambda a: a.limit is not None, lambda g, u, a: activate(g, u, replace(a, limit=(a.limit or 0) / 2))),
)  # fmt: skip


def _bounded(up: Tensor | None, rule: Activation) -> Tensor:
    assert up is not None
    return up if rule.limit is None else up.clamp(-rule.limit, rule.limit)


def _activations(given: Problem) -> Iterator[Variant]:
    """Routed or shared experts with another function between their two products."""
    shared = given.spec.shared
    owners: list[tuple[str, str, Activation, Callable[[Act], Stages]]] = []
    if given.spec.vision is None:
        owners.append(("routed", "routed", given.spec.experts.activation, partial(_routed_with, given)))
    if shared is not None:
        owners.append(("shared", "shared", shared.activation, partial(_shared_with, given)))
    for stage, who, rule, compute in owners:
        acts = [(family, what, act) for family, what, applies, act in _ACTS if applies(rule)]
        if rule.clamp != "none":
            acts += [("F3" if who == "routed" else "E5", what, partial(_clamped, bounds)) for what, bounds in _CLAMPS]
        for family, what, act in acts:
            yield Variant(family, stage, f"the {who} experts {what}", partial(compute, act))
    if given.spec.vision is None and given.spec.routing.top_k > 1:
        for both in (False, True):
            side = "both the input and the output of the expert" if both else "the expert's input, not its output"
            yield Variant(
                "D10", "routed", f"the router weight multiplies {side}",
                partial(_routed_with, given, activate, weigh_in=True, weigh_out=both),
            )  # fmt: skip
    if shared is not None and shared.sigmoid_gate:
        gates: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
            ("has no sigmoid", lambda z: z),
            ("goes through the sigmoid twice", lambda z: z.sigmoid().sigmoid()),
            ("is applied twice", lambda z: z.sigmoid().square()),
            ("is 1 - sigmoid", lambda z: 1 - z.sigmoid()),
            ("is 1 + sigmoid", lambda z: 1 + z.sigmoid()),
            ("is tanh instead of sigmoid", torch.tanh),
            ("is silu instead of sigmoid", torch.nn.functional.silu),
            ("is relu instead of sigmoid", torch.relu),
            ("belongs to the token before", lambda z: z.sigmoid().roll(1, 0)),
        )
        for what, gate in gates:
            yield Variant("E1", "shared", f"the shared experts' gate {what}", partial(_gated, given, gate))
        yield Variant("E1", "output", "the shared experts' gate multiplies R too", lambda: _gated(given, None))
    if shared is not None:
        half = shared.intermediate_size // 2
        half_used = "only the first half of the shared experts' width is used"
        yield Variant(
            "E3", "shared", half_used,
            partial(_with_tensor, given, "shared_w2", lambda w: torch.cat([w[:, :half], 0 * w[:, half:]], 1)),
        )  # fmt: skip
        yield Variant(
            "C1",
            "shared",
            "the shared experts read x + R",
            lambda: _shared_of(given, given.tokens.hidden_states.double() + given.spec.scale * given.stages.routed_MH),
        )


def _routed_with(given: Problem, act: Act, *, weigh_in: bool | None = None, weigh_out: bool | None = None) -> Stages:
    """The law with another activation, or with the weight at another side of the expert; slot by slot, no vision."""
    spec, weights, stages = given.spec, given.exact, given.stages
    experts, x_ML = spec.experts, given.tokens.hidden_states.double()
    on_input = spec.routing.weight_on == "input"
    weigh_in, weigh_out = (
        (on_input if weigh_in is None else weigh_in),
        (not on_input if weigh_out is None else weigh_out),
    )
    if experts.latent_size is not None:
        x_ML = x_ML @ weights["fc1_latent"].T
        if experts.latent_bias:
            x_ML = x_ML + weights["fc1_latent_bias"]
    routed_ML = torch.zeros_like(x_ML)
    for e in stages.topk_ids_MK.unique().tolist():
        rows, slot = (stages.topk_ids_MK == e).nonzero(as_tuple=True)
        w = stages.topk_weights_MK[rows, slot, None]
        w13, w2 = (weights[name][e].T if experts.transposed else weights[name][e] for name in ("w13", "w2"))
        h = (x_ML[rows] * w if weigh_in else x_ML[rows]) @ w13.T
        h = h + weights["b13"][e] if experts.bias else h
        y = act(*_halves_of(h, experts.layout == "interleaved", experts.activation), experts.activation) @ w2.T
        y = y + weights["b2"][e] if experts.bias else y
        routed_ML.index_add_(0, rows, y * w if weigh_out else y)
    routed_MH = routed_ML if experts.latent_size is None else routed_ML @ weights["fc2_latent"].T
    return _with_parts(given, routed_MH=routed_MH)


def _halves_of(h: Tensor, interleaved: bool, rule: Activation) -> tuple[Tensor, Tensor | None]:
    if not rule.gated:
        return h, None
    gate, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, -1)
    return gate, up


def _shared_with(given: Problem, act: Act) -> Stages:
    spec, weights, x_MH = given.spec, given.exact, given.tokens.hidden_states.double()
    shared = spec.shared
    assert shared is not None
    h = x_MH @ weights["shared_w13"].T
    h = h + weights["shared_b13"] if shared.bias else h
    y_MH = act(*_halves_of(h, False, shared.activation), shared.activation) @ weights["shared_w2"].T
    y_MH = y_MH + weights["shared_b2"] if shared.bias else y_MH
    if shared.sigmoid_gate:
        y_MH = y_MH * torch.sigmoid(x_MH @ weights["shared_gate"].T)
    return _with_parts(given, shared_MH=y_MH)


def _gated(given: Problem, gate: Callable[[Tensor], Tensor] | None) -> Stages:
    """S with another gate; None: the lawful gate multiplies R as well."""
    x_MH, shared, stages = given.tokens.hidden_states.double(), given.spec.shared, given.stages
    assert shared is not None
    z_M1 = x_MH @ given.exact["shared_gate"].T
    if gate is None:
        return _with_parts(given, routed_MH=stages.routed_MH * z_M1.sigmoid())
    return _with_parts(
        given, shared_MH=shared_experts(x_MH, given.exact, replace(shared, sigmoid_gate=False)) * gate(z_M1)
    )


def _with_parts(given: Problem, *, routed_MH: Tensor | None = None, shared_MH: Tensor | None = None) -> Stages:
    """The law with another R or another S."""
    stages, spec = given.stages, given.spec
    new_r, new_s = (
        (stages.routed_MH if routed_MH is None else routed_MH),
        (stages.shared_MH if shared_MH is None else shared_MH),
    )
    change_MH = spec.scale * (new_r - stages.routed_MH) + new_s - stages.shared_MH
    return replace(stages, routed_MH=new_r, shared_MH=new_s, output_MH=stages.output_MH + spec.output.share * change_MH)


# ---- weights cut wrongly: which of the I columns of w2, rows of gate and rows of up stand where the law has 0 to I - 1


def _slices(given: Problem, tp: int) -> Iterator[Variant]:
    """Experts or shared experts whose weights are cut for the ranks in a wrong way, or swapped between experts."""
    owners = []
    if given.spec.vision is None:  # whose experts may have another width
        owners.append(("routed", "", given.spec.experts.intermediate_size, given.spec.experts.activation.gated))
    if given.spec.shared is not None:
        shared = given.spec.shared
        owners.append(("shared", "shared_", shared.intermediate_size, shared.activation.gated))
    for who, prefix, width, gated in owners:
        cuts = [*(_misread(width, who == "shared") if gated else ()), *(_cuts(width, tp, gated) if tp > 1 else ())]
        for family, sentence, gate, up, down in cuts:
            yield Variant(
                family, who, f"{sentence} in the {who} experts",
                partial(_sliced, given, prefix, width, gate, up, down),
            )  # fmt: skip
    for name in ("w13", "w2", "b13", "b2") if given.spec.experts.bias else ("w13", "w2"):
        for shift, which in ((1, "before"), (-1, "after")):
            yield Variant(
                "F7", "routed", f"every expert has the {name} of the one {which} it",
                partial(_with_tensor, given, name, partial(torch.roll, shifts=shift, dims=0)),
            )  # fmt: skip
    if given.spec.experts.bias:
        yield Variant(
            "F5", "routed", "the first expert bias is added twice", lambda: _with_tensor(given, "b13", lambda b: 2 * b)
        )
        if given.spec.experts.activation.gated:
            yield Variant(
                "F2", "routed", "the first expert bias has gate and up exchanged", lambda: _exchanged(given, "b13")
            )
            other = "halved" if given.spec.experts.layout == "interleaved" else "interleaved"
            yield Variant(
                "F2",
                "routed",
                f"the first expert bias is read as {other}, it is stored as w13 is",
                lambda: _with_tensor(given, "b13", _relaid(given)),
            )


def _misread(width: int, halved: bool) -> Iterator[tuple[str, str, Tensor, Tensor, Tensor]]:
    """As `_cuts`, on one rank too. halved: w13 is stored gate first and may be taken for interleaved."""
    whole = torch.arange(width)
    late = torch.arange(1, 2 * width + 1) % (2 * width)
    yield "F2", "w13 is read from one row too late", late[:width], late[width:], whole
    if halved:
        yield "F2", "w13 is read as interleaved, it is stored halved,", 2 * whole, 2 * whole + 1, whole


def _cuts(width: int, tp: int, gated: bool) -> Iterator[tuple[str, str, Tensor, Tensor, Tensor]]:
    """(family, sentence, rows of gate, rows of up, columns of w2); rows of up count from I on where w13 is cut as one."""
    whole = torch.arange(width)
    share = width // tp
    for shift, which in ((-share, "next"), (share, "previous")):
        if shift == -share or tp > 2:
            yield "F9", f"w2's share is that of the {which} rank from w13's", whole, whole + width, whole.roll(shift)
    first = whole % share
    yield "F9", "every rank has rank 0's share of w2", whole, whole + width, first
    yield "F9", "every rank has rank 0's share of w13", first, first + width, whole
    yield (
        "F9",
        "w2 is cut into every tp-th column, w13 into blocks,",
        whole,
        whole + width,
        whole.view(share, tp).T.flatten(),
    )
    if gated:
        blocks = torch.arange(2 * width).view(tp, 2, share)
        one_block = "w13 is cut for the ranks as one block, which mixes gate and up,"
        yield "F9", one_block, blocks[:, 0].flatten(), blocks[:, 1].flatten(), whole
        for rank in range(tp):
            mine = whole // share == rank
            gate, up = torch.where(mine, whole + width, whole), torch.where(mine, whole, whole + width)
            yield "F1", f"gate and up are exchanged on rank {rank} alone", gate, up, whole


def _sliced(given: Problem, prefix: str, width: int, gate: Tensor, up: Tensor, down: Tensor) -> Stages:
    experts = given.spec.experts
    interleaved, transposed = (False, False) if prefix else (experts.layout == "interleaved", experts.transposed)

    def stored(rows: Tensor) -> Tensor:  # where a row of gate (below width) or up stands
        return torch.where(rows < width, 2 * rows, 2 * (rows - width) + 1) if interleaved else rows

    weights = dict(given.exact)
    for name, tensor in given.exact.items():
        bare = name.removeprefix("vision_")
        if bare in (prefix + "w13", prefix + "b13"):
            dim = tensor.dim() - (1 if bare.endswith("b13") or transposed else 2)
            rows = tensor.shape[dim]
            order = torch.cat([gate, up]) if rows == 2 * width else gate
            target = (
                torch.cat([torch.arange(width), torch.arange(width) + width])
                if rows == 2 * width
                else torch.arange(width)
            )
            weights[name] = torch.zeros_like(tensor).index_copy(
                dim, stored(target), tensor.index_select(dim, stored(order))
            )
        elif bare == prefix + "w2":
            weights[name] = tensor.index_select(tensor.dim() - (2 if transposed else 1), down)
    return _run(given, weights=weights)


def _relaid(given: Problem) -> Callable[[Tensor], Tensor]:
    """b13 as a kernel sees it that takes one layout for the other."""
    if given.spec.experts.layout == "interleaved":  # halves are read: put what stands there where gate and up belong
        return lambda b: torch.stack(b.chunk(2, -1), -1).flatten(-2)
    return lambda b: torch.cat([b[..., 0::2], b[..., 1::2]], -1)
