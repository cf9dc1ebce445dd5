"""The routed experts: layout, activation and biases, and the side of an expert that its weight multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from harness.problem import Problem
from harness.variants.law import Act, Variant, exchanged, halves_of, run, with_parts, with_tensor
from reference.moe import Choice, Stages, activate
from reference.spec import Activation, ActivationKind


def rules(given: Problem) -> Iterator[Variant]:
    """One field of the experts or of their activation is wrong, or a bias is misplaced."""
    experts = given.spec.experts
    act = experts.activation

    def with_act(family: str, sentence: str, **changes: object) -> Variant:
        return Variant(family, "routed", sentence, partial(_with_activation, given, **changes))

    if act.gated:
        yield Variant(
            "F1", "routed", "gate and up are exchanged in the routed experts", partial(exchanged, given, "w13", "b13")
        )
        layout = _other_layout(given)
        yield Variant(
            "F2", "routed", f"w13 is read as {layout}, it is stored {experts.layout}, in the routed experts",
            partial(_with_experts, given, layout=layout),
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
            "F4", "routed", "the second expert bias is not multiplied by the router weight", partial(_plain_bias, given)
        )
        dropped = "the first expert bias is dropped"
        yield Variant("F5", "routed", dropped, partial(with_tensor, given, "b13", torch.zeros_like))
        yield Variant("F5", "routed", "both expert biases are dropped", partial(_with_experts, given, bias=False))
    if act.clamp != "none" and act.alpha != 1.0 and given.dtype is torch.float32:  # bf16 cannot tell it from gelu
        plain = "the routed experts use plain silu, without clamp, slope and offset"
        yield with_act("F3", plain, clamp="none", limit=None, alpha=1.0, up_offset=0.0)
    if act.kind == "silu":  # a sigmoid as steep as this is a step
        yield with_act("F6", "the routed experts use relu", alpha=2.0**40)
    for kind in get_args(ActivationKind):
        if kind != act.kind:
            yield with_act("F6", f"the routed experts use {kind} instead of {act.kind}", kind=kind, alpha=1.0)


def weighed_sides(given: Problem) -> Iterator[Variant]:
    """The weight multiplies what goes into an expert; of top_k = 1, see weighing.py."""
    if given.spec.vision is not None:
        return
    carried = {"the router weight": 1.0, "the router weight, with s in it,": given.spec.scale}
    for what, factor in list(carried.items())[: 1 if given.spec.scale == 1.0 else 2]:
        for both in (False, True) if given.spec.routing.top_k > 1 or factor != 1.0 else (True,):
            side = "both the input and the output of the expert" if both else "the expert's input, not its output"
            yield Variant(
                "D10", "routed", f"{what} multiplies {side}",
                partial(routed_with, given, activate, weigh_in=True, weigh_out=both, carried=factor),
            )  # fmt: skip


def first_bias(given: Problem) -> Iterator[Variant]:
    """The first bias counted twice, or laid out otherwise than w13."""
    experts = given.spec.experts
    if not experts.bias:
        return
    twice = "the first expert bias is added twice"
    yield Variant("F5", "routed", twice, partial(with_tensor, given, "b13", lambda b: 2 * b))
    if experts.activation.gated:
        yield Variant(
            "F2", "routed", "the first expert bias has gate and up exchanged", partial(exchanged, given, "b13")
        )
        yield Variant(
            "F2", "routed", f"the first expert bias is read as {_other_layout(given)}, it is stored as w13 is",
            partial(with_tensor, given, "b13", _relaid(given)),
        )  # fmt: skip


def routed_with(
    given: Problem, act: Act, *, weigh_in: bool | None = None, weigh_out: bool | None = None, carried: float = 1.0
) -> Stages:
    """The law with another activation, or with the weight at another side of the expert; slot by slot, no vision.

    carried: s if every use of the weight brings it along, and nobody else applies it.
    """
    spec, weights, stages = given.spec, given.exact, given.stages
    experts, x_ML = spec.experts, given.tokens.hidden_states.double()
    interleaved, on_input = experts.layout == "interleaved", spec.routing.weight_on == "input"
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
        w = carried * stages.topk_weights_MK[rows, slot, None]
        w13, w2 = (weights[name][e].T if experts.transposed else weights[name][e] for name in ("w13", "w2"))
        h = (x_ML[rows] * w if weigh_in else x_ML[rows]) @ w13.T
        h = h + weights["b13"][e] if experts.bias else h
        y = act(*halves_of(h, experts.activation, interleaved=interleaved), experts.activation) @ w2.T
        y = y + weights["b2"][e] if experts.bias else y
        routed_ML.index_add_(0, rows, y * w if weigh_out else y)
    routed_MH = routed_ML if experts.latent_size is None else routed_ML @ weights["fc2_latent"].T
    return with_parts(given, routed_MH=routed_MH / carried)


def _other_layout(given: Problem) -> str:
    return "halved" if given.spec.experts.layout == "interleaved" else "interleaved"


def _with_experts(given: Problem, **changes: object) -> Stages:
    spec = given.spec
    vision = spec.vision and replace(spec.vision, experts=replace(spec.vision.experts, **changes))  # type: ignore[arg-type]
    return run(given, spec=replace(spec, experts=replace(spec.experts, **changes), vision=vision))  # type: ignore[arg-type]


def _with_activation(given: Problem, **changes: object) -> Stages:
    changed: Activation = replace(given.spec.experts.activation, **changes)  # type: ignore[arg-type]
    return _with_experts(given, activation=changed)


def _plain_bias(given: Problem) -> Stages:
    """R with sum of b2 in place of the weighted sum: the unweighted bias stands beside experts without one."""
    stages = given.stages
    ones = Choice(stages.topk_ids_MK, torch.ones_like(stages.topk_weights_MK), stages.margin_M)
    no_products = {n: torch.zeros_like(t) if n.removeprefix("vision_") == "w2" else t for n, t in given.exact.items()}
    bias_MH = run(given, weights=no_products, choice=ones).routed_MH
    plain = with_tensor(given, "b2", torch.zeros_like)
    output_MH = plain.output_MH + bias_MH * given.spec.scale * given.spec.output.share
    return replace(plain, output_MH=output_MH)


def _relaid(given: Problem) -> Callable[[Tensor], Tensor]:
    """b13 as a kernel sees it that takes one layout for the other."""
    if given.spec.experts.layout == "interleaved":  # halves are read: put what stands there where gate and up belong
        return lambda b: torch.stack(b.chunk(2, -1), -1).flatten(-2)
    return lambda b: torch.cat([b[..., 0::2], b[..., 1::2]], -1)
