"""The layer: checks what it is asked to be, puts the runner together, and does nothing else in its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.comm import Communicator
from harness.runner.experts import ExpertWeights, join, shard
from harness.runner.modular_kernel import ALL_TO_ALL, FusedMoEKernel, make_kernel
from harness.runner.moe_runner import MoERunner, RunnerParts
from harness.runner.parallel import FusedMoEParallelConfig
from harness.runner.placement import Placement, linear
from harness.runner.plan import LayerFacts, OutputPlan, Reduced
from harness.runner.precision import wide
from harness.runner.router import FusedMoERouter, Gate, SharedSlotsRouter, make_router
from harness.runner.shared_experts import SharedExperts, SharedMLP
from harness.runner.transforms import LatentProjection
from reference.spec import MoESpec

Kernel = Literal["partial", "reduced", "deepep_ht", "deepep_ll", "nvlink_one_sided", "nvlink_two_sided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSettings:
    """How an engine runs a layer of a given spec; nothing here changes the exact result.

    apply_routed_scale_to_output: s multiplies the routed output in the runner; False: the router's weights carry it.
    kernel_scales: the kernel multiplies by s.    kernel: how tokens reach their experts (`modular_kernel.make_kernel`).
    experts: "auto"; "slots" and "batched" leave weighing to the finalize, "monolithic" experts route by themselves.
    fuse_shared_experts: they are more experts of the kernel, always chosen.    placement: which rank holds which expert, linear by default.    shared_order: "auto" lets the kernel decide.
    padding: zero columns that the kernel's width has beyond the layer's.    sequence_parallel: the tp ranks get
    different rows.    reduce_results: False leaves the final all-reduce to the caller.
    """

    apply_routed_scale_to_output: bool
    kernel_scales: bool = False
    kernel: Kernel = "partial"
    experts: Literal["auto", "slots", "batched", "monolithic"] = "auto"
    placement: Placement | None = None
    fuse_shared_experts: bool = False
    shared_order: Literal["auto", "1", "2", "3"] = "auto"
    padding: int = 0
    sequence_parallel: bool = False
    reduce_results: bool = True


class FusedMoE:
    """A Mixture-of-Experts layer on one rank, built from the whole weights, which it shards itself.

    weights: by the names of `reference.spec.weight_shapes`, in the layer's dtype.
    Raises ValueError, naming the values and the remedy, for every combination that would silently compute something else.
    """

    def __init__(
        self, spec: MoESpec, settings: LayerSettings, weights: Mapping[str, Tensor], comm: Communicator
    ) -> None:
        parallel = FusedMoEParallelConfig.make(comm, sequence_parallel=settings.sequence_parallel)
        check_settings(spec, settings, parallel)
        routing, experts = spec.routing, spec.experts
        self._spec, self._settings, self._weights, self._comm, self._parallel = spec, settings, weights, comm, parallel
        self.gate = Gate(
            weights["router_weight"], weights.get("router_bias"), weights.get("router_scale"),
            routing.router_norm_epsilon, routing.precision.logits == "fp32",
        )  # fmt: skip
        kernel_scales = settings.kernel_scales or _must_scale(settings)
        router_scales = not settings.apply_routed_scale_to_output and not kernel_scales
        router: FusedMoERouter = make_router(
            routing, weights.get("e_score_correction_bias"), weights.get("per_expert_scale"),
            spec.scale if router_scales else 1.0,
        )  # fmt: skip
        fused = spec.shared if settings.fuse_shared_experts else None
        if fused is not None:
            later = spec.scale != 1.0 and not (router_scales and router.scales)
            slots, weight = fused.intermediate_size // experts.intermediate_size, 1 / spec.scale if later else 1.0
            router = SharedSlotsRouter(router, routing.num_experts, slots, weight)
        self._router, self._kernel_scale = router, spec.scale if kernel_scales and spec.scale != 1.0 else None
        placement = settings.placement
        if placement is None and parallel.ep_size > 1:
            placement = linear(routing.num_experts, parallel.ep_size)
        latent = experts.latent_size is not None
        transform = LatentProjection(weights["fc2_latent"], weights.get("fc2_latent_bias")) if latent else None
        apart = spec.shared if fused is None else None
        shared = SharedMLP(weights, apart, parallel.shared_rank, parallel.shared_size) if apart else None
        parts = RunnerParts(
            router=router,
            kernel=self.make_kernel(settings.kernel, placement),
            shared_experts=None if shared is None else SharedExperts(shared, comm),
            input_transform=LatentProjection(weights["fc1_latent"], weights.get("fc1_latent_bias")) if latent else None,
            output_transform=transform,
            placement=placement,
            shared_order=settings.shared_order,
            share=spec.output.share,
        )
        facts = LayerFacts(
            moe_tp=parallel.moe_tp_size,
            moe_ep=parallel.ep_size,
            sequence_parallel=parallel.sequence_parallel,
            scale=spec.scale,
            apply_routed_scale_to_output=settings.apply_routed_scale_to_output,
            router_scales=router.scales,
            has_shared_experts=apart is not None,
            transform="none" if transform is None else "commutative" if transform.reduce_commutative else "ordered",
            reduce_results=settings.reduce_results,
        )
        self.runner = MoERunner(facts, parts, comm)
        self._latent = experts.latent_size or spec.hidden_size
        self._dtype = weights["router_weight"].dtype

    @property
    def placement(self) -> Placement | None:
        """Which rank holds which expert now; None where each has a piece of all."""
        return self.runner.placement

    @property
    def plan(self) -> OutputPlan:
        """The plan of a call made now; another kernel gives another plan."""
        return self.runner.plan(self._dtype, self._latent)

    @property
    def output_unit(self) -> float:
        """The last call returned y times this: 1, or 1/s for the fp16 layer whose decoder works in that unit."""
        return (self.runner.last_plan or self.plan).output_unit

    def make_kernel(self, backend: Kernel, placement: Placement | None) -> FusedMoEKernel:
        """A kernel over this rank's part of the weights, to be put into `runner.kernel` between two calls."""
        spec, settings, parallel = self._spec, self._settings, self._parallel
        held = None if placement is None else placement.experts_of(parallel.ep_rank)
        mine = shard(
            self._weights, spec.experts, parallel.moe_tp_rank, parallel.moe_tp_size, settings.padding, held
        )  # fmt: skip
        if settings.fuse_shared_experts:
            mine = join(mine, self._shared_as_experts())
        return make_kernel(
            backend, settings.experts, mine, placement, parallel, self._comm, self._router,
            scale=self._kernel_scale, weight_on_input=spec.routing.weight_on == "input",
        )  # fmt: skip

    def _shared_as_experts(self) -> ExpertWeights:
        """The shared MLP, cut along its width into experts as wide as the routed ones, and this rank's piece of each."""
        spec, parallel = self._spec, self._parallel
        assert spec.shared is not None  # check_settings demands them
        width, hidden = spec.experts.intermediate_size, spec.hidden_size
        halves = 2 if spec.shared.activation.gated else 1
        w13 = self._weights["shared_w13"].view(halves, -1, width, hidden).transpose(0, 1).flatten(1, 2)
        w2 = self._weights["shared_w2"].view(hidden, -1, width).transpose(0, 1)
        plain = replace(spec.experts, transposed=False, layout="halved", bias=False)
        return shard(
            {"w13": w13, "w2": w2}, plain, parallel.moe_tp_rank, parallel.moe_tp_size, self._settings.padding
        )  # fmt: skip

    def _checked(self, settings: LayerSettings) -> LayerSettings:
        check_settings(self._spec, settings, self._parallel)
        return settings

    def swap_kernel(self, backend: Kernel) -> None:
        """From the next call on, tokens travel by another backend. ValueError where a construction would be refused."""
        self._settings = self._checked(replace(self._settings, kernel=backend))
        self.runner.kernel = self.make_kernel(backend, self.runner.placement)

    def place(self, placement: Placement) -> None:
        """From the next call on, the ranks hold other experts (EPLB). ValueError where a construction would be refused."""
        if self.runner.placement is None:
            raise ValueError("ep=1: every rank holds a piece of all experts, so there is nothing to place. Use ep > 1")
        self._settings = self._checked(replace(self._settings, placement=placement))
        self.runner.kernel = self.make_kernel(self._settings.kernel, placement)
        self.runner.placement = placement

    def forward(self, hidden_states_MH: Tensor, num_tokens: int | None = None) -> Tensor:
        """[M, H] -> [M, H], complete on every rank unless the layer was built with reduce_results=False.

        num_tokens: rows from there on are padding.
        """
        self._last_logits_ME = self.gate(hidden_states_MH)
        return self.runner.forward(hidden_states_MH, self._last_logits_ME, num_tokens)

    __call__ = forward

    def forward_micro_batches(self, hidden_states_MH: Tensor, count: int) -> Tensor:
        """The same, with the rows cut into micro-batches that are in flight together."""
        batches = [(x_MH, self.gate(x_MH)) for x_MH in hidden_states_MH.tensor_split(count)]
        self._last_logits_ME = torch.cat([logits_ME for _, logits_ME in batches])
        return torch.cat(self.runner.forward_micro_batches(batches))

    def stages(self) -> dict[str, Tensor]:
        """What this rank's last call passed through, in its order; each counts `stage_factors` times the law's.

        scores are made again of the logits, by the router's own function.    routed, shared: what kernel and module
        returned, the first projected to the layer's width without the projection's bias; not where shared experts are
        slots of the kernel.    routed_reduced, shared_reduced: the same where the plan reduces each apart.    sum: of
        both.    reduction: what the last all-reduce made of it, if nothing after this layer reduces or gathers.
        """
        router, top_k = self._router, self._spec.routing.top_k
        while hasattr(router, "inner"):
            router = router.inner
        told = {"logits": self._last_logits_ME}
        if hasattr(router, "scores"):
            told["scores"] = router.scores(self._last_logits_ME)
        told |= {name: each_MK[:, :top_k] for name, each_MK in self.runner.last_routing.items()}
        return told | self._passed()

    def _passed(self) -> dict[str, Tensor]:
        plan, batches, hidden = self.runner.last_plan, self.runner.last_passed, self._spec.hidden_size
        if plan is None or not batches:
            return {}
        told: dict[str, Tensor] = {}
        if not self._settings.fuse_shared_experts:
            told["routed"] = self._in_layer(torch.cat([each.routed_MP for each in batches]))
            if plan.routed_reduced is Reduced.EARLY:
                told["routed_reduced"] = self._in_layer(torch.cat([each.early_routed for each in batches]))
        shared = [each.shared_MH for each in batches if each.shared_MH is not None]
        if shared:
            told["shared"] = torch.cat(shared)
            if plan.shared_reduced is Reduced.EARLY:
                told["shared_reduced"] = torch.cat([s for each in batches if (s := each.early_shared) is not None])
        told["sum"] = torch.cat([each.sum for each in batches])[:, :hidden]
        if plan.routed_reduced not in (Reduced.BY_CALLER, Reduced.BY_ROWS):
            told["reduction"] = torch.cat([each.reduced_MH for each in batches])
        return told

    def _in_layer(self, routed_MP: Tensor) -> Tensor:
        """R without the columns of padding and, from a latent space, projected; no bias, so that partial sums stay ones."""
        routed_ML, transform = routed_MP[:, : self._latent], self.runner.routed_output_transform
        return routed_ML if transform is None else wide(routed_ML) @ wide(transform.weight).T

    @property
    def stage_factors(self) -> dict[str, float]:
        """How often what `stages` hands out counts the law's own: s where it is inside already, 1/s in that unit."""
        plan, s = self.runner.last_plan or self.plan, self._spec.scale
        routed = s if {"router", "kernel"} & set(plan.scaled_by) else 1.0
        told = {"topk_weights": s if "router" in plan.scaled_by else 1.0, "shared": 1.0, "shared_reduced": 1.0}
        told |= dict.fromkeys(("routed", "routed_reduced"), routed)
        return told | dict.fromkeys(("sum", "reduction"), plan.output_unit)


def _must_scale(settings: LayerSettings) -> bool:
    """A monolithic kernel gets the number that the router would get: its own router scales."""
    return settings.experts == "monolithic" and not settings.apply_routed_scale_to_output


def check_settings(spec: MoESpec, settings: LayerSettings, parallel: FusedMoEParallelConfig) -> None:
    """Refuse what upstream accepts and then computes wrongly. Raises ValueError."""
    _check_grid(spec, settings, parallel)
    _check_scale(spec, settings)
    _check_kernel(spec, settings, parallel)
    _check_reduction(spec, settings, parallel)


def _check_grid(spec: MoESpec, settings: LayerSettings, parallel: FusedMoEParallelConfig) -> None:
    for name, width in spec.tp_widths().items():
        cut = parallel.shared_size if name.startswith("shared") else parallel.moe_tp_size
        if width % cut:
            what = "tp" if name.startswith("shared") or cut == parallel.tp_size else "moe.tp"
            raise ValueError(f"{what}={cut} does not divide {name}={width}: choose a {what} that does")
    ranks = parallel.tp_size * parallel.dp_size
    if parallel.sequence_parallel and parallel.tp_size == 1:
        raise ValueError("sequence_parallel with tp=1: there are no ranks to split the rows over. Leave it False")
    if parallel.sequence_parallel and parallel.ep_size != ranks:
        raise ValueError(
            f"sequence_parallel with ep={parallel.ep_size}: each rank's rows need whole experts. Use ep={ranks}"
        )
    placement = settings.placement
    if placement is None:
        return
    if parallel.ep_size == 1:
        raise ValueError("placement with ep=1: every rank holds a piece of all experts. Use ep > 1, or leave it out")
    if placement.num_experts != spec.routing.num_experts or max(placement.owners) >= parallel.ep_size:
        raise ValueError(
            f"placement of {placement.num_experts} experts on {max(placement.owners) + 1} ranks: expected "
            f"{spec.routing.num_experts} experts on ep={parallel.ep_size}"
        )
    slots = len(placement.held)
    if not placement.is_identity and slots % parallel.ep_size:
        raise ValueError(
            f"load balancing with {slots} physical slots ({slots - placement.num_experts} of them redundant) on "
            f"ep={parallel.ep_size}: every rank has as many. Use {-slots % parallel.ep_size} more redundant slots"
        )


def _check_scale(spec: MoESpec, settings: LayerSettings) -> None:
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
    if settings.apply_routed_scale_to_output and settings.kernel_scales:
        raise ValueError("apply_routed_scale_to_output and kernel_scales: s would be applied twice. Choose one")


def _check_kernel(spec: MoESpec, settings: LayerSettings, parallel: FusedMoEParallelConfig) -> None:
    backend, kind, ranks = settings.kernel, settings.experts, parallel.tp_size * parallel.dp_size
    if backend in ALL_TO_ALL and (parallel.ep_size != ranks or ranks == 1):
        raise ValueError(
            f"kernel={backend} with ep={parallel.ep_size}: all-to-all sends a token to whole experts on other ranks. "
            f"Use ep = tp * dp = {ranks}{' on more than one rank' if ranks == 1 else ''}, or kernel=partial"
        )
    if backend == "deepep_ll" and kind not in ("auto", "batched"):
        raise ValueError(
            f"kernel=deepep_ll with experts={kind}: it hands over rows sorted by expert. Use experts=batched"
        )
    if backend in ALL_TO_ALL and backend != "deepep_ll" and kind in ("batched", "monolithic"):
        why = (
            "it hands over rows, not batches by expert"
            if kind == "batched"
            else "it sends tokens where a router has sent them"
        )
        raise ValueError(f"kernel={backend} with experts={kind}: {why}. Use experts=auto or slots")
    if kind == "monolithic":
        if settings.placement is not None and not settings.placement.is_identity:
            raise ValueError("experts=monolithic routes by itself, to experts in their own order: load balancing cannot "
                             "rename them. Use modular experts")  # fmt: skip
        if spec.routing.num_zero_experts:
            raise ValueError("experts=monolithic with zero experts: the kernel never sees Z. Use modular experts")
    _check_fused_shared(spec, settings, parallel)
    if settings.shared_order in ("2", "3") and spec.shared is None:
        raise ValueError(f"shared_order={settings.shared_order} without shared experts: there is nothing to order")
    if settings.shared_order == "2" and kind == "monolithic":
        raise ValueError(
            "shared_order=2 with experts=monolithic: such a kernel has no finalize to run them in. Use 1 or 3"
        )


def _check_fused_shared(spec: MoESpec, settings: LayerSettings, parallel: FusedMoEParallelConfig) -> None:
    if not settings.fuse_shared_experts:
        return
    shared, experts, why = spec.shared, spec.experts, None
    if shared is None:
        why = "there are no shared experts"
    elif shared.sigmoid_gate or shared.bias or experts.bias or shared.activation != experts.activation:
        why = "a gate, a bias or another activation makes them another kind of expert than the routed ones"
    elif shared.intermediate_size % experts.intermediate_size or experts.latent_size is not None:
        why = f"their width {shared.intermediate_size} is no multiple of the routed experts' in the same space"
    elif spec.routing.weight_on == "input" or settings.experts == "monolithic" or spec.routing.num_zero_experts:
        why = "the routing has no place for slots that are always chosen"
    elif parallel.ep_size > 1:
        why = f"with ep={parallel.ep_size} each rank would need a copy of them, and ep=1 none"
    elif settings.shared_order != "auto":
        why = f"shared_order={settings.shared_order}: they run in the kernel, at no moment of their own"
    if why:
        raise ValueError(f"fuse_shared_experts: {why}. Leave it False")


def _check_reduction(spec: MoESpec, settings: LayerSettings, parallel: FusedMoEParallelConfig) -> None:
    if settings.reduce_results:
        return
    why = None
    if spec.experts.latent_bias:
        why = "its biased output transform needs the complete sum"
    elif settings.kernel != "partial":
        why = "the kernel reduces"
    elif parallel.sequence_parallel:
        why = "under sequence parallelism each rank's rows are complete"
    elif spec.routing.num_zero_experts:
        why = "the zero experts' part is complete on every rank, and the caller would add it tp times"
    if why:
        raise ValueError(
            f"reduce_results=False: {why}, so no partial sum is left for the caller to reduce. Leave it True"
        )
