"""Prepare and finalize: how tokens reach the ranks that hold their experts, and how the results come home.

Each class below answers for every call whether what it returns is reduced, which index dtype it wants and whether
others may run while its results are on their way; and it announces its collectives, so that a ledger can be held against
them. None of them knows what an expert computes.

M tokens of this rank, N rows that reach it, K top-k, P kernel width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from harness.runner.weight_and_reduce import Batch, TopKWeightAndReduce

# (op, group) of a collective, as the ledger tells it
Announced = tuple[str, str]


@dataclass(slots=True, eq=False)
class Prepared:
    """What the experts of this rank get.

    x: [N, P], or [E, B, P] sorted by expert.    weights_NK, local_NK: for each row its router weights, and the place of
    each expert among this rank's, -1 elsewhere.    batch: the way back from rows sorted by expert.
    home: what the finalize needs to send the results back.
    """

    x: Tensor
    weights_NK: Tensor
    local_NK: Tensor
    batch: Batch | None = None
    home: Any = None


class FusedMoEPrepareAndFinalize(Protocol):
    """format: in which form it hands tokens over.    dispatch, combine: the collectives of one call, in order.

    output_is_reduced: what `receive` returns is the sum of all ranks for the caller's tokens, not a partial sum over tp.
    topk_indices_dtype: of the ids that `prepare` takes.    supports_async: others may run between `send` and `receive`.
    all_to_all: sends each token to the ranks of its experts alone.
    """

    format: Literal["standard", "batched"]
    dispatch: tuple[Announced, ...]
    combine: tuple[Announced, ...]
    output_is_reduced: bool
    topk_indices_dtype: torch.dtype
    supports_async: bool
    all_to_all: bool

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        """Tokens to their experts. ids_MK: physical ids, -1 for no expert."""

    def send(self, out: Tensor, prepared: Prepared, how: TopKWeightAndReduce) -> Any:
        """The experts' results on their way; what this returns goes to `receive`."""

    def receive(self, sent: Any, prepared: Prepared) -> Tensor:
        """[M, P] for the tokens that `prepare` got."""
