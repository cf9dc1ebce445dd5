"""The refactored runner as a system under test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, Grid
from harness.comm import Communicator
from harness.runner.block import in_sequence_parallel, with_junk_rows
from harness.runner.layer import FusedMoE, Kernel, LayerSettings, check_settings
from harness.runner.parallel import FusedMoEParallelConfig
from harness.runner.placement import Placement, linear, physical, replicated, round_robin
from harness.runner.plan import OutputPlan, Reduced
from harness.systems import Layer
from reference.spec import MoESpec, RouterPrecision


class RunnerSystem:
    """Runs every case; its router scores and weighs in fp32 whatever the page says, only its logits follow the page."""

    name = "runner"
    foreign = False

    def supports(self, case: Case) -> str | None:
        if case.backend != "model":
            return "backend=transformers is a variant of legacy"
        if case.scale != "page" and case.spec.routing.routed_scaling_factor is None:
            return f"scale={case.scale}: {case.model} has no routed_scaling_factor"
        if case.order != "auto" and case.spec.shared is None:
            return f"order={case.order}: {case.model} has no shared experts to order"
        if case.placement != "linear" and case.grid.ep == 1:
            return f"placement={case.placement}: with ep=1 every rank holds a piece of all experts"
        if case.batches == "2" and (case.spec.vision is not None or case.junk != "0" or case.grid.sp > 1):
            return "batches=2: two micro-batches are run of a layer with one router, whole rows and no junk"
        if case.junk != "0" and (case.grid.sp > 1 or case.experts == "monolithic"):
            return f"junk={case.junk}: rows are marked as junk for the router, which sequence parallelism and experts=monolithic pass by"
        if case.shared == "fused" and case.spec.vision is not None:
            return "shared=fused: both branches would add the shared experts as slots of their own"
        asked = [settings_of(case)]
        if case.swap != "none":
            if case.spec.vision is not None:
                return "swap: kernels are swapped in layers with one router"
            asked.append(replace(asked[0], kernel=_kernel(case.swap)))
        if case.placement == "moved":
            if case.spec.vision is not None:
                return "placement=moved: experts are placed anew in layers with one router"
            asked.append(replace(asked[0], placement=_moved(case.spec.routing.num_experts, case.grid.ep)))
        try:
            for settings in asked:
                check_settings(case.spec, settings, _parallel(case.grid))
        except ValueError as error:
            return str(error)
        return None

    def precision(self, spec: MoESpec) -> RouterPrecision:
        return RouterPrecision(logits=spec.routing.precision.logits, scores="fp32", weights="fp32")

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        settings = settings_of(case)
        if case.spec.vision is not None:
            return Block(case, TwoBranches(case.spec, settings, weights, comm), comm)
        return Block(case, FusedMoE(case.spec, settings, weights, comm), comm)


def settings_of(case: Case) -> LayerSettings:
    """What a case asks of the layer."""
    has_scale = case.spec.routing.routed_scaling_factor is not None
    return LayerSettings(
        apply_routed_scale_to_output=case.scaled_by == "output",
        kernel_scales=case.scaled_by == "kernel" and has_scale,
        kernel=_kernel(case.kernel),
        experts=case.experts,  # type: ignore[arg-type]  # OPTIONS lists the same words
        placement=_placement(case.placement, case.spec.routing.num_experts, case.grid.ep),
        fuse_shared_experts=case.shared == "fused",
        shared_order=case.order,  # type: ignore[arg-type]
        padding=int(case.pad),
        sequence_parallel=case.grid.sp > 1,
        reduce_results=case.reduce == "layer",
    )


def _kernel(name: str) -> Kernel:
    return name  # type: ignore[return-value]  # Case refuses other words


def _placement(name: str, experts: int, ep: int) -> Placement | None:
    """None for linear, which is the layer's own; moved starts there too."""
    if ep == 1 or name in ("linear", "moved"):
        return None
    if name == "round_robin":
        return round_robin(experts, ep)
    if name == "replicas":
        return replicated(experts, ep, _redundant(experts, ep))
    return physical(_shuffled(experts), experts, ep)


def _moved(experts: int, ep: int) -> Placement:
    """What a load balancer makes of it: another order, some experts twice."""
    order = _shuffled(experts)
    return physical((*order, *order[: _redundant(experts, ep)]), experts, ep)


def _redundant(experts: int, ep: int) -> int:
    """Slots beyond one for each expert, at least one and as many as all ranks need to hold the same number."""
    return -experts % ep or ep


def _shuffled(experts: int) -> tuple[int, ...]:
    """A fixed permutation without a fixed stride."""
    return tuple(sorted(range(experts), key=lambda e: ((e * 2654435761) >> 7) % 1009))


def _parallel(grid: Grid) -> FusedMoEParallelConfig:
    """Of rank 0; which rank it is does not matter to the checks."""
    return FusedMoEParallelConfig(
        tp_size=grid.tp, tp_rank=0, dp_size=grid.dp, dp_rank=0, moe_tp_size=grid.moe_tp, moe_tp_rank=0,
        ep_size=grid.ep, ep_rank=0, sequence_parallel=grid.sp > 1,
    )  # fmt: skip


class Block:
    """One rank's layer as a model calls it: the contract's tokens in, the contract's output out, on every grid.

    A case with a first call makes it before the one that is judged: with another kernel, or with another placement.
    """

    def __init__(self, case: Case, layer: FusedMoE | TwoBranches, comm: Communicator) -> None:
        self._case, self._layer, self._comm = case, layer, comm
        self._plan: OutputPlan | None = None
        self._announced: list[tuple[str, str]] = []
        self._rows = 0

    @property
    def plan(self) -> OutputPlan:
        """Of the last call, or of one made now if there was none."""
        return self._plan or self._layer.plan

    @property
    def owners(self) -> tuple[int, ...] | None:
        """The ep rank of each expert, None where some have several."""
        placement = self._layer.placement
        if placement is None:
            return (0,) * self._case.spec.routing.num_experts
        if len(placement.held) > placement.num_experts:
            return None
        return tuple(placement.owners[placement.held.index(e)] for e in range(placement.num_experts))

    @property
    def held(self) -> tuple[tuple[int, ...], ...] | None:
        """The experts of each ep rank in the order of its slots, None where every rank has a piece of all."""
        placement = self._layer.placement
        return None if placement is None else tuple(map(placement.experts_of, range(self._case.grid.ep)))

    @property
    def output_unit(self) -> float:
        return self._layer.output_unit

    @property
    def announced(self) -> list[tuple[str, str]]:
        """Every collective that the calls so far must have shown in the ledger, in order."""
        return self._announced

    def __call__(self, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
        case, layer = self._case, self._layer
        if isinstance(layer, FusedMoE):
            if case.swap != "none":
                layer.swap_kernel(_kernel(case.swap))
                self._call(hidden_states, **inputs)
                layer.swap_kernel(_kernel(case.kernel))
            if case.placement == "moved":
                layer.place(linear(case.spec.routing.num_experts, case.grid.ep))
                self._call(hidden_states, **inputs)
                layer.place(_moved(case.spec.routing.num_experts, case.grid.ep))
        return self._call(hidden_states, **inputs)

    def _call(self, x_MH: Tensor, **inputs: Tensor) -> Tensor:
        case, comm = self._case, self._comm
        layer: Any = self._layer
        rows, junk, batches = x_MH.shape[0], int(case.junk), int(case.batches)
        self._rows = rows
        if case.grid.sp > 1:
            share = -(-rows // comm.tp.size)
            self._rows = max(0, min(share, rows - comm.tp.rank * share))
            y_MH = in_sequence_parallel(layer, comm, x_MH, **inputs)
        elif batches > 1 and isinstance(layer, FusedMoE):
            y_MH = layer.forward_micro_batches(x_MH, batches)
        elif junk:
            text = {name: torch.cat([each, each.new_zeros(junk)]) for name, each in inputs.items()}
            y_MH = layer(with_junk_rows(x_MH, junk), num_tokens=rows, **text)[:rows]
        else:
            y_MH = layer(x_MH, **inputs)
        if isinstance(layer, FusedMoE):
            plan = layer.runner.last_plan or layer.plan
            self._announced += plan.collectives_of(batches)
        else:
            plan = layer.plan
            self._announced += layer.collectives
        self._plan = plan
        if case.grid.sp > 1:
            self._announced.append(("all_gather", "tp"))
        elif plan.routed_reduced is Reduced.BY_CALLER:
            self._announced.append(("all_reduce", "tp"))
            y_MH = comm.tp.all_reduce(y_MH)
        return y_MH

    def stages(self) -> dict[str, Tensor]:
        """Of the rows that this rank took through the layer: its share under sequence parallelism, and no junk."""
        return {name: each[: self._rows] for name, each in self._layer.stages().items()}

    @property
    def stage_factors(self) -> dict[str, float]:
        return self._layer.stage_factors


class TwoBranches:
    """ERNIE-VL: two routed layers and one set of shared experts; each token passes one layer, so it meets S once."""

    def __init__(
        self, spec: MoESpec, settings: LayerSettings, weights: Mapping[str, Tensor], comm: Communicator
    ) -> None:
        assert spec.vision is not None
        vision = replace(spec, routing=spec.vision.routing, experts=spec.vision.experts, vision=None)
        own = {n.removeprefix("vision_"): t for n, t in weights.items() if n.startswith(("vision_", "shared_"))}
        self._text = FusedMoE(replace(spec, vision=None), settings, weights, comm)
        self._vision = FusedMoE(vision, settings, own, comm)
        self._vision.runner.shared_experts = self._text.runner.shared_experts
        self.plan, self.placement = self._text.plan, self._text.placement
        self.collectives = [*self._text.plan.collectives_of(1), *self._vision.plan.collectives_of(1)]
        self.output_unit = self.plan.output_unit

    def forward(self, hidden_states: Tensor, *, modality: Tensor, num_tokens: int | None = None) -> Tensor:
        """modality: int64 [M], 1 for the tokens of an image, 0 for rows of padding."""
        self._is_vision = modality.bool()
        images = int(self._is_vision.sum())
        output = torch.empty_like(hidden_states)
        text = None if num_tokens is None else num_tokens - images
        output[~self._is_vision] = self._text.forward(hidden_states[~self._is_vision], text)
        output[self._is_vision] = self._vision.forward(hidden_states[self._is_vision])
        return output

    __call__ = forward

    def stages(self) -> dict[str, Tensor]:
        text, vision = self._text.stages(), self._vision.stages()
        joined = {name: text[name].new_empty(len(self._is_vision), text[name].shape[1]) for name in text}
        for name, whole in joined.items():
            whole[~self._is_vision], whole[self._is_vision] = text[name], vision[name]
        return joined

    @property
    def stage_factors(self) -> dict[str, float]:
        return self._text.stage_factors
