"""The output of a layer taken apart in float64: who contributes what before anybody scales or reduces.

Every part is the oracle's own forward with all other weights at zero, so this file knows no formula. Parts without a
rank are held in copy by all of them: a bias that each rank adds counts tp times.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.layout import Layout
from harness.problem import Problem
from reference.moe import Choice, Stages, forward
from reference.spec import MoESpec

# what each part is called in a formula
LETTERS = {
    "routed": "R", "shared": "S", "zero": "Z", "expert bias": "B", "latent bias": "b", "shared bias": "c", "input": "x",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """value_MH: what this part adds to y if it counts once, unscaled.    shard: the rank that holds it, None if all do.

    scaled: whether the law multiplies it by s.
    """

    name: str
    shard: int | None
    value_MH: Tensor
    scaled: bool


@functools.lru_cache(maxsize=64)
def parts(given: Problem) -> tuple[Part, ...]:
    """All parts of y that are not zero everywhere; y = sum of (s if scaled else 1) * value, times the output's share."""
    spec, stages, everything = given.spec, given.stages, _Weights(given.spec, given.exact)
    routed_MH, shared_MH = stages.routed_MH, stages.shared_MH
    found = [Part("zero", None, stages.zero_MH, True)]
    if spec.experts.bias:
        bias_MH = _forward(given, everything.without("w2", "fc2_latent_bias")).routed_MH
        found.append(Part("expert bias", None, bias_MH, True))
        routed_MH = routed_MH - bias_MH
    if spec.experts.latent_bias:
        found.append(Part("latent bias", None, stages.offset_H.expand_as(stages.output_MH), False))
    if spec.shared is not None and spec.shared.bias:
        bias_MH = _forward(given, everything.without("shared_w2")).shared_MH
        found.append(Part("shared bias", None, bias_MH, False))
        shared_MH = shared_MH - bias_MH
    found = [Part("routed", None, routed_MH, True), Part("shared", None, shared_MH, False), *found]
    return tuple(part for part in found if bool(part.value_MH.any()))


@functools.lru_cache(maxsize=16)
def shares(given: Problem, tp: int) -> tuple[Part, ...]:
    """The same, with the routed and the shared part cut into what each rank holds of them."""
    cut: list[Part] = []
    for shard in range(tp):
        only = _Weights(given.spec, given.exact).keep_columns(shard, tp)
        stages = _forward(given, only.without("b2", "fc2_latent_bias", "shared_b2"))
        cut.append(Part("routed", shard, stages.routed_MH, True))
        cut.append(Part("shared", shard, stages.shared_MH, False))
    whole = [part for part in parts(given) if part.name not in ("routed", "shared")]
    return tuple(part for part in (*cut, *whole) if bool(part.value_MH.any()))


@functools.lru_cache(maxsize=16)
def rank_shares(given: Problem, layout: Layout) -> tuple[Part, ...]:
    """The same on any grid: R by rank, its experts and its piece of them, and S by tp rank; () where no share is a rank's own.

    A share that no token needs is left out, like any part that is zero everywhere.
    """
    grid = layout.grid
    if grid.ep == grid.dp == 1:
        return shares(given, grid.tp)
    if layout.owners is None:
        return ()
    without_b2, cut = _Weights(given.spec, given.exact).without("b2", "fc2_latent_bias", "shared_b2"), []
    for rank in range(grid.ranks):
        ep_rank, piece = divmod(rank, grid.moe_tp)
        mine = tuple(e for e, owner in enumerate(layout.owners) if owner == ep_rank)
        only = _Weights(given.spec, without_b2).keep_columns(piece, grid.moe_tp, "w2").keep_experts(mine)
        cut.append(Part("routed", rank, _forward(given, only.without()).routed_MH, True))
        if given.spec.experts.bias and piece == 0:
            biases = _Weights(given.spec, given.exact).keep_experts(mine).without("w2", "fc2_latent_bias")
            cut.append(Part("expert bias", rank, _forward(given, biases).routed_MH, True))
    for shard in range(grid.tp):
        only = _Weights(given.spec, without_b2).keep_columns(shard, grid.tp, "shared_w2")
        cut.append(Part("shared", shard, _forward(given, only.without()).shared_MH, False))
    whole = [part for part in parts(given) if part.name not in ("routed", "shared", "expert bias")]
    return tuple(part for part in (*cut, *whole) if bool(part.value_MH.any()))


def share_of(given: Problem, layout: Layout, part: str, share: int) -> Problem:
    """The same layer with nothing but one share of "routed" or "shared"; every token keeps its lawful experts."""
    assert layout.owners is not None  # where experts have several ranks, no share is a rank's own
    if part == "shared":
        kept = _Weights(given.spec, given.exact).keep_columns(share, layout.grid.tp, "shared_w2")
        exact = kept.without("w2", "b2", "fc2_latent_bias", *(("shared_b2",) if share else ()))
        return replace(given, exact=exact, stages=_forward(given, exact))
    ep_rank, piece = divmod(share, layout.grid.moe_tp)
    mine = tuple(e for e, owner in enumerate(layout.owners) if owner == ep_rank)
    kept = _Weights(given.spec, given.exact).keep_columns(piece, layout.grid.moe_tp, "w2").keep_experts(mine)
    others = ("fc2_latent_bias", "shared_w2", "shared_b2", *(("b2",) if piece else ()))
    exact = kept.without(*others)
    return replace(given, exact=exact, stages=_forward(given, exact))


def of_experts(given: Problem, experts: Sequence[int]) -> Problem:
    """The same layer with nothing but these experts; every token keeps its lawful ones."""
    exact = _Weights(given.spec, given.exact).keep_experts(experts).without("fc2_latent_bias", "shared_w2", "shared_b2")
    return replace(given, exact=exact, stages=_forward(given, exact))


def piece_of(given: Problem, layout: Layout, expert: int, piece: int) -> Tensor:
    """What one piece of one expert adds to y, [M, H], s and the output's share included."""
    kept = _Weights(given.spec, given.exact).keep_columns(piece, layout.grid.moe_tp, "w2").keep_experts((expert,))
    routed_MH = _forward(given, kept.without("b2", "fc2_latent_bias")).routed_MH
    return given.spec.output.share * given.spec.scale * routed_MH


def layer_input(given: Problem) -> Part:
    """The hidden states themselves, no part of the law."""
    return Part("input", None, given.tokens.hidden_states.double(), False)


@functools.lru_cache(maxsize=4)
def expert_parts(given: Problem) -> tuple[Tensor, ...]:
    """R of each expert alone, [M, H] each, for specs without a vision branch."""
    stages = given.stages
    alone = []
    for e in range(given.spec.routing.num_experts):
        weights_MK = stages.topk_weights_MK * (stages.topk_ids_MK == e)
        alone.append(_forward(given, given.exact, Choice(stages.topk_ids_MK, weights_MK, stages.margin_M)).routed_MH)
    return tuple(alone)


def _forward(given: Problem, weights: Mapping[str, Tensor], choice: Choice | None = None) -> Stages:
    """The oracle with other weights, along the lawful routes unless told otherwise."""
    x_MH, is_vision, stages = given.tokens.hidden_states, given.tokens.is_vision, given.stages
    choice = choice or Choice(stages.topk_ids_MK, stages.topk_weights_MK, stages.margin_M)
    return forward(given.spec, weights, x_MH, is_vision_M=is_vision, choice=choice)


class _Weights:
    """The stored weights with some of them at zero."""

    def __init__(self, spec: MoESpec, stored: Mapping[str, Tensor]) -> None:
        self._spec, self._stored = spec, dict(stored)

    def without(self, *names: str) -> dict[str, Tensor]:
        """Zeros for the tensors of these names, those of the vision branch included."""
        return {n: torch.zeros_like(t) if n.removeprefix("vision_") in names else t for n, t in self._stored.items()}

    def keep_experts(self, experts: Sequence[int]) -> _Weights:
        """Zero in w2 and b2 all experts but these."""
        kept = dict(self._stored)
        for name in ("w2", "b2", "vision_w2", "vision_b2"):
            if name in kept:
                kept[name] = torch.zeros_like(kept[name])
                kept[name][list(experts)] = self._stored[name][list(experts)]
        return _Weights(self._spec, kept)

    def keep_columns(self, rank: int, tp: int, *names: str) -> _Weights:
        """Zero in w2 and shared_w2, or in those that are named, all columns but those that rank holds."""
        kept = dict(self._stored)
        for name, tensor in self._stored.items():
            bare = name.removeprefix("vision_")
            if bare not in (names or ("w2", "shared_w2")):
                continue
            transposed = bare == "w2" and self._spec.experts.transposed
            dim = tensor.dim() - (2 if transposed else 1)
            share = tensor.shape[dim] // tp
            kept[name] = torch.zeros_like(tensor)
            kept[name].narrow(dim, rank * share, share).copy_(tensor.narrow(dim, rank * share, share))
        return _Weights(self._spec, kept)
