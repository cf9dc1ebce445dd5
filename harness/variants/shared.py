"""The shared experts: their rule, their gate, and the buffer that they read. Each yields nothing without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from harness.layout import Layout
from harness.parts import rank_shares
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


def rules(given: Problem) -> Iterator[Variant]:
    """One field of the shared experts or of their activation is wrong, or a bias is dropped."""
    shared = given.spec.shared
    if shared is None:
        return
    act = shared.activation

    def with_shared(family: str, sentence: str, **changes: object) -> Variant:
        spec = replace(given.spec, shared=replace(shared, **changes))  # type: ignore[arg-type]
        return Variant(family, "shared", sentence, partial(run, given, spec=spec))

    if shared.sigmoid_gate:
        yield with_shared("E1", "the shared experts' sigmoid gate is dropped", sigmoid_gate=False)
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
    """Half of their width is used, or that of another space."""
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


def other_buffers(given: Problem, layout: Layout | None) -> Iterator[Variant]:
    """The routed experts wrote R, or a rank's own share of it, over the x that the shared experts read after it, or added
    it there; scaled or not.
    """
    if given.spec.shared is None:
        return
    x_MH, stages = given.tokens.hidden_states.double(), given.stages
    scales = list(dict.fromkeys((given.spec.scale, 1.0)))
    cut = layout is not None and layout.grid.dp == layout.grid.sp == 1 < layout.grid.tp and not given.spec.shared.bias
    for added in (False, True):
        base_MH = x_MH if added else torch.zeros_like(x_MH)
        what = "x + {}" if added else "a buffer that holds {}"
        for scale in scales:
            told = f"the shared experts read {what.format('R')}"
            yield Variant("C1", "shared", told, partial(_shared_of, given, base_MH + scale * stages.routed_MH))
        for scale in scales if cut else ():
            assert layout is not None
            own = "the rank's own share of R"
            told = f"the shared experts read {what.format(own)}"
            yield Variant("C1", "shared", told, partial(_shared_of_shares, given, layout, base_MH, scale))


def _shared_of(given: Problem, buffer_MH: Tensor) -> Stages:
    """The shared experts read another buffer than x."""
    assert given.spec.shared is not None
    return with_parts(given, shared_MH=shared_experts(buffer_MH, given.exact, given.spec.shared))


def _shared_of_shares(given: Problem, layout: Layout, base_MH: Tensor, scale: float) -> Stages:
    """Each rank's piece of the shared experts reads the rank's own share of R beside base_MH."""
    shared, weights, grid = given.spec.shared, given.exact, layout.grid
    assert shared is not None
    total_MH, width = torch.zeros_like(given.stages.output_MH), shared.intermediate_size // grid.shared_tp
    held = {part.shard: part.value_MH for part in rank_shares(given, layout) if part.name == "routed"}
    for rank in range(grid.tp):
        own, columns = torch.zeros_like(weights["shared_w2"]), slice(rank * width, (rank + 1) * width)
        own[:, columns] = weights["shared_w2"][:, columns]
        buffer_MH = base_MH + scale * held.get(rank, torch.zeros_like(base_MH))
        total_MH = total_MH + shared_experts(buffer_MH, {**weights, "shared_w2": own}, shared)
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
