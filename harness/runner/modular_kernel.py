"""The fused kernel: one prepare/finalize joined with one kind of experts, both modular or both monolithic.

M tokens, P kernel width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.comm import Communicator
from harness.runner.experts import (
    BatchedExperts,
    ExpertWeights,
    MonolithicExperts,
    SlotExperts,
    TorchExperts,
    weigh_input,
)
from harness.runner.parallel import FusedMoEParallelConfig
from harness.runner.placement import Placement
from harness.runner.prepare_finalize import Announced, FusedMoEPrepareAndFinalize
from harness.runner.prepare_finalize.all_to_all import (
    DeepEPHTPrepareAndFinalize,
    DeepEPLLPrepareAndFinalize,
    NVLinkOneSidedPrepareAndFinalize,
    NVLinkTwoSidedPrepareAndFinalize,
)
from harness.runner.prepare_finalize.local import Batched, NoDPEP
from harness.runner.prepare_finalize.naive import Naive, NaiveBatched
from harness.runner.prepare_finalize.passthrough import Passthrough
from harness.runner.router import FusedMoERouter
from harness.runner.weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP

# A kernel at work: it yields once, when its results are on their way, and returns R [M, P].
Steps = Generator[None, None, Tensor]
T = TypeVar("T")


def finish(steps: Generator[None, None, T]) -> T:
    """Run without a pause to the end."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result


# the backend names of a case and of LayerSettings
ALL_TO_ALL: Mapping[str, type[Any]] = {
    "deepep_ht": DeepEPHTPrepareAndFinalize,
    "deepep_ll": DeepEPLLPrepareAndFinalize,
    "nvlink_one_sided": NVLinkOneSidedPrepareAndFinalize,
    "nvlink_two_sided": NVLinkTwoSidedPrepareAndFinalize,
}


MODULAR_EXPERTS: Mapping[str, type[TorchExperts] | type[BatchedExperts]] = {
    "fused": TorchExperts,
    "slots": SlotExperts,
    "batched": BatchedExperts,
}


class FusedMoEKernel:
    """A prepare/finalize and experts, joined. scale: s, where the kernel multiplies by it; None where another does.

    Raises ValueError if one of both is monolithic and the other is not, or if they disagree about the form of the rows.
    """

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalize,
        experts: TorchExperts | BatchedExperts | MonolithicExperts,
        *,
        scale: float | None = None,
        weight_on_input: bool = False,
    ) -> None:
        hands, takes = prepare_finalize.format, experts.format
        if takes == "monolithic" and not hasattr(prepare_finalize, "gather"):
            raise ValueError(
                f"{type(prepare_finalize).__name__} sends tokens where a router has sent them, and monolithic experts route "
                "by themselves: both modular or both monolithic. Choose modular experts, or a transport that gathers"
            )
        if takes != "monolithic" and hands != takes:
            raise ValueError(
                f"{type(prepare_finalize).__name__} hands over {hands} rows, {type(experts).__name__} takes {takes} ones: "
                f"choose {'batched' if hands == 'batched' else 'standard'} experts"
            )
        self.prepare_finalize = prepare_finalize
        self.experts = experts
        self.scale = scale
        self._weight_on_input = weight_on_input

    @property
    def is_monolithic(self) -> bool:
        return isinstance(self.experts, MonolithicExperts)

    @property
    def output_is_reduced(self) -> bool:
        """R is the sum of all ranks for this rank's tokens; else a partial sum over tp."""
        return self.prepare_finalize.output_is_reduced

    @property
    def supports_async(self) -> bool:
        return self.prepare_finalize.supports_async and not self.is_monolithic

    @property
    def all_to_all(self) -> bool:
        return self.prepare_finalize.all_to_all

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return self.prepare_finalize.topk_indices_dtype

    @property
    def scales(self) -> bool:
        return self.scale is not None

    @property
    def writes_input(self) -> bool:
        return self.experts.writes_input

    @property
    def width(self) -> int:
        return self.experts.width

    @property
    def announced(self) -> tuple[Announced, ...]:
        """The collectives of one call, in order."""
        return (*self.prepare_finalize.dispatch, *self.prepare_finalize.combine)

    def steps(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Steps:
        """R [M, P] in the dtype of x, from router weights and physical ids (-1: no expert)."""
        experts, how = self.experts, TopKWeightAndReduceNoOP() if self.experts.weighs else TopKWeightAndReduceDelegate()
        assert not isinstance(experts, MonolithicExperts)  # the runner asks is_monolithic
        if self.scale is not None:
            weights_MK = weights_MK * self.scale
        if self._weight_on_input:
            x_MP, weights_MK = weigh_input(x_MP, weights_MK)
        prepared = self.prepare_finalize.prepare(x_MP, weights_MK, ids_MK)
        if isinstance(experts, BatchedExperts):
            out = experts.apply(prepared.x)
        else:
            out = experts.apply(prepared.x, prepared.weights_NK, prepared.local_NK)
        sent = self.prepare_finalize.send(out, prepared, how)
        yield
        return self.prepare_finalize.receive(sent, prepared)

    def monolithic_steps(self, x_MP: Tensor, logits_ME: Tensor) -> Steps:
        """The same from logits: the kernel routes."""
        experts, transport = self.experts, self.prepare_finalize
        assert isinstance(experts, MonolithicExperts)
        assert isinstance(transport, NoDPEP | Passthrough)  # the constructor refuses others
        (x_NP, logits_NE), home = transport.gather(x_MP, logits_ME)
        out_MP = transport.scatter(experts.apply(x_NP, logits_NE, self.scale), home)
        yield
        return out_MP


def make_kernel(
    backend: str,
    kind: str,
    weights: ExpertWeights,
    placement: Placement | None,
    parallel: FusedMoEParallelConfig,
    comm: Communicator,
    router: FusedMoERouter,
    *,
    scale: float | None,
    weight_on_input: bool,
) -> FusedMoEKernel:
    """The kernel of a backend and a kind of experts (`LayerSettings.kernel`, `.experts`).

    placement: None where every rank holds a piece of all experts.    router: for a monolithic kernel.
    """
    if kind == "auto":
        kind = "batched" if backend == "deepep_ll" else "fused"
    local_E = None if placement is None else placement.expert_map(parallel.ep_rank)
    experts: TorchExperts | BatchedExperts | MonolithicExperts
    if kind == "monolithic":
        experts = MonolithicExperts(weights, router, local_E, weight_on_input)
    else:
        experts = MODULAR_EXPERTS[kind](weights)
    transport: FusedMoEPrepareAndFinalize
    if backend in ALL_TO_ALL:
        assert placement is not None  # check_settings demands whole experts
        transport = ALL_TO_ALL[backend](placement, comm.ep)
    else:
        plain = _plain(kind, local_E, weights.w2_EPi.shape[0], parallel, comm)
        tp = None if parallel.sequence_parallel else comm.tp
        transport = Passthrough(plain, tp) if backend == "reduced" else plain
    return FusedMoEKernel(transport, experts, scale=scale, weight_on_input=weight_on_input)


def _plain(
    kind: str, local_E: Tensor | None, experts: int, parallel: FusedMoEParallelConfig, comm: Communicator
) -> NoDPEP:
    """No transport on one data-parallel rank, else the naive one."""
    if parallel.dp_size == 1 and not parallel.sequence_parallel:
        return Batched(local_E, experts) if kind == "batched" else NoDPEP(local_E)
    group = comm.ep if parallel.sequence_parallel else comm.dp
    if kind == "batched":
        return NaiveBatched(local_E, experts, group)
    return Naive(local_E, group, 2 if kind == "monolithic" else 3)
