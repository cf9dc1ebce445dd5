"""Passthrough: the kernel moves tokens and adds the ranks' results inside, and returns what is complete."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from harness.comm import Group
from harness.runner.prepare_finalize import Prepared
from harness.runner.prepare_finalize.local import NoDPEP
from harness.runner.weight_and_reduce import TopKWeightAndReduce


class Passthrough:
    """inner: how the kernel moves tokens inside.    tp: over which it adds; None where the inner sum is complete.

    Simulated by the plain transport of the grid and the sum that the runner would make: who reduces differs, not what.
    """

    output_is_reduced = True
    supports_async = False
    all_to_all = False

    def __init__(self, inner: NoDPEP, tp: Group | None) -> None:
        self._inner = inner
        self._tp = tp
        self.format = inner.format
        self.topk_indices_dtype = inner.topk_indices_dtype
        self.dispatch = inner.dispatch
        self.combine = inner.combine if tp is None else (*inner.combine, ("all_reduce", tp.name))

    def gather(self, *rows: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        return self._inner.gather(*rows)

    def scatter(self, out_NP: Tensor, home: Any) -> Tensor:
        out_MP = self._inner.scatter(out_NP, home)
        return out_MP if self._tp is None else self._tp.all_reduce(out_MP)

    def prepare(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Prepared:
        return self._inner.prepare(x_MP, weights_MK, ids_MK)

    def send(self, out: Tensor, prepared: Prepared, how: TopKWeightAndReduce) -> Any:
        out_MP = self._inner.receive(self._inner.send(out, prepared, how), prepared)
        return out_MP if self._tp is None else self._tp.all_reduce(out_MP)

    def receive(self, sent: Any, prepared: Prepared) -> Tensor:
        received: Tensor = sent
        return received
