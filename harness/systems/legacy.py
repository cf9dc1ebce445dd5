"""The layers as they stood before the refactoring: each model's own file sums, scales and reduces.

What the files did differently is data (FILES). Expert arithmetic, routers and sharding are the runner's; what is under
test here is the order and number of scalings and reductions. Faults that the files had are kept and listed in known.py.
Source: vLLM 0.19.1, models/*.py, the last release before PR #35949.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness import models
from harness.case import Case
from harness.comm import Communicator
from harness.runner.block import in_sequence_parallel
from harness.runner.experts import shard
from harness.runner.modular_kernel import ALL_TO_ALL, finish, make_kernel
from harness.runner.parallel import FusedMoEParallelConfig
from harness.runner.placement import linear
from harness.runner.router import Gate, make_router
from harness.runner.shared_experts import SharedMLP
from harness.runner.transforms import LatentProjection
from harness.systems import RUNNER_OPTIONS, Layer, beyond
from reference.spec import MoESpec, RouterPrecision


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """What one model file did with R and S.

    scale: "router" its weights carry s; "routed" the file multiplies R; "routed, fp16 shared" the same, but fp16 divides S
        by s instead; "sum" it multiplies R + S; "none" the model has no s.
    reduce: "unless reduced" one all-reduce of R + S unless the kernel reduced R; "always" one whatever the kernel did;
        "in layer" the fused layer reduces R, and S where it holds it.
    shared: "partial" left to the sum; "self-reducing" an MLP that reduces its own output and is added afterwards;
        "self-reducing in layer" the same, and the layer reduces it again.
    fp16_compensated: the decoder layer makes up for R + S/s.
    sequence_parallel: it gave each tp rank rows of its own where the engine asked for that: "whole" with the shared
        experts whole on each of them, "cut" with its share of them; "no" it did not know how.
    """

    scale: Literal["router", "routed", "routed, fp16 shared", "sum", "none"]
    reduce: Literal["unless reduced", "always", "in layer"]
    shared: Literal["none", "partial", "self-reducing", "self-reducing in layer"]
    fp16_compensated: bool = True
    sequence_parallel: Literal["no", "whole", "cut"] = "no"


_DEEPSEEK = File(scale="routed, fp16 shared", reduce="unless reduced", shared="partial")
_GLM = File(scale="routed", reduce="unless reduced", shared="partial")
_SCALED_ROUTER = File(scale="router", reduce="unless reduced", shared="partial")
_OWN_SUM = File(scale="none", reduce="unless reduced", shared="partial")
_LAYER_REDUCES = File(scale="none", reduce="in layer", shared="none")

FILES: dict[str, File] = {
    "afmoe": _SCALED_ROUTER,
    "aria": File(scale="none", reduce="in layer", shared="self-reducing in layer"),
    "deepseek_v2": replace(_DEEPSEEK, sequence_parallel="whole"),
    "deepseek_v3": replace(_DEEPSEEK, sequence_parallel="whole"),
    "dots1": File(scale="sum", reduce="always", shared="partial"),
    "ernie4_5_moe": _OWN_SUM,
    "ernie4_5_vl_moe": _OWN_SUM,
    "exaone_moe": File(scale="router", reduce="unless reduced", shared="partial"),
    "gemma4": replace(_LAYER_REDUCES, shared="self-reducing"),
    "glm4_moe": _GLM,
    "glm4_moe_lite": _GLM,
    "gpt_oss": replace(_LAYER_REDUCES, sequence_parallel="whole"),
    "granitemoehybrid": replace(_LAYER_REDUCES, shared="self-reducing"),
    "jamba": _LAYER_REDUCES,
    "kimi_linear": File(scale="routed", reduce="always", shared="partial"),
    "lfm2_moe": File(scale="routed", reduce="unless reduced", shared="none"),
    "llama4": replace(_OWN_SUM, sequence_parallel="whole"),
    "minimax_m2": File(scale="none", reduce="always", shared="none"),
    "mixtral": _LAYER_REDUCES,
    "nemotron_h": replace(_DEEPSEEK, fp16_compensated=False, sequence_parallel="whole"),
    "olmoe": _LAYER_REDUCES,
    "phimoe": _LAYER_REDUCES,
    "qwen2_moe": _OWN_SUM,
    "qwen3_next": replace(_OWN_SUM, sequence_parallel="cut"),
    "sarvam_moe": _SCALED_ROUTER,
    "step3p5": _SCALED_ROUTER,
}
# The transformers backend wrapped a model's block and all-reduced what came out; its MLP had reduced S already.
WRAPPED = File(scale="router", reduce="unless reduced", shared="self-reducing")

# With these the engine asked for sequence parallelism by itself, wherever tp > 1, dp > 1 and every rank held whole experts.
_BY_ROWS = ("partial", "deepep_ht", "deepep_ll")
# Their output was taken for a partial sum (vLLM #41382).
_TAKEN_FOR_PARTIAL = ("nvlink_one_sided", "nvlink_two_sided")
# The layer passed these its rows in chunks, and then left out its own reduction altogether.
_IN_CHUNKS = ("deepep_ll", "nvlink_two_sided")


class LegacySystem:
    """Models that a file in FILES describes, in the placements that the file knew."""

    name = "legacy"
    foreign = False

    def supports(self, case: Case) -> str | None:
        if case.model not in FILES:
            return f"no file of {case.model} from before the refactoring is described"
        more = beyond(case, RUNNER_OPTIONS, "a file of its own, with one way to do it,")
        if more is not None:
            return more
        if case.backend == "transformers" and not models.load(case.model).wrapped:
            return "the transformers backend wrapped whole blocks with shared experts, and this is none"
        if case.kernel == "reduced":
            return "before the refactoring no kernel but all-to-all returned complete sums"
        file, grid = _file(case), case.grid
        if grid.ep not in (1, grid.ranks):
            return f"ep={grid.ep}: vLLM has no expert parallelism between 1 and tp * dp"
        if case.kernel in ALL_TO_ALL and (grid.ep != grid.ranks or grid.dp == 1):
            return f"kernel={case.kernel}: before the refactoring all-to-all needed ep = tp * dp and dp > 1"
        by_rows = grid.tp > 1 and grid.dp > 1 and grid.ep == grid.ranks and case.kernel in _BY_ROWS
        if file.sequence_parallel != "no" and by_rows and grid.sp == 1:
            return "where tp > 1, dp > 1 and ep = tp * dp, its file was always sequence parallel with this kernel"
        if grid.sp > 1 and file.sequence_parallel == "no":
            return "its file knew no sequence parallelism"
        if grid.sp > 1 and not by_rows:
            return (
                f"kernel={case.kernel} with dp={grid.dp}: before the refactoring sequence parallelism needed dp > 1 and "
                "another kernel than NVLink's"
            )
        shared = case.spec.shared
        if file.sequence_parallel == "cut" and shared is not None and shared.intermediate_size % grid.tp:
            return (
                f"its file cut the shared experts over tp={grid.tp}, which does not divide {shared.intermediate_size}"
            )
        return None

    def precision(self, spec: MoESpec) -> RouterPrecision:
        return RouterPrecision(logits=spec.routing.precision.logits, scores="fp32", weights="fp32")

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        if case.spec.vision is not None:
            return LegacyTwoBranches(case.spec, _file(case), weights, comm, case)
        return LegacyBlock(case.spec, _file(case), weights, comm, case)


def _file(case: Case) -> File:
    return WRAPPED if case.backend == "transformers" else FILES[case.model]


class LegacyBlock:
    """A model's sparse block: gate, fused experts, shared experts, and the file's own sum, scale and reduction."""

    def __init__(
        self, spec: MoESpec, file: File, weights: Mapping[str, Tensor], comm: Communicator, case: Case
    ) -> None:
        parallel = FusedMoEParallelConfig.make(comm, sequence_parallel=case.grid.sp > 1)
        routing, experts = spec.routing, spec.experts
        self._spec, self._file, self._comm = spec, file, comm
        self._gate = Gate(
            weights["router_weight"], weights.get("router_bias"), weights.get("router_scale"),
            routing.router_norm_epsilon, routing.precision.logits == "fp32",
        )  # fmt: skip
        self._router = make_router(
            routing, weights.get("e_score_correction_bias"), weights.get("per_expert_scale"),
            spec.scale if file.scale == "router" else 1.0,
        )  # fmt: skip
        placement = linear(routing.num_experts, parallel.ep_size) if parallel.ep_size > 1 else None
        self.held = None if placement is None else tuple(map(placement.experts_of, range(parallel.ep_size)))
        mine = None if self.held is None else self.held[parallel.ep_rank]
        sharded = shard(weights, experts, parallel.moe_tp_rank, parallel.moe_tp_size, 0, mine)
        self._kernel = make_kernel(
            case.kernel, "auto", sharded, placement, parallel, comm, self._router,
            scale=None, weight_on_input=routing.weight_on == "input",
        )  # fmt: skip
        self._rows = parallel.sequence_parallel
        self._reduced = self._kernel.output_is_reduced and case.kernel not in _TAKEN_FOR_PARTIAL
        self._layer_reduces = file.reduce == "in layer" and not self._rows and case.kernel not in _IN_CHUNKS
        whole = self._rows and file.sequence_parallel == "whole"
        share = (0, 1) if whole else (parallel.tp_rank, parallel.tp_size)
        self.shared = SharedMLP(weights, spec.shared, *share) if spec.shared else None
        latent = experts.latent_size is not None
        self._into_latent = LatentProjection(weights["fc1_latent"], weights.get("fc1_latent_bias")) if latent else None
        self._out_of_latent = (
            LatentProjection(weights["fc2_latent"], weights.get("fc2_latent_bias")) if latent else None
        )
        in_units = self._fp16_divides_shared(weights["router_weight"].dtype) and file.fp16_compensated
        self.output_unit = 1.0 / spec.scale if in_units else 1.0

    def __call__(self, x_MH: Tensor) -> Tensor:
        return in_sequence_parallel(self._forward, self._comm, x_MH) if self._rows else self._forward(x_MH)

    def _forward(self, x_MH: Tensor) -> Tensor:
        routed_MH = self.routed(x_MH)
        return self.combine(None if self.shared is None else self.shared(x_MH), routed_MH)

    def routed(self, x_MH: Tensor) -> Tensor:
        """R in the experts' own width, as the fused layer returned it."""
        weights_MK, ids_MK = self._router.select_experts(self._gate(x_MH))
        x_ML = x_MH if self._into_latent is None else self._into_latent(x_MH)
        routed_ML = finish(self._kernel.steps(x_ML, weights_MK, ids_MK.to(self._kernel.topk_indices_dtype)))
        return self._comm.all_reduce(routed_ML) if self._layer_reduces and not self._reduced else routed_ML

    def combine(self, shared_MH: Tensor | None, routed_ML: Tensor) -> Tensor:
        """What the file did with the pair (S, R)."""
        file, scale = self._file, self._spec.scale
        if shared_MH is not None and file.shared.startswith("self-reducing"):
            shared_MH = self._comm.all_reduce(shared_MH)
            if file.shared == "self-reducing in layer" and (self._layer_reduces or self._reduced):
                shared_MH = self._comm.all_reduce(shared_MH)
        if self._fp16_divides_shared(routed_ML.dtype):
            shared_MH = None if shared_MH is None else shared_MH * (1.0 / scale)
        elif file.scale in ("routed", "routed, fp16 shared"):
            routed_ML = routed_ML * scale
        result = routed_ML if self._out_of_latent is None else self._out_of_latent(routed_ML)
        if self._rows:
            return result if shared_MH is None else result + shared_MH
        if shared_MH is not None:
            result = result + shared_MH
        if file.scale == "sum":
            result = result * scale
        if file.reduce == "always" or (file.reduce == "unless reduced" and not self._reduced):
            result = self._comm.all_reduce(result)
        return result

    def _fp16_divides_shared(self, dtype: torch.dtype) -> bool:
        asked = self._file.scale == "routed, fp16 shared" and dtype is torch.float16
        return asked and self.shared is not None and self._spec.scale != 1.0


class LegacyTwoBranches:
    """ERNIE-VL: two fused layers that share one MLP; the file adds S to the rows of both and reduces the sum once."""

    output_unit = 1.0

    def __init__(
        self, spec: MoESpec, file: File, weights: Mapping[str, Tensor], comm: Communicator, case: Case
    ) -> None:
        assert spec.vision is not None
        vision = replace(spec, routing=spec.vision.routing, experts=spec.vision.experts, vision=None, shared=None)
        own = {n.removeprefix("vision_"): t for n, t in weights.items() if n.startswith("vision_")}
        self._text = LegacyBlock(replace(spec, vision=None), file, weights, comm, case)
        self._vision = LegacyBlock(vision, file, own, comm, case)
        self.held = self._text.held

    def __call__(self, hidden_states: Tensor, *, modality: Tensor) -> Tensor:
        is_vision = modality.bool()
        routed = torch.empty_like(hidden_states)
        routed[~is_vision] = self._text.routed(hidden_states[~is_vision])
        routed[is_vision] = self._vision.routed(hidden_states[is_vision])
        shared = None if self._text.shared is None else self._text.shared(hidden_states)
        return self._text.combine(shared, routed)
