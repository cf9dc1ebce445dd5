"""The unit in which a row's error is read, and the rows that have none: there a row beyond the limits is undecided.

A naive run whose router divides 0 by 0, or that leaves its dtype, says nothing about a right layer. Nor does one whose
logits lie so far apart in their dtype that rounding them turns the weights into anything: another right layer adds the
same products in another order, and gets other weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.problem import Problem, Ways
from harness.weights import DTYPES
from reference.spec import RouterPrecision, Routing

# scores that are 1, or grow evenly, for a large logit: there only logits below 0 are exponents
_FLAT_ABOVE = ("sigmoid", "sqrtsoftplus")


@dataclass(frozen=True, slots=True, eq=False)
class Yardstick:
    """naive_M: float64, the larger row error of the naive runs, NaN where one of them is not finite.

    loose_M: bool, rows whose chosen logits are a whole unit apart from their neighbours in the dtype that keeps them.
    """

    naive_M: Tensor
    loose_M: Tensor

    def cannot_judge(self, found_RMH: Tensor) -> Tensor:
        """Bool [R, M]. Loose logits excuse a number for another, and no NaN or infinity."""
        return self.naive_M.isnan() | (self.loose_M & found_RMH.isfinite().all(-1))

    def reasons(self, rows_RM: Tensor) -> Iterator[str]:
        """Why these rows are undecided, in words."""
        rows_M = rows_RM.any(0)
        blind, loose = int((rows_M & self.naive_M.isnan()).sum()), int((rows_M & ~self.naive_M.isnan()).sum())
        if blind:
            yield (
                f"{blind} {_rows(blind)} where the naive run itself is not finite (scores that all underflow, or sums "
                "beyond the dtype): a yardstick that is no number cannot judge"
            )
        if loose:
            yield (
                f"{loose} {_rows(loose)} whose logits are so large that neighbours in their dtype are 1 or more apart: "
                "rounding them makes the router weights arbitrary"
            )


def yardstick(given: Problem, ways: Ways, precision: RouterPrecision) -> Yardstick:
    return Yardstick(_finite(given, ways, precision), loose_logits(given, precision))


@functools.lru_cache(maxsize=64)
def _finite(given: Problem, ways: Ways, precision: RouterPrecision) -> Tensor:
    naive_M = given.naive_error(ways, precision)
    return naive_M.where(naive_M.isfinite(), torch.nan)


@functools.lru_cache(maxsize=64)
def loose_logits(given: Problem, precision: RouterPrecision) -> Tensor:
    """Bool [M]: tokens of which a chosen logit, kept as the page says, has its neighbours 1 or more away."""
    spec, stages, is_vision = given.spec, given.stages, given.tokens.is_vision
    eps = torch.finfo(given.dtype if precision.logits == "model" else DTYPES["fp32"]).eps
    chosen_MK = stages.logits_ME.gather(1, stages.topk_ids_MK)
    loose_M = _exponents(chosen_MK, spec.routing) * eps >= 1
    if spec.vision is None or is_vision is None:
        return loose_M
    return torch.where(is_vision, _exponents(chosen_MK, spec.vision.routing) * eps >= 1, loose_M)


def _exponents(chosen_MK: Tensor, routing: Routing) -> Tensor:
    """[M]: the largest number by whose error a weight may change, in size."""
    used_MK = chosen_MK.clamp(max=0.0) if routing.scoring_func in _FLAT_ABOVE else chosen_MK
    return used_MK.abs().amax(1) if used_MK.numel() else used_MK.new_zeros(len(used_MK))


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"
