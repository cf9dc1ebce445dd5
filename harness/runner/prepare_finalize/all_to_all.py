"""All-to-all: each token travels to the ranks of its experts alone, and the combine adds what comes back.

What the caller gets is complete, so no runner may reduce it again. Four shapes, after the backends whose contract they
keep; none of them is that backend's code. All need whole experts on every rank of the group (ep = tp * dp).

M tokens of this rank, N rows that reach it, K top-k, P kernel width, D (row, destination) pairs, J (row, slot) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from harness.comm import Group
from harness.runner.placement import Placement
from harness.runner.precision import wide
from harness.runner.prepare_finalize import Announced, Prepared
from harness.runner.weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    sort_by_expert,
)

Exchange = tuple[list[int], Tensor]  # how many rows came from each rank, and the rows one after the other


class _AllToAll:
    """What the four have in common: who owns what, the exchange, the way home."""

    format: Literal["standard", "batched"] = "standard"
    dispatch: tuple[Announced, ...] = (("all_to_all_single", "ep"),) * 3
    combine: tuple[Announced, ...] = (("all_to_all_single", "ep"),)
    output_is_reduced = True
    topk_indices_dtype = torch.int64
    supports_async = True
    all_to_all = True

    def __init__(self, placement: Placement, group: Group) -> None:
        self._group = group
        self._owner_E = placement.owner_map()
        self._local_E = placement.local_map()

    def _exchange(self, rows: Tensor, counts: Sequence[int]) -> Exchange:
        """rows: those for rank 0, then those for rank 1, and so on."""
        received, from_each = self._group.all_to_all_single(rows, counts)
        return from_each, received

    def _routes(self, ids_MK: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Each row once for each rank that owns one of its experts: counts by rank, row and rank of each pair [D]."""
        owner_MK = self._owner_E[ids_MK]
        hits_MR = torch.zeros(ids_MK.shape[0], self._group.size + 1, dtype=torch.bool)
        hits_MR.scatter_(1, owner_MK.where(owner_MK >= 0, self._group.size), True)
        rank_D, row_D = hits_MR[:, :-1].T.nonzero(as_tuple=True)
        return rank_D.bincount(minlength=self._group.size).tolist(), row_D, rank_D

    def _local_to(self, ids_DK: Tensor, rank_D: Tensor | int) -> Tensor:
        """Local ids as the receiving rank counts them, -1 for slots that go elsewhere."""
        ranks = rank_D if isinstance(rank_D, int) else rank_D[:, None]
        return self._local_E[ids_DK].where(self._owner_E[ids_DK] == ranks, -1)

    def send(self, out: Tensor, prepared: Prepared, how: TopKWeightAndReduce) -> Tensor:
        if isinstance(how, TopKWeightAndReduceDelegate):
            how = TopKWeightAndReduceContiguous()
        from_each = prepared.home[0]
        return self._exchange(how.apply(out, prepared.weights_NK, prepared.batch), from_each)[1]

    def receive(self, sent: Tensor, prepared: Prepared) -> Tensor:
        """Each token's results from all ranks it went to, added in fp32 in the order of the ranks."""
        _, row_D, rows = prepared.home
        return _add_rows(sent, row_D, rows)


class DeepEPHTPrepareAndFinalize(_AllToAll):
    """High throughput: a row goes once to each rank, with its weights and ids; that rank adds its experts' results."""

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        counts, row_D, rank_D = self._routes(ids_MK)
        from_each, x_NP = self._exchange(x_MP[row_D], counts)
        _, weights_NK = self._exchange(weights_MK[row_D], counts)
        _, local_NK = self._exchange(self._local_to(ids_MK[row_D], rank_D), counts)
        return Prepared(x_NP, weights_NK, local_NK, None, (from_each, row_D, x_MP.shape[0]))


class DeepEPLLPrepareAndFinalize(_AllToAll):
    """Low latency: a row goes once for each of its slots, sorted by expert; the combine at home weighs and adds."""

    format: Literal["standard", "batched"] = "batched"
    dispatch: tuple[Announced, ...] = (("all_to_all_single", "ep"),) * 2

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        owner_MK = self._owner_E[ids_MK]
        row_J, k_J = (owner_MK >= 0).nonzero(as_tuple=True)
        by_owner_J = owner_MK[row_J, k_J].argsort(stable=True)
        row_J, k_J = row_J[by_owner_J], k_J[by_owner_J]
        counts = owner_MK[row_J, k_J].bincount(minlength=self._group.size).tolist()
        from_each, x_NP = self._exchange(x_MP[row_J], counts)
        _, local_N = self._exchange(self._local_E[ids_MK[row_J, k_J]], counts)
        here = int((self._owner_E[:-1] == self._group.rank).sum())
        x_EBP, batch = sort_by_expert(x_NP, local_N[:, None], here)
        home = (from_each, row_J, x_MP.shape[0], weights_MK[row_J, k_J])
        return Prepared(x_EBP, weights_MK, local_N[:, None], batch, home)

    def send(self, out: Tensor, prepared: Prepared, how: TopKWeightAndReduce) -> Tensor:
        if not isinstance(how, TopKWeightAndReduceDelegate):
            raise TypeError(f"the low-latency combine weighs and adds itself: {type(how).__name__} would do it twice")
        batch = prepared.batch
        assert batch is not None  # prepare sorts by expert
        rows_NP = out.new_empty(batch.rows, out.shape[2])
        rows_NP[batch.n_J] = out[batch.e_J, batch.at_J]
        return self._exchange(rows_NP, prepared.home[0])[1]

    def receive(self, sent: Tensor, prepared: Prepared) -> Tensor:
        _, row_J, rows, weights_J = prepared.home
        return _add_rows(wide(sent) * weights_J[:, None], row_J, rows, sent.dtype)


class NVLinkTwoSidedPrepareAndFinalize(_AllToAll):
    """Ids and weights of all ranks are gathered first; then each knows what will come, and rows travel once a rank."""

    dispatch: tuple[Announced, ...] = (*(("all_gather", "ep"),) * 3, ("all_to_all_single", "ep"))
    topk_indices_dtype = torch.int32
    supports_async = False

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        sizes = self._group.all_gather(torch.tensor([x_MP.shape[0]])).tolist()
        weights_AK, ids_AK = self._group.all_gather(weights_MK), self._group.all_gather(ids_MK)
        counts, row_D, _ = self._routes(ids_MK)
        from_each, x_NP = self._exchange(x_MP[row_D], counts)
        mine_AK = self._local_to(ids_AK, self._group.rank)
        coming_A = (mine_AK >= 0).any(-1)
        foretold = [int(part.sum()) for part in coming_A.split(sizes)]
        if foretold != from_each:
            raise RuntimeError(f"rows received from each rank: {from_each}; their ids had foretold {foretold}")
        home = (from_each, row_D, x_MP.shape[0])
        return Prepared(x_NP, weights_AK[coming_A], mine_AK[coming_A], None, home)


class NVLinkOneSidedPrepareAndFinalize(_AllToAll):
    """Each rank writes into a window of fixed size on the other: rows beyond those written are junk, with the id -1."""

    dispatch: tuple[Announced, ...] = (("all_gather", "ep"), *(("all_to_all_single", "ep"),) * 3)
    topk_indices_dtype = torch.int32
    supports_async = False

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        window = max(self._group.all_gather(torch.tensor([x_MP.shape[0]])).tolist())
        counts, row_D, rank_D = self._routes(ids_MK)
        ranks = self._group.size
        within_D = torch.arange(len(row_D)) - (torch.tensor(counts).cumsum(0) - torch.tensor(counts))[rank_D]
        at_D = rank_D * window + within_D
        x_WP = x_MP.new_full((ranks * window, x_MP.shape[1]), torch.nan)
        weights_WK = weights_MK.new_full((ranks * window, weights_MK.shape[1]), torch.nan)
        local_WK = ids_MK.new_full((ranks * window, ids_MK.shape[1]), -1)
        x_WP[at_D], weights_WK[at_D] = x_MP[row_D], weights_MK[row_D]
        local_WK[at_D] = self._local_to(ids_MK[row_D], rank_D).to(ids_MK.dtype)
        even = [window] * ranks
        (_, x_NP), (_, weights_NK), (_, local_NK) = (self._exchange(t, even) for t in (x_WP, weights_WK, local_WK))
        weights_NK = weights_NK.masked_fill(local_NK < 0, 0.0)  # no number may come from a row that nobody wrote
        return Prepared(x_NP, weights_NK, local_NK, None, (even, row_D, x_MP.shape[0], at_D))

    def receive(self, sent: Tensor, prepared: Prepared) -> Tensor:
        _, row_D, rows, at_D = prepared.home
        return _add_rows(sent[at_D], row_D, rows)


def _add_rows(rows_DP: Tensor, row_D: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """[rows, P]: the sum, in fp32 and in order, of what belongs to each row; 0 for a row without any."""
    wide_DP = wide(rows_DP)
    total = wide_DP.new_zeros(rows, rows_DP.shape[1])
    return total.index_add_(0, row_D, wide_DP).to(dtype or rows_DP.dtype)
