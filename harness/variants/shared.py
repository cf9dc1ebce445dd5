"""The shared experts: their rule, their gate, and the buffer that they read. Each yields nothing without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from harness.parts import shares
from harness.problem import Problem
from harness.variants.law import Act, Variant, exchanged, halves_of, run, with_parts, with_tensor
from reference.moe import Stages, shared_experts
from reference.spec import ActivationKind

# What a wrong layer makes of the gate's logits [M, 1].
_GATES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
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


def rules(given: Problem, tp: int) -> Iterator[Variant]:
    """One field of the shared experts or of their activation is wrong, a bias is dropped, or x was overwritten."""
    shared = given.spec.shared
    if shared is None:
        return
    act = shared.activation

    def with_shared(family: str, sentence: str, **changes: object) -> Variant:
        spec = replace(given.spec, shared=replace(shared, **changes))  # type: ignore[arg-type]
        return Variant(family, "shared", sentence, partial(run, given, spec=spec))

    if shared.sigmoid_gate:
        yield with_shared("E1", "the shared experts' sigmoid gate is dropped", sigmoid_gate=False)
    yield from _overwritten(given, tp)
    if act.clamp != "none":
        plain = replace(act, clamp="none", limit=None)
        yield with_shared("E5", "the shared experts are not clamped", activation=plain)
        limit = given.spec.experts.activation.limit
        if limit is not None and limit != act.limit:
            routed = "the shared experts use the routed experts' limit"
            yield with_shared("E5", routed, activation=replace(act, limit=limit))
    if act.gated:
        crossed = "gate and up are exchanged in the shared experts"
        yield Variant("F1", "shared", crossed, partial(exchanged, given, "shared_w13"))
    for kind in get_args(ActivationKind):
        if kind != act.kind:
            other = f"the shared experts use {kind} instead of {act.kind}"
            yield with_shared("F6", other, activation=replace(act, kind=kind, alpha=1.0))
    if shared.bias:
        dropped = "the first shared bias is dropped"
        yield Variant("F5", "shared", dropped, partial(with_tensor, given, "shared_b13", torch.zeros_like))


def gates(given: Problem) -> Iterator[Variant]:
    """Another function of the gate's logits, or R under the gate too."""
    if given.spec.shared is not None and given.spec.shared.sigmoid_gate:
        for what, gate in _GATES:
            yield Variant("E1", "shared", f"the shared experts' gate {what}", partial(_gated, given, gate))
        yield Variant("E1", "output", "the shared experts' gate multiplies R too", partial(_gated, given, None))


def width_and_input(given: Problem) -> Iterator[Variant]:
    """Half of their width is used, or the layer's own sum is read."""
    if given.spec.shared is None:
        return
    half = given.spec.shared.intermediate_size // 2
    half_used = "only the first half of the shared experts' width is used"
    yield Variant(
        "E3", "shared", half_used,
        partial(with_tensor, given, "shared_w2", lambda w: torch.cat([w[:, :half], 0 * w[:, half:]], 1)),
    )  # fmt: skip
    latent = given.spec.experts.latent_size
    if latent is not None:
        yield Variant(
            "E6", "shared", f"the shared experts are as wide as the latent space: they read and write {latent} columns alone",
            partial(_in_latent_width, given, latent),
        )  # fmt: skip
    yield Variant(
        "C1", "shared", "the shared experts read x + R",
        lambda: _shared_of(given, given.tokens.hidden_states.double() + given.spec.scale * given.stages.routed_MH),
    )  # fmt: skip


def _in_latent_width(given: Problem, latent: int) -> Stages:
    """S of the first columns of x in the first columns of y."""
    weights, shared = dict(given.exact), given.spec.shared
    assert shared is not None
    x_MH = given.tokens.hidden_states.double().clone()
    x_MH[:, latent:] = 0.0
    shared_MH = shared_experts(x_MH, weights, shared)
    shared_MH[:, latent:] = 0.0
    return with_parts(given, shared_MH=shared_MH)


def shared_with(given: Problem, act: Act) -> Stages:
    """The law with another activation of the shared experts."""
    spec, weights, x_MH = given.spec, given.exact, given.tokens.hidden_states.double()
    shared = spec.shared
    assert shared is not None
    h = x_MH @ weights["shared_w13"].T
    h = h + weights["shared_b13"] if shared.bias else h
    y_MH = act(*halves_of(h, shared.activation, interleaved=False), shared.activation) @ weights["shared_w2"].T
    y_MH = y_MH + weights["shared_b2"] if shared.bias else y_MH
    if shared.sigmoid_gate:
        y_MH = y_MH * torch.sigmoid(x_MH @ weights["shared_gate"].T)
    return with_parts(given, shared_MH=y_MH)


def _overwritten(given: Problem, tp: int) -> Iterator[Variant]:
    """The routed experts' kernel wrote R, scaled or not, over the x that the shared experts read after it."""
    spec, stages = given.spec, given.stages
    assert spec.shared is not None
    of_r = "the shared experts read a buffer that holds R"
    yield Variant("C1", "shared", of_r, lambda: _shared_of(given, stages.routed_MH * spec.scale))
    if spec.scale != 1.0:
        yield Variant("C1", "shared", of_r, lambda: _shared_of(given, stages.routed_MH))
    if tp > 1 and not spec.shared.bias:
        for scale in {spec.scale, 1.0}:
            own_share = "the shared experts read a buffer that holds the rank's own share of R"
            yield Variant("C1", "shared", own_share, partial(_shared_of_shares, given, scale, tp))


def _shared_of(given: Problem, buffer_MH: Tensor) -> Stages:
    """The shared experts read another buffer than x."""
    assert given.spec.shared is not None
    return with_parts(given, shared_MH=shared_experts(buffer_MH, given.exact, given.spec.shared))


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
    return with_parts(given, shared_MH=total_MH)


def _gated(given: Problem, gate: Callable[[Tensor], Tensor] | None) -> Stages:
    """S with another gate; None: the lawful gate multiplies R as well."""
    x_MH, shared, stages = given.tokens.hidden_states.double(), given.spec.shared, given.stages
    assert shared is not None
    z_M1 = x_MH @ given.exact["shared_gate"].T
    if gate is None:
        return with_parts(given, routed_MH=stages.routed_MH * z_M1.sigmoid())
    return with_parts(
        given, shared_MH=shared_experts(x_MH, given.exact, replace(shared, sigmoid_gate=False)) * gate(z_M1)
    )
