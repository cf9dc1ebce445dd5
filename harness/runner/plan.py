"""Who scales, who reduces, when: one frozen plan for each call, from one pure function.

vLLM spreads this decision over the layer, the router, the kernel and ten methods of the runner; here it is data that a
table test can enumerate and a ledger can be held against. R is the routed sum, S the shared experts' output, s the
routed scaling factor, tp the size of the tensor-parallel group, moe.tp and moe.ep into how many pieces and sets of
experts the ranks cut the routed experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Actor = Literal["router", "kernel", "runner"]


class Reduced(Enum):
    """Where a part that is spread over the tp ranks gets its one all-reduce."""

    NOT_NEEDED = "one rank holds all: nothing to reduce"
    BY_ROWS = "nobody: under sequence parallelism each rank has complete rows of its own"
    BY_KERNEL = "the kernel returns the sum of all ranks"
    EARLY = "the runner, on this part alone, before the sum"
    FINAL = "the runner, once, on the sum of all parts"
    BY_CALLER = "the caller: the layer returns a partial sum"


class SharedExpertsOrder(Enum):
    """The one moment at which the shared experts run; the values are those of a case's `order`."""

    NONE = 0
    NO_OVERLAP = 1
    MK_INTERNAL_OVERLAPPED = 2
    MULTI_STREAM_OVERLAPPED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFacts:
    """What the layer knows when it is built.

    moe_tp, moe_ep: sizes.    sequence_parallel: the tp ranks have different rows.
    scale: s, 1.0 without one.    apply_routed_scale_to_output: the runner is asked to scale, not the router.
    router_scales: the router is able to fold s into its weights.    transform: the routed output transform: "none",
    "commutative" with a sum over ranks (linear, no bias) or "ordered" (it must see the complete R).
    reduce_results: False asks for the partial sum, to be reduced by the caller.
    """

    moe_tp: int
    moe_ep: int
    sequence_parallel: bool
    scale: float
    apply_routed_scale_to_output: bool
    router_scales: bool
    has_shared_experts: bool
    transform: Literal["none", "commutative", "ordered"]
    reduce_results: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFacts:
    """What is known only at the call, since the kernel may be swapped between two calls.

    output_is_reduced: the kernel returns the sum of all ranks.    kernel_scales: it multiplies by s itself.
    no_overlap: the shared experts may not run beside the kernel.    kernel_runs_shared: its finalize leaves room to run
    them in.    side_stream: they may run beside it.    half_precision: the layer computes in fp16.
    padded: the kernel is wider than the layer.    announced: the kernel's own collectives (op, group), in order.
    """

    output_is_reduced: bool
    kernel_scales: bool
    no_overlap: bool
    kernel_runs_shared: bool
    side_stream: bool
    half_precision: bool
    padded: bool
    announced: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputPlan:
    """The decision for one call.

    scaled_by: the one actor that multiplies R by s; none if s is 1 or if the unit carries it.
    output_unit: the call returns y * output_unit: 1, or 1/s for the fp16 layer that returns R + S/s to stay in range.
    routed_reduced, shared_reduced: where each part gets its all-reduce; shared_reduced is None without shared experts.
    cut_before_sum: R loses the kernel's extra columns before it meets S or a transform, else at the very end.
    announced: the kernel's own collectives (op, group), in order.
    """

    scaled_by: tuple[Actor, ...]
    output_unit: float
    routed_reduced: Reduced
    shared_reduced: Reduced | None
    shared_order: SharedExpertsOrder
    cut_before_sum: bool
    announced: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if len(self.scaled_by) > 1:
            raise ValueError(f"scaled_by={self.scaled_by}: at most one actor may multiply by the routed scaling factor")
        if (self.shared_reduced is None) != (self.shared_order is SharedExpertsOrder.NONE):
            raise ValueError(f"shared_reduced={self.shared_reduced} contradicts shared_order={self.shared_order}")
        apart = self.routed_reduced in (Reduced.BY_KERNEL, Reduced.EARLY) and self.shared_reduced is Reduced.EARLY
        if self.shared_reduced not in (None, self.routed_reduced) and not apart:
            raise ValueError(
                f"R is reduced {self.routed_reduced.name}, S {self.shared_reduced.name}: one of them would be reduced twice "
                "or never. Both the same way, or S EARLY beside an R that is complete before the sum"
            )

    @property
    def final_all_reduce(self) -> bool:
        return self.routed_reduced is Reduced.FINAL

    @property
    def all_reduces(self) -> int:
        """How many all-reduces over tp the runner itself issues in this call."""
        early = (self.routed_reduced is Reduced.EARLY) + (self.shared_reduced is Reduced.EARLY)
        return early + self.final_all_reduce

    def collectives_of(self, micro_batches: int) -> tuple[tuple[str, str], ...]:
        """Every collective of the call as (op, group), in order: a ledger of the call must show these and no other.

        Micro-batches in flight together all pass the kernel before the first of them is reduced.
        """
        return self.announced * micro_batches + (("all_reduce", "tp"),) * self.all_reduces * micro_batches


@functools.lru_cache(maxsize=1024)
def plan_output(layer: LayerFacts, call: CallFacts) -> OutputPlan:
    """Decide who scales and who reduces; pure, so an equal question gets the remembered answer.

    Source: the decision tables of vLLM 0.32's runner, each cell a table test.
    """
    routed = _routed_reduced(layer, call)
    in_units = _in_units_of_s(layer, call)
    return OutputPlan(
        scaled_by=() if in_units else _scaled_by(layer, call),
        output_unit=1.0 / layer.scale if in_units else 1.0,
        routed_reduced=routed,
        shared_reduced=_shared_reduced(layer, routed),
        shared_order=_shared_order(layer, call),
        cut_before_sum=call.padded and (layer.has_shared_experts or layer.transform != "none"),
        announced=call.announced,
    )


def _routed_reduced(layer: LayerFacts, call: CallFacts) -> Reduced:
    """Always over tp, also where the work was split over ep: the tp ranks hold the same tokens."""
    if layer.sequence_parallel:
        return Reduced.BY_ROWS
    if layer.moe_tp == 1 and layer.moe_ep == 1:
        return Reduced.NOT_NEEDED
    if call.output_is_reduced:
        return Reduced.BY_KERNEL
    if layer.transform == "ordered":
        return Reduced.EARLY  # a bias would be added tp times, a norm would see a partial sum
    return Reduced.FINAL if layer.reduce_results else Reduced.BY_CALLER


def _shared_reduced(layer: LayerFacts, routed: Reduced) -> Reduced | None:
    if not layer.has_shared_experts:
        return None
    if routed in (Reduced.BY_KERNEL, Reduced.EARLY):
        return Reduced.EARLY  # the final all-reduce is off, since R is complete
    return routed


def _in_units_of_s(layer: LayerFacts, call: CallFacts) -> bool:
    """fp16 with shared experts: return R + S/s, since s * R may leave fp16's range; the decoder works in that unit."""
    asked = layer.apply_routed_scale_to_output and not call.kernel_scales
    return asked and call.half_precision and layer.has_shared_experts and layer.scale != 1.0


def _scaled_by(layer: LayerFacts, call: CallFacts) -> tuple[Actor, ...]:
    if layer.scale == 1.0:
        return ()
    if call.kernel_scales:
        return ("kernel",)
    if layer.apply_routed_scale_to_output or not layer.router_scales:
        return ("runner",)  # a router that cannot scale hands s on; upstream loses it there
    return ("router",)


def _shared_order(layer: LayerFacts, call: CallFacts) -> SharedExpertsOrder:
    if not layer.has_shared_experts:
        return SharedExpertsOrder.NONE
    if call.no_overlap:
        return SharedExpertsOrder.NO_OVERLAP
    if call.kernel_runs_shared:
        return SharedExpertsOrder.MK_INTERNAL_OVERLAPPED
    return SharedExpertsOrder.MULTI_STREAM_OVERLAPPED if call.side_stream else SharedExpertsOrder.NO_OVERLAP
