"""Weights in the wrong place: cut wrongly for the ranks, read from other rows, or those of another expert.

A cut says which of the I columns of w2, rows of gate and rows of up stand where the law has 0 to I - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from harness.problem import Problem
from harness.variants.law import Variant, run, with_tensor
from reference.moe import Stages


class _Cut(NamedTuple):
    """Rows of gate, rows of up and columns of w2, each int64 [I]; rows of up count from I on where w13 is cut as one."""

    family: str
    sentence: str
    gate: Tensor
    up: Tensor
    down: Tensor


def cuts(given: Problem, tp: int) -> Iterator[Variant]:
    """Experts or shared experts whose weights are cut for the ranks in a wrong way."""
    owners = []
    if given.spec.vision is None:  # whose experts may have another width
        owners.append(("routed", "", given.spec.experts.intermediate_size, given.spec.experts.activation.gated))
    if given.spec.shared is not None:
        shared = given.spec.shared
        owners.append(("shared", "shared_", shared.intermediate_size, shared.activation.gated))
    for who, prefix, width, gated in owners:
        for cut in (*(_misread(width, who == "shared") if gated else ()), *(_cuts(width, tp, gated) if tp > 1 else ())):
            sentence = f"{cut.sentence} in the {who} experts"
            yield Variant(cut.family, who, sentence, partial(_sliced, given, prefix, width, cut))


def neighbours(given: Problem) -> Iterator[Variant]:
    """Weights swapped between experts."""
    for name in ("w13", "w2", "b13", "b2") if given.spec.experts.bias else ("w13", "w2"):
        for shift, which in ((1, "before"), (-1, "after")):
            yield Variant(
                "F7", "routed", f"every expert has the {name} of the one {which} it",
                partial(with_tensor, given, name, partial(torch.roll, shifts=shift, dims=0)),
            )  # fmt: skip


def _misread(width: int, halved: bool) -> Iterator[_Cut]:
    """As `_cuts`, on one rank too. halved: w13 is stored gate first and may be taken for interleaved."""
    whole = torch.arange(width)
    late = torch.arange(1, 2 * width + 1) % (2 * width)
    yield _Cut("F2", "w13 is read from one row too late", late[:width], late[width:], whole)
    if halved:
        yield _Cut("F2", "w13 is read as interleaved, it is stored halved,", 2 * whole, 2 * whole + 1, whole)


def _cuts(width: int, tp: int, gated: bool) -> Iterator[_Cut]:
    """What several ranks can get wrong: each takes a share of I, but not the same one of every matrix."""
    whole = torch.arange(width)
    share = width // tp
    for shift, which in ((-share, "next"), (share, "previous")):
        if shift == -share or tp > 2:
            sentence = f"w2's share is that of the {which} rank from w13's"
            yield _Cut("F9", sentence, whole, whole + width, whole.roll(shift))
    first = whole % share
    yield _Cut("F9", "every rank has rank 0's share of w2", whole, whole + width, first)
    yield _Cut("F9", "every rank has rank 0's share of w13", first, first + width, whole)
    every_tpth = whole.view(share, tp).T.flatten()
    yield _Cut("F9", "w2 is cut into every tp-th column, w13 into blocks,", whole, whole + width, every_tpth)
    if gated:
        blocks = torch.arange(2 * width).view(tp, 2, share)
        one_block = "w13 is cut for the ranks as one block, which mixes gate and up,"
        yield _Cut("F9", one_block, blocks[:, 0].flatten(), blocks[:, 1].flatten(), whole)
        for rank in range(tp):
            mine = whole // share == rank
            gate, up = torch.where(mine, whole + width, whole), torch.where(mine, whole, whole + width)
            yield _Cut("F1", f"gate and up are exchanged on rank {rank} alone", gate, up, whole)


def _sliced(given: Problem, prefix: str, width: int, cut: _Cut) -> Stages:
    """The law with the rows and columns of a cut.    prefix: of the tensors' names, "" or "shared_"."""
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
            order = torch.cat([cut.gate, cut.up]) if rows == 2 * width else cut.gate
            target = torch.arange(len(order))
            moved = tensor.index_select(dim, stored(order))
            weights[name] = torch.zeros_like(tensor).index_copy(dim, stored(target), moved)
        elif bare == prefix + "w2":
            weights[name] = tensor.index_select(tensor.dim() - (2 if transposed else 1), cut.down)
    return run(given, weights=weights)
