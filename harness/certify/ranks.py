"""One state on ranks that are apart: the real layer on each, its real transports, real collectives. Only experts are labels.

Slower than `stacked`, and without any of its assumptions: it is what a replay runs.

N rows that reached a rank, K slots, P kernel width, E local experts, B rows of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.case import parse_grid
from harness.certify.law import Coefficients, Ledger
from harness.certify.states import LayerState, State, batches_of, before, settings_of, spec_of
from harness.certify.world import DTYPES, LATENT_LABEL, LATER, junk, logits_of, seats, weights_of, world
from harness.comm import Communicator
from harness.comm.simulated import run_ranks
from harness.runner.experts import BatchedExperts, ExpertWeights, MonolithicExperts, TorchExperts
from harness.runner.layer import FusedMoE, Kernel
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.plan import Reduced
from harness.runner.shared_experts import SharedExperts


def on_ranks(state: State) -> tuple[list[Coefficients], list[Ledger]]:
    """The coefficients of each micro-batch, and the ledger of each rank. Raises what the layer raises.

    The calls of a swap before the last one are left out of the ledger.
    """
    layer, call = state
    grid = world(layer.grid)
    dtype = DTYPES[call.dtype]
    one_nH = grid.tokens(dtype)
    tokens = [one_nH, one_nH * LATER][: batches_of(call.history)]
    first = before(call.history) or call.kernel
    skipped: list[int] = [0] * grid.sizes.ranks

    def body(comm: Communicator) -> list[Tensor]:
        built = _LabelledLayer(layer, first, comm)
        mine = [x_nH[comm.rank : comm.rank + 1] for x_nH in tokens]
        if first != call.kernel:
            built.runner.forward(mine[0], logits_of(layer))
            built.swap_kernel(call.kernel)  # type: ignore[arg-type]
        skipped[comm.rank] = comm.tp.calls + comm.ep.calls + comm.dp.calls
        batches = [(each, logits_of(layer)) for each in mine]
        runner = built.runner
        results = runner.forward_micro_batches(batches) if len(batches) > 1 else [runner.forward(*batches[0])]
        assert runner.last_plan is not None
        if runner.last_plan.routed_reduced is Reduced.BY_CALLER:
            results = [comm.tp.all_reduce(each) for each in results]
        return results

    ranks = run_ranks(parse_grid(layer.grid), body)
    rows = ranks.unwrap()
    whole = [torch.cat(batch) for batch in zip(*rows, strict=True)]
    ledgers = [
        tuple((entry.op, entry.group) for entry in entries[skip:])
        for entries, skip in zip(ranks.ledger, skipped, strict=True)
    ]
    return [grid.read(y_nH, x_nH) for y_nH, x_nH in zip(whole, tokens, strict=True)], ledgers


class _LabelledLayer(FusedMoE):
    """The real layer, in whose kernels the experts' products are replaced by labels, and the shared module likewise."""

    def __init__(self, layer: LayerState, kernel: str, comm: Communicator) -> None:
        self._state = layer
        super().__init__(spec_of(layer), settings_of(layer, kernel), weights_of(layer), comm)
        if self.runner.shared_experts is not None:
            grid = world(layer.grid)
            label_H = torch.zeros(grid.hidden)
            label_H[seats(grid.sizes.ranks)[2].start + comm.rank] = 1.0
            self.runner.shared_experts = SharedExperts(lambda x_MH: (label_H * x_MH[:, :1]).to(x_MH.dtype), comm)

    def make_kernel(self, backend: Kernel, placement: Placement | None) -> FusedMoEKernel:
        kernel = super().make_kernel(backend, placement)
        experts: Any = kernel.experts
        if isinstance(experts, BatchedExperts):
            label_EP = self._labels(experts.weights)[:-1]
            experts.apply = lambda x_EBP: (label_EP[:, None] * x_EBP[:, :, :1]).to(x_EBP.dtype)  # type: ignore[method-assign]
            return kernel
        inner = experts._inner if isinstance(experts, MonolithicExperts) else experts
        assert isinstance(inner, TorchExperts)
        label_EP = self._labels(inner.weights)
        inner._slots = lambda x_NP, local_NK: label_EP[local_NK] * x_NP[:, None, :1].float()  # type: ignore[method-assign]
        return kernel

    def _labels(self, weights: ExpertWeights) -> Tensor:
        """[E + 1, P]: the columns of this rank's experts, of the biases that it really holds; the last row is no expert's."""
        state, rank = self._state, self._comm.rank
        grid = world(state.grid)
        routed, bias, shared = seats(grid.sizes.ranks)
        pad = int(state.pad)
        label_EP = torch.zeros(weights.w2_EPi.shape[0] + 1, weights.w2_EPi.shape[1] - pad)
        label_EP[0, routed.start + rank] = 1.0
        label_EP[0, bias.start + rank] = float(_holds_bias(state, weights, self._parallel.moe_tp_rank))
        if self._settings.fuse_shared_experts:
            label_EP[1, shared.start + rank] = 1.0
        if state.latent != "none":
            label_EP /= LATENT_LABEL
        label_EP = junk(label_EP, pad)
        label_EP[-1] = 0.0
        return label_EP


def _holds_bias(state: LayerState, weights: ExpertWeights, moe_tp_rank: int) -> bool:
    """By its weights; a layer without biases is asked as one with them, since its runner sees no difference."""
    if weights.b2_EP is None:
        return moe_tp_rank == 0
    return bool(weights.b2_EP[0, 0] != 0)
