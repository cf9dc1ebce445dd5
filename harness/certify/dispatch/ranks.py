"""One layer on all ranks of a grid, and its calls; nothing is stacked or taken for known.

m rows of a rank, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.case import parse_grid
from harness.certify.dispatch.axes import Layer, State, moved, settings_of, spec_of
from harness.certify.dispatch.world import Rows, logits, places, read, tokens, told_by_logits, weights_of
from harness.certify.law import Ledger
from harness.certify.stacked import described
from harness.certify.states import batches_of, before
from harness.comm import Communicator
from harness.comm.simulated import run_ranks
from harness.runner.layer import FusedMoE, Kernel
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.router import FusedMoERouter


class Kernels:
    """Kernels and routers of one rank, kept for layers that ask for the same; each kernel as its parts were when it was
    made.
    """

    def __init__(self) -> None:
        self._made: dict[object, tuple[FusedMoEKernel, object]] = {}
        self._routers: dict[object, FusedMoERouter] = {}

    def router(self, real: FusedMoERouter, top_k: int) -> FusedMoERouter:
        """One that is told, in the place of one like this."""
        return self._routers.setdefault(described(real), told_by_logits(real, top_k))

    def get(self, asked: object) -> FusedMoEKernel | None:
        found = self._made.get(asked)
        return None if found is None else found[0]

    def put(self, asked: object, kernel: FusedMoEKernel) -> None:
        self._made[asked] = kernel, _parts(kernel)

    @property
    def unchanged(self) -> bool:
        """No call has left anything behind in one of them."""
        return all(_parts(kernel) == parts for kernel, parts in self._made.values())


def _parts(kernel: FusedMoEKernel) -> object:
    """The attributes of a kernel, its transport and its experts, down to the innermost, by identity."""
    transport: Any = kernel.prepare_finalize
    owners = (kernel, transport, getattr(transport, "_inner", None), kernel.experts)
    return [
        sorted((name, id(value)) for name, value in owner.__dict__.items()) for owner in owners if owner is not None
    ]


class DispatchLayer(FusedMoE):
    """The real layer with a router that is told by the logits. kernels: kept for it, made anew without."""

    def __init__(self, layer: Layer, kernel: str, comm: Communicator, kernels: Kernels | None = None) -> None:
        self._state, self._kernels, self._told = layer, kernels, False
        settings = settings_of(layer, kernel)
        super().__init__(spec_of(layer), settings, weights_of(layer.grid, layer.beside), comm)
        self.runner.router = self._router

    def make_kernel(self, backend: Kernel, placement: Placement | None) -> FusedMoEKernel:
        if not self._told:
            told = told_by_logits if self._kernels is None else self._kernels.router
            self._router, self._told = told(self._router, self._spec.routing.top_k), True
        if self._kernels is None:
            return super().make_kernel(backend, placement)
        asked = (backend, placement, self._settings)
        kernel = self._kernels.get(asked)
        if kernel is None:
            kernel = super().make_kernel(backend, placement)
            self._kernels.put(asked, kernel)
        return kernel

    def call(self, history: str, rows: str) -> Tensor:
        """[m, H]: this rank's tokens, whole or in two micro-batches, junk behind them cut off."""
        state, rank, junk = self._state, self._comm.rank, rows == "junk"
        x_mH, logits_mE = tokens(state.grid, rank, junk), logits(state.grid, state.beside == "zero", rank, junk)
        if batches_of(history) > 1:
            batches = list(zip(x_mH.tensor_split(2), logits_mE.tensor_split(2), strict=True))
            return torch.cat(self.runner.forward_micro_batches(batches))
        if not junk:
            return self.runner.forward(x_mH, logits_mE)
        own = len(places(state.grid)[rank])
        return self.runner.forward(x_mH, logits_mE, own)[:own]


def alone(state: State) -> tuple[Rows, list[Ledger]]:
    """A state from its beginning, in a layer of its own: the coefficients of all ranks' rows, and the ledger of each.

    The call before the one of the state is left out of the ledger. Raises what the layer raises.
    """
    layer, call = state
    skipped = [0] * parse_grid(layer.grid).ranks

    def body(comm: Communicator) -> Tensor:
        earlier = before(call.history)
        built = DispatchLayer(layer, earlier or call.kernel, comm)
        if earlier is not None or layer.placement == "moved":
            built.call("first", "whole")
        if earlier is not None:
            built.swap_kernel(call.kernel)  # type: ignore[arg-type]  # a word of CALL_AXES
        if layer.placement == "moved":
            built.place(moved(layer.grid))
        skipped[comm.rank] = calls(comm)
        return built.call(call.history, call.rows)

    ranks = run_ranks(parse_grid(layer.grid), body)
    outputs = ranks.unwrap()
    entries = [entries[skip:] for entries, skip in zip(ranks.ledger, skipped, strict=True)]
    return read(layer.grid, outputs), [tuple((each.op, each.group) for each in rank) for rank in entries]


def calls(comm: Communicator) -> int:
    """How many collectives this rank has called."""
    return comm.tp.calls + comm.ep.calls + comm.dp.calls
