"""Who multiplies an expert's result by its router weight and adds the K results of a token.

N tokens on this rank, K top-k, P kernel width, E experts of this rank, B rows of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from harness.runner.precision import wide


class Batch(NamedTuple):
    """Where the slots of N tokens lie in rows sorted by expert: slot j is row at_j of expert e_j, for token n_j.

    Slots of experts that are not here have no entry.    rows: N.
    """

    n_J: Tensor
    k_J: Tensor
    e_J: Tensor
    at_J: Tensor
    rows: int


def sort_by_expert(x_NP: Tensor, local_NK: Tensor, experts: int) -> tuple[Tensor, Batch]:
    """[E, B, P] with NaN in rows that belong to nobody, so that a sum that reads one shows it; B = 1 at least."""
    n_J, k_J = (local_NK >= 0).nonzero(as_tuple=True)
    e_J = local_NK[n_J, k_J].long()
    mine_JE = torch.nn.functional.one_hot(e_J, experts) if experts else e_J.new_zeros(0, 0)
    at_J = (mine_JE.cumsum(0) * mine_JE).sum(-1) - 1
    longest = int(at_J.max()) + 1 if len(at_J) else 1
    x_EBP = x_NP.new_full((experts, longest, x_NP.shape[1]), torch.nan)
    x_EBP[e_J, at_J] = x_NP[n_J]
    return x_EBP, Batch(n_J, k_J, e_J, at_J, x_NP.shape[0])


class TopKWeightAndReduceNoOP:
    """The experts have done it."""

    def apply(self, y_NP: Tensor, weights_NK: Tensor, batch: Batch | None) -> Tensor:
        return y_NP


class TopKWeightAndReduceContiguous:
    """[N, K, P] -> [N, P]: slot by slot, each rounded to the dtype before the sum in fp32."""

    def apply(self, y_NKP: Tensor, weights_NK: Tensor, batch: Batch | None) -> Tensor:
        dtype = y_NKP.dtype
        return wide((wide(y_NKP) * weights_NK[:, :, None]).to(dtype)).sum(1).to(dtype)


class TopKWeightAndReduceNaiveBatched:
    """[E, B, P] -> [N, P]: each slot's row back to its token."""

    def apply(self, y_EBP: Tensor, weights_NK: Tensor, batch: Batch | None) -> Tensor:
        assert batch is not None  # rows sorted by expert come with the way back
        dtype = y_EBP.dtype
        y_JP = wide(y_EBP[batch.e_J, batch.at_J]) * weights_NK[batch.n_J, batch.k_J][:, None]
        y_NP = y_JP.new_zeros(batch.rows, y_EBP.shape[2])
        return y_NP.index_add_(0, batch.n_J, wide(y_JP.to(dtype))).to(dtype)


class TopKWeightAndReduceDelegate:
    """The prepare/finalize decides: it puts its own kind in this one's place."""

    def apply(self, y: Tensor, weights_NK: Tensor, batch: Batch | None) -> Tensor:
        raise TypeError("TopKWeightAndReduceDelegate adds nothing itself: a finalize has to replace it")


TopKWeightAndReduce = (
    TopKWeightAndReduceNoOP
    | TopKWeightAndReduceContiguous
    | TopKWeightAndReduceNaiveBatched
    | TopKWeightAndReduceDelegate
)
