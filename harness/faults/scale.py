"""Family A: the routed scaling factor, applied twice, never, to the wrong part, or in a unit that nobody declares.

R routed sum, S shared experts' output, s routed scaling factor.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.faults.applies import has_shared, scaler
from harness.faults.fault import Fault
from harness.faults.plant import answering, kernels, planning, scaling, telling, together, weighing
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement

BY_KERNEL = (
    "tp1+scale=kernel",
    "tp2+scale=kernel",
    "tp4.ep4.bf16+scale=kernel",
    "tp2.ep4.dp2+scale=kernel.kernel=deepep_ht",
)
BY_ROUTER = (
    "tp1+scale=router",
    "tp2+scale=router",
    "tp4.ep4.bf16+scale=router",
    "tp2.ep4.dp2+scale=router.kernel=deepep_ht",
)
BY_OUTPUT = (
    "tp1+scale=output",
    "tp2+scale=output",
    "tp4.ep4.bf16+scale=output",
    "tp2.ep4.dp2+scale=output.kernel=deepep_ht",
)
IN_FP16 = (
    "tp1.fp16+scale=output",
    "tp2.fp16+scale=output",
    "tp4.ep4.fp16+scale=output",
    "tp2.ep4.dp2.fp16+scale=output.kernel=deepep_ll",
)


def _by(*who: str) -> Callable[[Case], bool]:
    return lambda case: scaler(case) in who


def _scaled(case: Case) -> bool:
    return scaler(case) is not None


def _scaled_and_shared(case: Case) -> bool:
    return scaler(case) == "runner" and has_shared(case)


def _times_s(weights_MK: Tensor, layer: FusedMoE, comm: Communicator) -> Tensor:
    return weights_MK * layer.runner.facts.scale


def _over_s(weights_MK: Tensor, layer: FusedMoE, comm: Communicator) -> Tensor:
    return weights_MK / layer.runner.facts.scale


def _over_s_beyond_rank_0(weights_MK: Tensor, layer: FusedMoE, comm: Communicator) -> Tensor:
    return weights_MK if comm.rank == 0 else weights_MK / layer.runner.facts.scale


def _kernel_scale(times: float | None) -> Callable[[FusedMoEKernel, Placement | None, FusedMoE], None]:
    """The kernel multiplies by s that often; "it scales" stays what it says."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        kernel.scale = 0.0 if times is None else layer._spec.scale**times

    return change


def _kernel_too(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
    """The kernel reads the number that the runner was to have for itself, and does not say so."""
    scale = kernel.scale or layer._spec.scale
    right = kernel.monolithic_steps if kernel.is_monolithic else kernel.steps

    def steps(*given: Tensor):  # type: ignore[no-untyped-def]
        out_MP = yield from right(*given)
        return out_MP * scale

    setattr(kernel, "monolithic_steps" if kernel.is_monolithic else "steps", steps)


def _lost_by_the_next_kernel(layer: FusedMoE, comm: Communicator) -> None:
    """Kernels made after the first get 1 for s."""
    first = layer.runner.kernel.scale
    kernels(_kernel_scale(0))(layer, comm)
    layer.runner.kernel.scale = first


def _bias_of_the_projection_too(layer: FusedMoE, comm: Communicator) -> None:
    """R is scaled after the output projection, bias and all."""
    right = layer.runner.apply_routed_output_transform
    layer.runner.apply_routed_output_transform = (  # type: ignore[method-assign]
        lambda routed_ML, unit: right(routed_ML, unit) * layer.runner.facts.scale
    )
    planning(lambda plan, layer: {"scaled_by": ()})(layer, comm)


def _slots_weigh_one(layer: FusedMoE, comm: Communicator) -> None:
    """Slots of fused shared experts weigh 1 though their sum is scaled later."""
    router = layer.runner.router

    def one(weights_MK: Tensor, layer: FusedMoE, comm: Communicator) -> Tensor:
        weights_MK = weights_MK.clone()
        weights_MK[:, -router.count :] = 1.0  # type: ignore[attr-defined]
        return weights_MK

    weighing(one)(layer, comm)


def _fused_and_scaled_later(case: Case) -> bool:
    return case.shared == "fused" and scaler(case) == "runner"


NOBODY_SCALES = planning(lambda plan, layer: {"scaled_by": ()})
RUNNER_AGAIN = scaling(lambda shared, routed, s, plan: (shared, routed * s))

FAULTS: tuple[Fault, ...] = (
    # -- A1
    Fault(
        name="block_scales_again", family="A1", computes="s^2*R + S",
        references=("vllm-project/vllm#24119",),
        case="deepseek_v3@tp2+scale=router", words="applied twice (s^2)",
        applies=_scaled, layer=RUNNER_AGAIN,
    ),
    Fault(
        name="router_scales_again", family="A1", computes="s^2*R + S",
        references=("vllm-project/vllm#24119", "vllm-project/vllm-ascend#9692"),
        case="deepseek_v3@tp4.ep4", words="applied twice (s^2)",
        applies=_scaled, layer=weighing(_times_s),
    ),
    Fault(
        name="kernel_scales_what_the_runner_scales", family="A1", computes="s^2*R + S",
        references=("vllm-project/vllm#41184", "vllm-project/vllm#45037", "NVIDIA/TensorRT-LLM#11652"),
        case="deepseek_v3@tp2+scale=output.experts=monolithic", words="applied twice (s^2)",
        applies=_scaled, layer=kernels(_kernel_too),
        grids=(*BY_OUTPUT, "tp2+scale=output.experts=monolithic", "tp4.ep4+scale=router.experts=monolithic"),
    ),
    Fault(
        name="kernel_squares_the_factor", family="A1", computes="s^2*R + S",
        references=("NVIDIA/TensorRT-LLM#11652",),
        case="deepseek_v3@tp2.ep2+scale=kernel", words="applied twice (s^2)",
        applies=_by("kernel"), layer=kernels(_kernel_scale(2)), grids=BY_KERNEL,
    ),
    Fault(
        name="sum_scaled_after_a_router_that_scaled", family="A1", also=("A3",), computes="s*(s*R + S)",
        references=("vllm-project/vllm#24119", "vllm-project/vllm#29687"),
        case="deepseek_v3@tp2+scale=router", words="the sum is scaled although R carried s already",
        applies=_scaled, layer=answering(lambda y, x, layer, comm: y * layer.runner.facts.scale),
    ),
    Fault(
        name="fp16_form_scaled_as_well", family="A1", computes="s^2*R + S, in units of s",
        references=("vllm-project/vllm#13232", "vllm-project/vllm#14809"),
        case="deepseek_v3@tp2.fp16+scale=output", words="applied twice (s^2)",
        applies=_by("unit"), layer=RUNNER_AGAIN, grids=IN_FP16,
    ),
    Fault(
        name="unit_declared_by_a_layer_that_keeps_none", family="A1", computes="s*(s*R + S)",
        references=("vllm-project/vllm#13232", "vllm-project/vllm#47408"),
        case="deepseek_v3@tp2+scale=output", words="s^2*R",
        also=("A3",), applies=_scaled_and_shared, block=telling(output_unit=lambda block: 1 / block._case.spec.scale),
        grids=BY_OUTPUT,
    ),
    # -- A2
    Fault(
        name="runner_forgets_the_factor", family="A2", computes="R + S",
        references=("sgl-project/sglang#8511", "sgl-project/sglang#8688", "vllm-project/vllm#23123"),
        case="deepseek_v3@tp2", words="never applied",
        applies=_by("runner"), layer=NOBODY_SCALES, grids=BY_OUTPUT,
    ),
    Fault(
        name="router_drops_the_factor", family="A2", computes="R + S",
        references=("vllm-project/vllm#49618", "sgl-project/sglang#8511"),
        case="deepseek_v3@tp2+scale=router", words="never applied",
        applies=_by("router"), layer=weighing(_over_s), grids=BY_ROUTER,
    ),
    Fault(
        name="kernel_ignores_the_factor", family="A2", computes="R + S",
        references=("vllm-project/vllm#43769", "vllm-project/vllm#44007", "vllm-project/vllm#32437"),
        case="deepseek_v3@tp2+scale=kernel", words="never applied",
        applies=_by("kernel"), layer=kernels(_kernel_scale(0)),
        grids=(*BY_KERNEL, "tp2+scale=router.experts=monolithic"),
    ),
    Fault(
        name="factor_lost_by_the_next_kernel", family="A2", computes="R + S after a swap",
        references=("vllm-project/vllm#23123", "vllm-project/vllm#43769"),
        case="deepseek_v3@tp2+scale=kernel.swap=reduced", words="never applied",
        applies=lambda case: scaler(case) == "kernel" and case.swap != "none", layer=_lost_by_the_next_kernel,
        grids=("tp1+scale=kernel.swap=reduced", "tp2+scale=kernel.swap=reduced", "tp2.ep4.dp2+scale=kernel.kernel=deepep_ht.swap=partial"),
    ),
    Fault(
        name="factor_on_rank_0_alone", family="A2", computes="s*R_0 + sum of R_r + S",
        references=("sgl-project/sglang#8511",),
        case="deepseek_v3@tp2.tokens33+scale=router", words="the routed scaling factor misses the share of R of rank 1",
        applies=_scaled, layer=weighing(_over_s_beyond_rank_0),
    ),
    # -- A3
    Fault(
        name="sum_scaled", family="A3", computes="s*(R + S)",
        references=("vllm-project/vllm#29687",),
        case="dots1@tp2", words="multiplies the shared experts too: s*(R + S)",
        applies=_scaled_and_shared,
        layer=together(NOBODY_SCALES, answering(lambda y, x, layer, comm: y * layer.runner.facts.scale)),
        grids=BY_OUTPUT,
    ),
    Fault(
        name="shared_scaled_too", family="A3", computes="s*R + s*S",
        references=("vllm-project/vllm#29687",),
        case="glm4_moe@tp4+scale=router", words="multiplies the shared experts too: s*(R + S)",
        applies=lambda case: scaler(case) in ("router", "kernel", "runner") and has_shared(case),
        layer=scaling(lambda shared, routed, s, plan: (None if shared is None else shared * s, routed)),
    ),
    Fault(
        name="shared_scaled_instead", family="A3", computes="R + s*S",
        references=("vllm-project/vllm#29687",),
        case="deepseek_v2@tp2", words="multiplies the shared experts in place of the routed part",
        applies=_scaled_and_shared,
        layer=together(NOBODY_SCALES, scaling(lambda shared, routed, s, plan: (None if shared is None else shared * s, routed))),
        grids=BY_OUTPUT,
    ),
    Fault(
        name="bias_of_the_latent_projection_scaled", family="A3", computes="s*(P*R + b) + S",
        references=("vllm-project/vllm#45707", "NVIDIA/Megatron-LM#2296"),
        case="nemotron_h@tp2", words="multiplies the bias of the latent projection",
        applies=lambda case: case.spec.experts.latent_bias and scaler(case) == "runner",
        layer=_bias_of_the_projection_too, grids=BY_OUTPUT,
    ),
    Fault(
        name="fused_slots_weigh_one", family="A3", computes="s*(R + S)",
        references=("sgl-project/sglang#28237", "sgl-project/sglang#35163"),
        case="deepseek_v3@tp2+shared=fused.scale=output", words="multiplies the shared experts too: s*(R + S)",
        applies=_fused_and_scaled_later, layer=_slots_weigh_one,
        grids=("tp1+shared=fused.scale=output", "tp2+shared=fused.scale=output", "tp4.bf16+shared=fused.scale=output"),
    ),
    # -- A4
    Fault(
        name="factor_only_with_renormalize", family="A4", also=("A2",), computes="R + S where weights stay as they are",
        references=("sgl-project/sglang#31449", "NVIDIA/Megatron-LM#1875"),
        case="deepseek_v2@tp2+scale=router", words="never applied",
        applies=lambda case: scaler(case) == "router" and not case.spec.routing.renormalize,
        layer=weighing(_over_s), grids=BY_ROUTER,
    ),
    Fault(
        name="factor_only_without_renormalize", family="A4", also=("A2",), computes="R + S where weights are renormalised",
        references=("sgl-project/sglang#31449",),
        case="deepseek_v3@tp2.ep2+scale=router", words="never applied",
        applies=lambda case: scaler(case) == "router" and case.spec.routing.renormalize,
        layer=weighing(_over_s), grids=BY_ROUTER,
    ),
    Fault(
        name="factor_cancelled_by_renormalising", family="A4", also=("A2",), computes="R + S: (s*w) / sum(s*w)",
        references=("sgl-project/sglang#31449", "vllm-project/vllm-ascend#9692"),
        case="sarvam_moe@tp2", words="never applied",
        applies=lambda case: scaler(case) == "router" and case.spec.routing.renormalize,
        layer=weighing(lambda weights_MK, layer, comm: weights_MK / weights_MK.sum(-1, keepdim=True)),
        grids=BY_ROUTER,
    ),
    # -- A5
    Fault(
        name="fp16_unit_not_declared", family="A5", computes="R + S/s",
        references=("vllm-project/vllm#13232",),
        case="glm4_moe@tp2.fp16", words="its unit 1/s is not declared",
        applies=_by("unit"), block=telling(output_unit=lambda block: 1.0), grids=IN_FP16,
    ),
    Fault(
        name="fp16_form_in_every_dtype", family="A5", computes="R + S/s",
        references=("vllm-project/vllm#13232", "vllm-project/vllm#27521"),
        case="deepseek_v3@tp2.bf16", words="its unit 1/s is not declared",
        applies=_scaled_and_shared,
        layer=planning(lambda plan, layer: {"scaled_by": (), "output_unit": 1 / layer._spec.scale}),
        block=telling(output_unit=lambda block: 1.0), grids=BY_OUTPUT,
    ),
    Fault(
        name="fp16_form_without_shared_experts", family="A5", also=("A2",), computes="R",
        references=("vllm-project/vllm#13232",),
        case="lfm2_moe@tp2.fp16+scale=output", words="never applied",
        applies=lambda case: scaler(case) == "runner" and case.spec.shared is None and case.dtype == "fp16",
        layer=NOBODY_SCALES, grids=IN_FP16,
    ),
    # -- A6
    Fault(
        name="absent_factor_read_as_zero", family="A6", computes="0*R + S",
        references=("ggml-org/llama.cpp#18980",),
        case="qwen2_moe@tp2", words="the routed part is missing",
        applies=lambda case: case.spec.routing.routed_scaling_factor is None,
        layer=weighing(lambda w, layer, comm: w * 0.0),
    ),
    Fault(
        name="unset_factor_of_the_kernel", family="A6", computes="0*R + S",
        references=("ggml-org/llama.cpp#18980", "vllm-project/vllm#32437"),
        case="deepseek_v3@tp2+scale=kernel", words="the routed part is missing",
        applies=_by("kernel"), layer=kernels(_kernel_scale(None)), grids=BY_KERNEL,
    ),
)  # fmt: skip
