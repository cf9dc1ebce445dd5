"""The shared experts: one sharded MLP, run at exactly one of several moments, its output handed over once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from harness.comm import Communicator
from harness.runner.experts import activate
from harness.runner.plan import SharedExpertsOrder
from harness.runner.precision import wide
from reference.spec import Shared


class SharedMLP:
    """[M, H] -> this rank's partial sum over tp [M, H]. The sigmoid gate is replicated and commutes with that sum."""

    def __init__(self, weights: Mapping[str, Tensor], shared: Shared, rank: int, tp: int) -> None:
        share = shared.intermediate_size // tp
        start = rank * share
        halves = 2 if shared.activation.gated else 1

        def rows(stored: Tensor) -> Tensor:
            return stored.view(halves, shared.intermediate_size, *stored.shape[1:])[:, start : start + share].flatten(
                0, 1
            )

        self._activation = shared.activation
        self._w13 = wide(rows(weights["shared_w13"]))
        self._w2 = wide(weights["shared_w2"][:, start : start + share])
        self._b13 = wide(rows(weights["shared_b13"])) if shared.bias else None
        # every rank's copy of the bias would be added once per rank
        self._b2 = wide(weights["shared_b2"]) if shared.bias and rank == 0 else None
        self._gate = wide(weights["shared_gate"]) if shared.sigmoid_gate else None

    def __call__(self, x_MH: Tensor) -> Tensor:
        dtype = x_MH.dtype
        wide_MH = wide(x_MH)
        h = functional.linear(wide_MH, self._w13, self._b13).to(dtype)
        y_MH = functional.linear(wide(activate(h, self._activation)), self._w2, self._b2).to(dtype)
        if self._gate is None:
            return y_MH
        return (torch.sigmoid(functional.linear(wide_MH, self._gate)) * wide(y_MH)).to(dtype)


class SharedExperts:
    """Runs the shared module when its moment comes and keeps the output until it is read, one for each micro-batch.

    `run` is called at every moment with that moment's order and acts on the planned one alone, so the module runs once
    a call. Raises RuntimeError if the module reduces its own output (the runner would add it tp times), if it is to run
    while an output of the same micro-batch waits, or if an output is read that was never made.
    """

    def __init__(self, module: Callable[[Tensor], Tensor], comm: Communicator) -> None:
        self._module = module
        self._comm = comm
        self._outputs: dict[int, Tensor] = {}

    def run(self, planned: SharedExpertsOrder, moment: SharedExpertsOrder, x_MH: Tensor, micro_batch: int = 0) -> None:
        if planned is not moment:
            return
        if micro_batch in self._outputs:
            raise RuntimeError(
                f"shared experts run at {moment.name} while the output of an earlier run waits to be read"
            )
        calls = self._collectives()
        self._outputs[micro_batch] = self._module(x_MH)
        if self._collectives() != calls:
            raise RuntimeError(
                "the shared experts reduce their own output; the runner reduces it too, so S would count tp times. "
                "Build their last projection without a reduction"
            )

    def _collectives(self) -> int:
        """How many this rank has called, on any group."""
        return self._comm.tp.calls + self._comm.dp.calls + self._comm.ep.calls

    def take(self, micro_batch: int = 0) -> Tensor:
        """The output of that micro-batch, once."""
        if micro_batch not in self._outputs:
            raise RuntimeError("the shared experts' output is read before they ran")
        return self._outputs.pop(micro_batch)
