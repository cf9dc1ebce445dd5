"""The layer: checks what it is asked to be, puts the runner together, and does nothing else in its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.comm import Communicator
from harness.runner.experts import TorchExperts, shard
from harness.runner.moe_runner import MoERunner, RunnerParts
from harness.runner.plan import LayerFacts, OutputPlan
from harness.runner.router import Gate, make_router
from harness.runner.shared_experts import SharedExperts, SharedMLP
from harness.runner.transforms import LatentProjection
from reference.spec import MoESpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSettings:
    """How an engine runs a layer of a given spec; nothing here changes the exact result.

    apply_routed_scale_to_output: s multiplies the routed output in the runner; False: the router's weights carry it.
    kernel_scales: the kernel multiplies by s.    kernel_reduces: it returns the sum of all ranks.
    kernel_runs_shared: its finalize runs the shared experts.    side_stream: they may run beside the kernel.
    padding: zero columns that the kernel's width has beyond the layer's.
    reduce_results: False leaves the final all-reduce to the caller.
    """

    apply_routed_scale_to_output: bool
    kernel_scales: bool = False
    kernel_reduces: bool = False
    kernel_runs_shared: bool = False
    side_stream: bool = False
    padding: int = 0
    reduce_results: bool = True


class FusedMoE:
    """A Mixture-of-Experts layer on one rank, built from the whole weights, which it shards itself.

    weights: by the names of `reference.spec.weight_shapes`, in the layer's dtype.
    Raises ValueError, naming the values and the remedy, for every combination that would silently compute something else.
    """

    def __init__(
        self, spec: MoESpec, settings: LayerSettings, weights: Mapping[str, Tensor], comm: Communicator
    ) -> None:
        check_settings(spec, settings, comm.tp.size, weights["router_weight"].dtype)
        rank, tp = comm.tp.rank, comm.tp.size
        routing, experts = spec.routing, spec.experts
        self.gate = Gate(
            weights["router_weight"], weights.get("router_bias"), weights.get("router_scale"),
            routing.router_norm_epsilon, routing.precision.logits == "fp32",
        )  # fmt: skip
        router_scales = not settings.apply_routed_scale_to_output and not settings.kernel_scales
        router = make_router(
            routing, weights.get("e_score_correction_bias"), weights.get("per_expert_scale"),
            spec.scale if router_scales else 1.0,
        )  # fmt: skip
        kernel = TorchExperts(
            shard(weights, experts, routing.weight_on == "input", rank, tp, settings.padding), comm,
            reduces=settings.kernel_reduces, scale=spec.scale if settings.kernel_scales else None,
            runs_shared=settings.kernel_runs_shared,
        )  # fmt: skip
        latent = experts.latent_size is not None
        transform = LatentProjection(weights["fc2_latent"], weights.get("fc2_latent_bias")) if latent else None
        parts = RunnerParts(
            router=router,
            kernel=kernel,
            shared_experts=SharedExperts(SharedMLP(weights, spec.shared, rank, tp), comm) if spec.shared else None,
            input_transform=LatentProjection(weights["fc1_latent"], weights.get("fc1_latent_bias")) if latent else None,
            output_transform=transform,
            side_stream=settings.side_stream,
            share=spec.output.share,
        )
        facts = LayerFacts(
            tp=tp,
            scale=spec.scale,
            apply_routed_scale_to_output=settings.apply_routed_scale_to_output,
            router_scales=router.scales,
            has_shared_experts=spec.shared is not None,
            transform="none" if transform is None else "commutative" if transform.reduce_commutative else "ordered",
            reduce_results=settings.reduce_results,
        )
        self.runner = MoERunner(facts, parts, comm)
        self._latent = experts.latent_size or spec.hidden_size
        self._dtype = weights["router_weight"].dtype

    @property
    def plan(self) -> OutputPlan:
        """The plan of a call made now; another kernel gives another plan."""
        return self.runner.plan(self._dtype, self._latent)

    @property
    def output_unit(self) -> float:
        """forward returns y times this: 1, or 1/s for the fp16 layer whose decoder works in that unit."""
        return self.plan.output_unit

    def forward(self, hidden_states_MH: Tensor) -> Tensor:
        """[M, H] -> [M, H], complete on every rank unless the layer was built with reduce_results=False."""
        self._last_logits_ME = self.gate(hidden_states_MH)
        return self.runner.forward(hidden_states_MH, self._last_logits_ME)

    __call__ = forward

    def stages(self) -> dict[str, Tensor]:
        """What the last call passed through: logits, topk_ids, topk_weights (times s if the router scales)."""
        return {"logits": self._last_logits_ME, **self.runner.last_routing}


def check_settings(spec: MoESpec, settings: LayerSettings, tp: int, dtype: torch.dtype) -> None:
    """Refuse what upstream accepts and then computes wrongly. Raises ValueError."""
    for name, width in spec.tp_widths().items():
        if width % tp:
            raise ValueError(f"tp={tp} does not divide {name}={width}: choose a tp that does")
    if spec.scale == 0.0:
        raise ValueError(
            "routed_scaling_factor=0: the routed experts would vanish, and fp16 divides by it. Pass None for no factor"
        )
    zero_experts = spec.routing.num_zero_experts
    if zero_experts and settings.apply_routed_scale_to_output and spec.scale != 1.0:
        raise ValueError(
            f"apply_routed_scale_to_output with {zero_experts} zero experts: R would be scaled and Z not. "
            "Let the router scale: apply_routed_scale_to_output=False"
        )
    if zero_experts and settings.kernel_scales and spec.scale != 1.0:
        raise ValueError(
            f"kernel_scales with {zero_experts} zero experts: the kernel never sees Z. Let the router scale"
        )
    ordered = spec.experts.latent_bias
    if not settings.reduce_results and (ordered or settings.kernel_reduces):
        why = "its biased output transform needs the complete sum" if ordered else "the kernel reduces"
        raise ValueError(
            f"reduce_results=False: {why}, so no partial sum is left for the caller to reduce. Leave it True"
        )
    if settings.apply_routed_scale_to_output and settings.kernel_scales:
        raise ValueError("apply_routed_scale_to_output and kernel_scales: s would be applied twice. Choose one")
    if settings.kernel_runs_shared and spec.shared is None:
        raise ValueError("kernel_runs_shared without shared experts: there is nothing to run in the finalize")
    if settings.kernel_runs_shared and settings.side_stream:
        raise ValueError("kernel_runs_shared and side_stream: the shared experts would run twice. Choose one")
