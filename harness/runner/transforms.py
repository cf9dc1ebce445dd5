"""Routed input and output transforms: the latent projections around the routed experts. Replicated on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from harness.runner.precision import wide


@dataclass(frozen=True, slots=True, eq=False)
class LatentProjection:
    """x W^T + b. reduce_commutative: whether it may run on a rank's partial sum, that is, whether it has no bias."""

    weight: Tensor
    bias: Tensor | None

    @property
    def reduce_commutative(self) -> bool:
        return self.bias is None

    def __call__(self, x: Tensor, unit: float = 1.0) -> Tensor:
        """unit: of x; the bias is added in the same one, so that a result in units of s stays one."""
        bias = None if self.bias is None else wide(self.bias) * unit
        return functional.linear(wide(x), wide(self.weight), bias).to(x.dtype)
