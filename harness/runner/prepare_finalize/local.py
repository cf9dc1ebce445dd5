"""Without any transport: every rank sees all tokens and computes what its own weights contribute."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from harness.runner.prepare_finalize import Announced, Prepared
from harness.runner.weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNaiveBatched,
    sort_by_expert,
)


class NoDPEP:
    """The tokens stay where they are. local_E: physical id -> local id, None where all experts are here."""

    format: Literal["standard", "batched"] = "standard"
    dispatch: tuple[Announced, ...] = ()
    combine: tuple[Announced, ...] = ()
    output_is_reduced = False
    topk_indices_dtype = torch.int32
    supports_async = False
    all_to_all = False

    def __init__(self, local_E: Tensor | None) -> None:
        self._local_E = local_E

    def gather(self, *rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """The rows that this rank computes on, here its own, and what `scatter` needs to bring their results back."""
        return rows, None

    def scatter(self, out_NP: Tensor, home: Any) -> Tensor:
        return out_NP

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        (x_NP, weights_NK, ids_NK), home = self.gather(x_MP, weights_MK, ids_MK)
        local_NK = ids_NK if self._local_E is None else self._local_E[ids_NK]
        return Prepared(x_NP, weights_NK, local_NK, None, home)

    def send(self, out: Tensor, prepared: Prepared, how: TopKWeightAndReduce) -> Tensor:
        if isinstance(how, TopKWeightAndReduceDelegate):
            how = TopKWeightAndReduceContiguous()
        return self.scatter(how.apply(out, prepared.weights_NK, prepared.batch), prepared.home)

    def receive(self, sent: Tensor, prepared: Prepared) -> Tensor:
        return sent


class Batched(NoDPEP):
    """The same, with the rows sorted by expert. experts: how many this rank holds."""

    format: Literal["standard", "batched"] = "batched"

    def __init__(self, local_E: Tensor | None, experts: int) -> None:
        super().__init__(local_E)
        self._experts = experts

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        flat = super().prepare(x_MP, weights_MK, ids_MK)
        x_EBP, batch = sort_by_expert(flat.x, flat.local_NK, self._experts)
        return Prepared(x_EBP, flat.weights_NK, flat.local_NK, batch, flat.home)

    def send(self, out: Tensor, prepared: Prepared, how: TopKWeightAndReduce) -> Tensor:
        if isinstance(how, TopKWeightAndReduceDelegate):
            how = TopKWeightAndReduceNaiveBatched()
        return super().send(out, prepared, how)
