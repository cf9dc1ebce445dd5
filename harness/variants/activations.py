"""Other activations: what a kernel makes of gate [*, I] and up [*, I] (None without a gate)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.problem import Problem
from harness.variants.experts import routed_with
from harness.variants.law import Act, Variant
from harness.variants.shared import shared_with
from reference.moe import activate
from reference.spec import Activation

_CLAMPS: tuple[tuple[str, tuple[bool, bool, bool, bool]], ...] = (
    ("clamp the gate on both sides", (True, True, True, True)),
    ("clamp the up half from above alone", (False, True, False, True)),
    ("clamp the gate alone", (False, True, False, False)),
    ("clamp the up half alone", (False, False, True, True)),
)

# The family, what they do, for which rules it is another function than the law's, and the function.
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


def activations(given: Problem) -> Iterator[Variant]:
    """Routed or shared experts with another function between their two products."""
    if given.spec.vision is None:
        for family, what, act in _others(given.spec.experts.activation, "F3"):
            yield Variant(family, "routed", f"the routed experts {what}", partial(routed_with, given, act))
    if given.spec.shared is not None:
        for family, what, act in _others(given.spec.shared.activation, "E5"):
            yield Variant(family, "shared", f"the shared experts {what}", partial(shared_with, given, act))


def _others(rule: Activation, clamp_family: str) -> Iterator[tuple[str, str, Act]]:
    """(family, what the experts do, the function) for each that differs from the rule's.

    clamp_family: of a clamp at wrong bounds.
    """
    for family, what, applies, act in _ACTS:
        if applies(rule):
            yield family, what, act
    if rule.clamp != "none":
        for what, bounds in _CLAMPS:
            yield clamp_family, what, partial(_clamped, bounds)


def _times(act: Tensor, up: Tensor | None, rule: Activation) -> Tensor:
    return act if up is None else act * (up + rule.up_offset)


def _bounded(up: Tensor | None, rule: Activation) -> Tensor:
    assert up is not None
    return up if rule.limit is None else up.clamp(-rule.limit, rule.limit)


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
