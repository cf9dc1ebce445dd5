"""Naive dispatch and combine: everybody gathers everybody's rows, computes what its weights contribute, and a
reduce-scatter brings each rank the sum for its own rows.

Over dp, since the tp ranks of a group hold the same rows; over ep under sequence parallelism, where they do not.
Source: the allgather_reducescatter backend of vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.comm import Group
from harness.runner.prepare_finalize.local import Batched, NoDPEP


class _Gathered(NoDPEP):
    """The gathering half. The number of rows of each rank travels first: ranks may hold different numbers, or none."""

    _group: Group

    def _over(self, group: Group, tensors: int) -> None:
        """tensors: how many go out, each in a collective of its own."""
        self._group = group
        self.dispatch = (("all_gather", group.name),) * (1 + tensors)
        self.combine = (("reduce_scatter", group.name),)

    def gather(self, *rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        sizes = self._group.all_gather(torch.tensor([rows[0].shape[0]])).tolist()
        return tuple(self._group.all_gather(each) for each in rows), sizes

    def scatter(self, out_NP: Tensor, home: Any) -> Tensor:
        return self._group.reduce_scatter(out_NP, 0, home)


class Naive(_Gathered):
    """tensors: three in a modular kernel (rows, weights, ids), two in a monolithic one (rows, logits)."""

    def __init__(self, local_E: Tensor | None, group: Group, tensors: int = 3) -> None:
        super().__init__(local_E)
        self._over(group, tensors)


class NaiveBatched(_Gathered, Batched):
    """The same, with the rows sorted by expert once they have arrived."""

    def __init__(self, local_E: Tensor | None, experts: int, group: Group) -> None:
        Batched.__init__(self, local_E, experts)
        self._over(group, 3)
