"""Numbers that pass through a shorter dtype on their way: of the router, of the routed and of the shared experts.

Each law is the exact one with a rounding at named places. An error as small as that explains nothing by its size: the
roundings themselves have to be the layer's, number by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness.layout import Layout
from harness.problem import Problem
from harness.variants.law import Variant, halves_of, run, ties_as_picked, weights_of, with_parts, with_weights
from reference.moe import Choice, Stages, activate, renormalize, router_logits, select_experts

_FORMATS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8 (e4m3)", torch.float8_e5m2: "fp8 (e5m2)",
}  # fmt: skip
_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}


@dataclass(frozen=True, slots=True)
class _Places:
    """Where numbers are rounded: what comes in, both matrices, what is between them, what a rank gives out."""

    told: str
    x: bool = False
    w13: bool = False
    w2: bool = False
    h: bool = False
    out: bool = False


_PLACES = (
    _Places("take {} tokens", x=True),
    _Places("have {} weights in w13", w13=True),
    _Places("have {} weights in w2", w2=True),
    _Places("have {} weights", w13=True, w2=True),
    _Places("round what is between both products to {}", h=True),
    _Places("give out {}", out=True),
    _Places("take and give out {}", x=True, out=True),
    _Places("take {} tokens and have {} weights", x=True, w13=True, w2=True),
    _Places("compute in {} throughout", x=True, w13=True, w2=True, h=True, out=True),
)
_WEIGHTS = _PLACES[1:4]
# what, whether the tokens are rounded, whether its matrix is
_ROUTER_READS = (
    ("{} tokens", True, False), ("its matrix in {}", False, True), ("tokens and its matrix in {}", True, True),
)  # fmt: skip


def router(given: Problem) -> Iterator[Variant]:
    """What its product reads, scores, weights with s on them, and what is left of a score after a bias was added to it and
    taken off again.
    """
    rule, stages = given.spec.routing, given.stages
    if rule.scoring_func == "sparsemixer":
        return
    for dtype in (torch.bfloat16, torch.float16):
        name = _FORMATS[dtype]
        if given.dtype is torch.float32:
            for what, x, w in _ROUTER_READS:
                told = f"the router reads {what.format(name)}"
                yield Variant("D9", "logits", told, partial(_by_product, given, dtype, x, w))
            if not rule.score_after_topk:
                told = f"the scores are rounded to {name}"
                yield Variant("D9", "topk_ids", f"{told} before the choice", partial(_by_scores, given, dtype, True))
                yield Variant(
                    "D9", "topk_weights", f"{told} after the choice", partial(_by_scores, given, dtype, False)
                )
            if given.spec.scale != 1.0:
                told = f"the router weights, times s, are rounded to {name}"
                yield Variant("D9", "topk_weights", told, partial(_scaled_and_rounded, given, dtype))
        if rule.correction_bias:
            told = f"the correction bias is added to the scores and taken off again in {name}"
            yield Variant("D4", "topk_weights", told, partial(_bias_taken_off, given, dtype))
    if given.dtype is torch.float32 and stages.topk_ids_MK.shape[1] > 1 and rule.renormalize:
        told = "the router weights are rounded to bf16 before they are renormalised"
        yield Variant("D9", "topk_weights", told, partial(_rounded_before, given))


def experts(given: Problem, layout: Layout | None) -> Iterator[Variant]:
    """Of the routed and of the shared experts, in dtypes shorter than the layer's."""
    if given.is_quantised or given.spec.vision is not None:
        return
    for dtype, name in _FORMATS.items():
        bits = 8 if name.startswith("fp8") else 16
        if bits >= _BITS.get(given.dtype, 64):
            continue
        for place in _PLACES if bits == 16 else _WEIGHTS:
            told = place.told.format(name, name)
            yield Variant("P1", "routed", f"the routed experts {told}", partial(_routed, given, layout, dtype, place))
            if place.out and given.spec.scale != 1.0:
                after = f"the routed experts, their results times s, {told}"
                yield Variant("P1", "routed", after, partial(_routed, given, layout, dtype, place, given.spec.scale))
            if given.spec.shared is not None:
                yield Variant(
                    "P1", "shared", f"the shared experts {told}", partial(_shared, given, layout, dtype, place)
                )


def _to(dtype: torch.dtype, *, rounds: bool) -> Callable[[Tensor], Tensor]:
    return (lambda t: t.float().to(dtype).double()) if rounds else (lambda t: t)


def _by_product(given: Problem, dtype: torch.dtype, x: bool, w: bool) -> Stages:
    weights = given.exact | {"router_weight": _to(dtype, rounds=w)(given.exact["router_weight"])}
    x_MH, rule = _to(dtype, rounds=x)(given.tokens.hidden_states.double()), given.spec.routing
    choice = ties_as_picked(given, rule, None, router_logits(x_MH, weights, rule))
    return run(given, choice=choice)


def _by_scores(given: Problem, dtype: torch.dtype, chosen: bool) -> Stages:
    stages, rule = given.stages, given.spec.routing
    rounded_ME, bias_E = stages.scores_ME.to(dtype).double(), given.exact.get("e_score_correction_bias")
    ids_MK, margin_M = stages.topk_ids_MK, stages.margin_M
    if chosen:
        other = select_experts(stages.logits_ME, rounded_ME, bias_E, rule)
        ids_MK, margin_M = other.topk_ids_MK, other.margin_M
    weights_MK = weights_of(given, rule, stages.logits_ME, rounded_ME, ids_MK)
    return run(given, choice=Choice(ids_MK, weights_MK, margin_M))


def _scaled_and_rounded(given: Problem, dtype: torch.dtype) -> Stages:
    scale = given.spec.scale
    return with_weights(given, (given.stages.topk_weights_MK.float() * scale).to(dtype).double() / scale)


def _rounded_before(given: Problem) -> Stages:
    stages = given.stages
    scores_MK = stages.scores_ME.gather(1, stages.topk_ids_MK).bfloat16().double()
    return with_weights(given, renormalize(scores_MK, given.spec.routing))


def _bias_taken_off(given: Problem, dtype: torch.dtype) -> Stages:
    stages, bias_E = given.stages, given.exact["e_score_correction_bias"]
    left_ME = ((stages.scores_ME + bias_E).float().to(dtype) - bias_E.float().to(dtype)).double()
    return with_weights(given, renormalize(left_ME.gather(1, stages.topk_ids_MK), given.spec.routing))


def _routed(given: Problem, layout: Layout | None, dtype: torch.dtype, at: _Places, factor: float = 1.0) -> Stages:
    """R, token by expert; what is given out, times factor, is rounded once for each rank that has a share of it."""
    spec, weights, stages = given.spec, given.exact, given.stages
    rule, x_ML = spec.experts, given.tokens.hidden_states.double()
    in_w13, in_w2, out = (_to(dtype, rounds=rounds) for rounds in (at.w13, at.w2, at.out))
    on_input, interleaved = spec.routing.weight_on == "input", rule.layout == "interleaved"
    if rule.latent_size is not None:
        x_ML = x_ML @ weights["fc1_latent"].T
        x_ML = x_ML + weights["fc1_latent_bias"] if rule.latent_bias else x_ML
    tp = layout.grid.moe_tp if layout is not None and at.out else 1
    owners = layout.owners if layout is not None and at.out else None
    share = rule.intermediate_size // tp
    given_out: dict[int, Tensor] = {}
    for e in stages.topk_ids_MK[stages.topk_ids_MK < spec.routing.num_experts].unique().tolist():
        rows, slot = (stages.topk_ids_MK == e).nonzero(as_tuple=True)
        w = stages.topk_weights_MK[rows, slot, None]
        w13, w2 = (weights[name][e].T if rule.transposed else weights[name][e] for name in ("w13", "w2"))
        h = _to(dtype, rounds=at.x)(x_ML[rows] * w if on_input else x_ML[rows]) @ in_w13(w13).T
        h = h + weights["b13"][e] if rule.bias else h
        a = _to(dtype, rounds=at.h)(activate(*halves_of(h, rule.activation, interleaved=interleaved), rule.activation))
        for piece in range(tp):
            cut = slice(piece * share, (piece + 1) * share)
            y = a[:, cut] @ in_w2(w2)[:, cut].T
            y = y + weights["b2"][e] if rule.bias and piece == 0 else y
            rank = (0 if owners is None else owners[e] * tp) + piece
            total = given_out.setdefault(rank, torch.zeros_like(x_ML))
            total.index_add_(0, rows, y if on_input else y * w)
    shares = [out(total * factor) / factor for total in given_out.values()]
    routed_ML = torch.stack(shares).sum(0) if shares else torch.zeros_like(x_ML)
    return with_parts(given, routed_MH=routed_ML if rule.latent_size is None else routed_ML @ weights["fc2_latent"].T)


def _shared(given: Problem, layout: Layout | None, dtype: torch.dtype, at: _Places) -> Stages:
    spec, weights, x_MH = given.spec.shared, given.exact, given.tokens.hidden_states.double()
    assert spec is not None
    in_w13, in_w2, out = (_to(dtype, rounds=rounds) for rounds in (at.w13, at.w2, at.out))
    h = _to(dtype, rounds=at.x)(x_MH) @ in_w13(weights["shared_w13"]).T
    h = h + weights["shared_b13"] if spec.bias else h
    a = _to(dtype, rounds=at.h)(activate(*halves_of(h, spec.activation, interleaved=False), spec.activation))
    tp = layout.grid.shared_tp if layout is not None and at.out else 1
    gate_M1 = torch.sigmoid(x_MH @ weights["shared_gate"].T) if spec.sigmoid_gate else 1.0
    shares, width = [], spec.intermediate_size // tp
    for piece in range(tp):
        cut = slice(piece * width, (piece + 1) * width)
        y_MH = a[:, cut] @ in_w2(weights["shared_w2"])[:, cut].T
        y_MH = y_MH + weights["shared_b2"] if spec.bias and piece == 0 else y_MH
        shares.append(out(y_MH * gate_M1))
    return with_parts(given, shared_MH=torch.stack(shares).sum(0))
