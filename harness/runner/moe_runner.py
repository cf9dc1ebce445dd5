"""The runner: one forward pass, in the steps and under the names of the refactored vLLM runner, as the plan says.

M tokens, H hidden, L latent (H without a transform), P kernel width (L and padding), E experts, K top-k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from harness.comm import Communicator
from harness.runner.modular_kernel import FusedMoEKernel, Steps, finish
from harness.runner.placement import Placement
from harness.runner.plan import CallFacts, LayerFacts, OutputPlan, Reduced, SharedExpertsOrder, plan_output
from harness.runner.router import FusedMoERouter, ZeroExpertRouter
from harness.runner.shared_experts import SharedExperts
from harness.runner.transforms import LatentProjection

Fused = Tensor | tuple[Tensor | None, Tensor]


class MoERunnerInterface(ABC):
    """hidden states [M, H] and logits [M, E] in, one tensor [M, H] out, complete on every rank."""

    @abstractmethod
    def forward(self, hidden_states_MH: Tensor, router_logits_ME: Tensor) -> Tensor: ...


class Passed(NamedTuple):
    """What one micro-batch went through behind its router, by reference: nothing writes into these tensors later.

    routed_MP, shared_MH: as the kernel and the module returned them.    early_routed, early_shared: behind the step that
    reduces each apart, if the plan has one.    sum: of both, scaled and transformed.    reduced_MH: behind the last
    all-reduce, if the plan has one.
    """

    routed_MP: Tensor
    shared_MH: Tensor | None
    early_routed: Tensor
    early_shared: Tensor | None
    sum: Tensor
    reduced_MH: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RunnerParts:
    """What a runner is put together from; None where the layer has no such part.

    placement: of the experts, None where every rank has a piece of all.
    shared_order: "auto" lets the kernel decide, a number is the order that was asked for.
    share: the factor of the whole output, 0.5 where a model averages routed and shared output.
    """

    router: FusedMoERouter
    kernel: FusedMoEKernel
    shared_experts: SharedExperts | None
    input_transform: LatentProjection | None
    output_transform: LatentProjection | None
    placement: Placement | None
    shared_order: Literal["auto", "1", "2", "3"]
    share: float


class MoERunnerBase(MoERunnerInterface):
    """The post-processing that every runner has in common: unpack, cut, scale, transform, sum, reduce.

    kernel and placement may be replaced between two calls; nothing about them is remembered.
    """

    def __init__(self, facts: LayerFacts, parts: RunnerParts, comm: Communicator) -> None:
        self.facts = facts
        self.router = parts.router
        self.kernel = parts.kernel
        self.shared_experts = parts.shared_experts
        self.routed_input_transform = parts.input_transform
        self.routed_output_transform = parts.output_transform
        self.placement = parts.placement
        self.shared_order = parts.shared_order
        self.share = parts.share
        self.comm = comm
        self.last_plan: OutputPlan | None = None  # what the last call went by; no decision reads it
        self._told: dict[int, tuple[Tensor, Tensor]] = {}
        self._passed: dict[int, Passed] = {}

    @property
    def last_passed(self) -> tuple[Passed, ...]:
        """What the last call went through behind its router, one for each micro-batch."""
        return tuple(self._passed[index] for index in sorted(self._passed))

    @property
    def last_routing(self) -> dict[str, Tensor]:
        """topk_weights and topk_ids of the last call, micro-batches one after the other; empty if the kernel routes."""
        if self.kernel.is_monolithic or not self._told:
            return {}
        weights_MK, ids_MK = zip(*(self._told[index] for index in sorted(self._told)), strict=True)
        return {"topk_weights": torch.cat(weights_MK), "topk_ids": torch.cat(ids_MK)}

    @property
    def _fused_output_is_reduced(self) -> bool:
        return self.kernel.output_is_reduced

    def plan(self, dtype: torch.dtype, width: int) -> OutputPlan:
        """The decision for a call in dtype, whose routed tensors are width wide before padding."""
        kernel, asked = self.kernel, self.shared_order
        balanced = self.placement is not None and not self.placement.is_identity
        call = CallFacts(
            output_is_reduced=self._fused_output_is_reduced,
            kernel_scales=kernel.scales,
            no_overlap=asked == "1" or (asked == "auto" and balanced and kernel.all_to_all),
            kernel_runs_shared=asked == "2" or (asked == "auto" and kernel.supports_async),
            side_stream=asked == "3",
            half_precision=dtype is torch.float16,
            padded=kernel.width > width,
            announced=kernel.announced,
        )
        return plan_output(self.facts, call)

    def apply_routed_input_transform(self, hidden_states_MH: Tensor) -> Tensor:
        """[M, H] -> [M, L]. The shared experts keep reading the untransformed hidden states."""
        if self.routed_input_transform is None:
            return hidden_states_MH
        return self.routed_input_transform(hidden_states_MH)

    def apply_routed_output_transform(self, routed_ML: Tensor, unit: float) -> Tensor:
        """[M, L] -> [M, H], after the scale, so that s does not multiply the bias."""
        if self.routed_output_transform is None:
            return routed_ML
        return self.routed_output_transform(routed_ML, unit)

    def _maybe_pad_hidden_states(self, x_ML: Tensor) -> Tensor:
        return (
            functional.pad(x_ML, (0, self.kernel.width - x_ML.shape[1])) if self.kernel.width > x_ML.shape[1] else x_ML
        )

    @staticmethod
    def _unpack(output: Fused) -> tuple[Tensor | None, Tensor]:
        """A pair is (S, R), a single tensor is R."""
        return output if isinstance(output, tuple) else (None, output)

    @staticmethod
    def trunc(states: Tensor, width: int) -> Tensor:
        """Cut the columns that padding added."""
        return states[:, :width]

    def _maybe_apply_routed_scale_to_output(
        self, shared_MH: Tensor | None, routed_ML: Tensor, plan: OutputPlan
    ) -> tuple[Tensor | None, Tensor]:
        """R times s if that is the runner's part; in units of s, S becomes S/s and R stays."""
        if "runner" in plan.scaled_by:
            routed_ML = routed_ML * self.facts.scale
        if plan.output_unit != 1.0 and shared_MH is not None:
            shared_MH = shared_MH * plan.output_unit
        return shared_MH, routed_ML

    def _maybe_reduce_routed_out(self, routed_ML: Tensor, plan: OutputPlan) -> Tensor:
        return self.comm.tp.all_reduce(routed_ML) if plan.routed_reduced is Reduced.EARLY else routed_ML

    def _maybe_reduce_shared_out(self, shared_MH: Tensor | None, plan: OutputPlan) -> Tensor | None:
        if shared_MH is None or plan.shared_reduced is not Reduced.EARLY:
            return shared_MH
        return self.comm.tp.all_reduce(shared_MH)

    def reduce_and_trunc(self, states: Tensor, width: int, plan: OutputPlan) -> Tensor:
        """The final all-reduce, over tp whatever the experts' own grid, then the cut."""
        if plan.final_all_reduce:
            states = self.comm.tp.all_reduce(states)
        return self.trunc(states, width)


class MoERunner(MoERunnerBase):
    """The one concrete runner."""

    def forward(self, hidden_states_MH: Tensor, router_logits_ME: Tensor, num_tokens: int | None = None) -> Tensor:
        """y * plan.output_unit [M, H] in the dtype of hidden_states; leaves hidden_states unchanged.

        num_tokens: rows from there on are padding, which no expert sees; their results are junk.
        """
        return finish(self.steps(hidden_states_MH, router_logits_ME, num_tokens))

    def forward_micro_batches(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Several (hidden states, logits) in flight: each goes on when its kernel's results are on their way."""
        flights = [self.steps(x_MH, logits_ME, None, index) for index, (x_MH, logits_ME) in enumerate(batches)]
        results: dict[int, Tensor] = {}
        while len(results) < len(flights):
            for index, steps in enumerate(flights):
                if index in results:
                    continue
                try:
                    next(steps)
                except StopIteration as done:
                    results[index] = done.value
        return [results[index] for index in range(len(flights))]

    def steps(
        self, hidden_states_MH: Tensor, router_logits_ME: Tensor, num_tokens: int | None = None, micro_batch: int = 0
    ) -> Steps:
        """`forward`, pausing where the kernel's results are on their way."""
        hidden = hidden_states_MH.shape[1]
        x_ML = self.apply_routed_input_transform(hidden_states_MH)
        latent = x_ML.shape[1]
        plan = self.last_plan = self.plan(hidden_states_MH.dtype, latent)
        x_MP = self._maybe_pad_hidden_states(x_ML)
        if self.kernel.writes_input and x_MP is hidden_states_MH:
            x_MP = x_MP.clone()  # the shared experts and the caller still need it
        zero_MH, output = yield from self._forward_op(
            x_MP, hidden_states_MH, router_logits_ME, plan, num_tokens, micro_batch
        )
        shared_MH, routed_ML = told_shared_MH, told_MP = self._unpack(output)
        if plan.cut_before_sum:
            routed_ML = self.trunc(routed_ML, latent)
        early_routed = routed_ML = self._maybe_reduce_routed_out(routed_ML, plan)
        early_shared = shared_MH = self._maybe_reduce_shared_out(shared_MH, plan)
        shared_MH, routed_ML = self._maybe_apply_routed_scale_to_output(shared_MH, routed_ML, plan)
        result = self.apply_routed_output_transform(routed_ML, plan.output_unit)
        if shared_MH is not None:
            result = shared_MH + result
        result_MH = self.reduce_and_trunc(result, hidden, plan)
        if micro_batch == 0:
            self._passed.clear()
        self._passed[micro_batch] = Passed(told_MP, told_shared_MH, early_routed, early_shared, result, result_MH)
        if zero_MH is not None:
            result_MH = (result_MH + zero_MH).to(result_MH.dtype)
        return result_MH if self.share == 1.0 else result_MH * self.share

    def _forward_op(
        self,
        x_MP: Tensor,
        shared_input_MH: Tensor,
        router_logits_ME: Tensor,
        plan: OutputPlan,
        num_tokens: int | None,
        micro_batch: int,
    ) -> Generator[None, None, tuple[Tensor | None, Fused]]:
        """Route, run the kernel, run the shared experts at their one moment. Returns Z, and R or (S, R)."""

        def shared_at(moment: SharedExpertsOrder) -> None:
            if self.shared_experts is not None:
                self.shared_experts.run(plan.shared_order, moment, shared_input_MH, micro_batch)

        shared_at(SharedExpertsOrder.NO_OVERLAP)
        zero_MH = None
        if self.kernel.is_monolithic:
            kernel = self.kernel.monolithic_steps(x_MP, router_logits_ME)
        else:
            weights_MK, ids_MK = self._route(router_logits_ME, num_tokens, micro_batch)
            if isinstance(self.router, ZeroExpertRouter):
                zero_MH, weights_MK, ids_MK = self.router.split(shared_input_MH, weights_MK, ids_MK)
            kernel = self.kernel.steps(x_MP, weights_MK, self._physical(ids_MK))
        next(kernel)
        shared_at(SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        yield
        routed_MP = yield from kernel
        shared_at(SharedExpertsOrder.MULTI_STREAM_OVERLAPPED)
        if self.shared_experts is None:
            return zero_MH, routed_MP
        return zero_MH, (self.shared_experts.take(micro_batch), routed_MP)

    def _route(self, router_logits_ME: Tensor, num_tokens: int | None, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Weights fp32 [M, K] and logical ids [M, K]; rows of padding get the weight 0 and the id -1."""
        weights_MK, ids_MK = self.router.select_experts(router_logits_ME)
        if num_tokens is not None:
            weights_MK[num_tokens:], ids_MK[num_tokens:] = 0.0, -1
        if micro_batch == 0:
            self._told.clear()
        self._told[micro_batch] = (weights_MK, ids_MK)
        return weights_MK, ids_MK

    def _physical(self, ids_MK: Tensor) -> Tensor:
        """Logical to physical ids, after they were captured, in the dtype that the kernel asks for at this call."""
        if self.placement is not None and not self.placement.is_identity:
            ids_MK = self.placement.to_physical(ids_MK)
        return ids_MK.to(self.kernel.topk_indices_dtype)
