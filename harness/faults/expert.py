"""Faults of the experts themselves: halves, layout, activation, biases, which expert is which, what was never loaded.

M tokens, N tokens on this rank, E experts, i a rank's share of their width, K top-k, P kernel width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.faults.applies import both, has_experts_elsewhere, takes_rows
from harness.faults.fault import Fault
from harness.faults.plant import Apply, Plant, experts, kernels
from harness.faults.rules import Weights, activation_rule, expert_rule, tensors, zeroed
from harness.runner.experts import BatchedExperts, MonolithicExperts, TorchExperts
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.prepare_finalize.passthrough import Passthrough
from reference.spec import Activation, MoESpec


def _act(case: Case) -> Activation:
    return case.spec.experts.activation


def _is_gated(case: Case) -> bool:
    return _act(case).gated


def _has_bias(case: Case) -> bool:
    return case.spec.experts.bias


def _in_one_dtype(case: Case) -> bool:
    return case.quant == "none"


# ---- F1, F2: gate and up


def _exchanged(spec: MoESpec, stored: Tensor) -> Tensor:
    """Gate rows where up rows belong, in w13 [E, rows, P], transposed or not, and in b13 [E, rows]."""
    dim = stored.dim() - 1 if stored.dim() == 2 or spec.experts.transposed else stored.dim() - 2
    if spec.experts.layout == "interleaved":
        return stored.unflatten(dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1)
    return stored.unflatten(dim, (2, -1)).flip(dim).flatten(dim, dim + 1)


def _exchanged_on_the_last_rank(spec: MoESpec, given: Weights, comm: Communicator) -> Weights:
    return _EXCHANGED(spec, given, comm) if comm.rank == comm.world_size - 1 else given


_EXCHANGED = tensors(_exchanged, "w13", "b13")


def _other_layout(spec: MoESpec) -> MoESpec:
    return expert_rule(layout="halved" if spec.experts.layout == "interleaved" else "interleaved")(spec)


def _bias_in_the_other_layout(spec: MoESpec, stored: Tensor) -> Tensor:
    """b13 as a kernel takes it that splits w13 rightly."""
    if spec.experts.layout == "interleaved":
        return torch.stack(stored.chunk(2, -1), -1).flatten(-2)
    return torch.cat([stored[..., 0::2], stored[..., 1::2]], -1)


def _read_transposed(spec: MoESpec, stored: Tensor) -> Tensor:
    """The bytes of [E, a, b] taken for those of [E, b, a]."""
    return stored.reshape(stored.shape[0], stored.shape[2], stored.shape[1]).mT


HALVES = (
    Fault(
        name="gate_and_up_exchanged", family="F1", computes="silu(u) g", references=("sgl-project/sglang#32430",),
        case="mixtral@tp2", words="gate and up are exchanged in the routed experts",
        applies=both(_is_gated, _in_one_dtype), weights=_EXCHANGED,
    ),
    Fault(
        name="gate_and_up_exchanged_on_one_rank", family="F1", computes="silu(u) g on the last rank",
        references=("sgl-project/sglang#32430",),
        case="gpt_oss@tp2", words="gate and up are exchanged on rank 1 alone", also=("F9",),
        applies=lambda case: _is_gated(case) and _in_one_dtype(case) and case.grid.ranks > 1, weights=_exchanged_on_the_last_rank,
    ),
    Fault(
        name="shared_gate_and_up_exchanged", family="F1", computes="S with silu(u) g", references=("sgl-project/sglang#33107",),
        case="llama4@tp2", words="gate and up are exchanged in the shared experts",
        applies=lambda case: case.spec.shared is not None and case.spec.shared.activation.gated,
        weights=tensors(lambda spec, stored: stored.unflatten(0, (2, -1)).flip(0).flatten(0, 1), "shared_w13", "shared_b13"),
    ),
    Fault(
        name="read_in_the_other_layout", family="F2", computes="wrong pairs of gate and up",
        references=("vllm-project/vllm#46645", "ROCm/aiter#4398"),
        case="gpt_oss@tp2", words="w13 is read as halved, it is stored interleaved", applies=_is_gated, spec=_other_layout,
    ),
    Fault(
        name="bias_in_the_other_layout", family="F2", computes="gate gets the bias of up", references=("vllm-project/vllm#46645",),
        case="gpt_oss", words="the first expert bias is read as halved",
        applies=both(_has_bias, _is_gated), weights=tensors(_bias_in_the_other_layout, "b13"),
    ),
    Fault(
        name="w2_read_transposed", family="F2", computes="the bytes of W as those of its transpose", references=("unslothai/unsloth-zoo#779",),
        case="mixtral", words="the bytes of w2 are taken for those of the transpose", applies=_in_one_dtype, weights=tensors(_read_transposed, "w2"),
    ),
)  # fmt: skip


# ---- F3 to F6: clamp, biases, activation


def _bias_not_weighed(inner: TorchExperts, right: Apply) -> Apply:
    """The second bias is added to the sum of the weighed results, whole for each of the chosen experts."""
    bias_EP = inner.weights.b2_EP
    assert bias_EP is not None
    inner.weights = replace(inner.weights, b2_EP=None)
    none_EP = torch.cat([bias_EP, torch.zeros_like(bias_EP[:1])])  # the id -1 reads the last

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        return right(x_NP, weights_NK, local_NK) + none_EP[local_NK].sum(1).to(x_NP.dtype)

    return apply


def _weighs_itself(case: Case) -> bool:
    return takes_rows(case) and case.experts in ("auto", "monolithic")


def _plain_activation(spec: MoESpec) -> MoESpec:
    return activation_rule(clamp="none", limit=None, alpha=1.0, up_offset=0.0)(spec)


FUNCTION = (
    Fault(
        name="routed_not_clamped", family="F3", computes="E unclamped",
        references=("vllm-project/vllm-ascend#14364", "vllm-project/vllm#42855", "vllm-project/vllm#46645"),
        case="step3p5@tp2", words="the routed experts are not clamped",
        applies=lambda case: _act(case).clamp != "none", spec=activation_rule(clamp="none", limit=None),
    ),
    Fault(
        name="alpha_lost", family="F3", computes="silu(g) for g σ(1.702 g)", references=("vllm-project/vllm#46645",),
        case="gpt_oss", words="alpha=1.702 of the activation is dropped",
        applies=lambda case: _act(case).alpha != 1.0, spec=activation_rule(alpha=1.0),
    ),
    Fault(
        name="up_offset_lost", family="F3", computes="act(g) u for act(g) (u + 1)", references=("vllm-project/vllm#46645",),
        case="gpt_oss", words="the up half is taken without its +1",
        applies=lambda case: _act(case).up_offset != 0.0, spec=activation_rule(up_offset=0.0),
    ),
    Fault(
        name="activation_constants_lost", family="F3", computes="silu(g) u: no clamp, no alpha, no offset", also=("F6",),
        references=("vllm-project/vllm#46645",),
        case="gpt_oss", words="the routed experts use plain silu, without clamp, slope and offset", applies=lambda case: _act(case).clamp != "none" and _act(case).alpha != 1.0,
        spec=_plain_activation,
    ),
    Fault(
        name="limit_halved", family="F3", computes="clamped at limit / 2", references=("zml/zml#793",),
        case="step3p5@tp2", words="halve the clamp's limit", applies=lambda case: _act(case).clamp != "none",
        spec=lambda spec: activation_rule(limit=(spec.experts.activation.limit or 0.0) / 2)(spec),
    ),
    Fault(
        name="second_bias_not_weighed", family="F4", computes="Σ b for Σ w b", references=("NVIDIA-NeMo/Automodel#2591",),
        case="gpt_oss@tp2", words="the second expert bias is not multiplied by the router weight", also=("B10",),
        applies=both(_has_bias, _weighs_itself), layer=experts(_bias_not_weighed),
    ),
    Fault(
        name="first_bias_dropped", family="F5", computes="E without b13", references=("vllm-project/vllm#46645",),
        case="gpt_oss@tp2", words="the first expert bias is dropped", applies=_has_bias, weights=zeroed("b13"),
    ),
    Fault(
        name="second_bias_dropped", family="F5", computes="E without b2", references=("vllm-project/vllm#46645", "zml/zml#793"),
        case="gpt_oss@tp2", words="the second expert bias is dropped", also=("B10",), applies=_has_bias, weights=zeroed("b2"),
    ),
    Fault(
        name="both_biases_dropped", family="F5", computes="E without b13 and b2", references=("vllm-project/vllm#46645",),
        case="gpt_oss", words="both expert biases are dropped", applies=_has_bias, spec=expert_rule(bias=False),
    ),
    Fault(
        name="latent_bias_dropped", family="F5", computes="P R + S for P R + b + S", references=("NVIDIA/Megatron-LM#2296",),
        case="nemotron_h@tp2", words="the bias of the latent output projection is dropped", applies=lambda case: case.spec.experts.latent_bias,
        weights=zeroed("fc2_latent_bias"),
    ),
    Fault(
        name="silu_whatever_the_model", family="F6", computes="silu for gelu or relu²", references=("sgl-project/sglang#3170",),
        case="gemma4@tp2", words="the routed experts use silu instead of gelu_tanh",
        applies=lambda case: _act(case).kind != "silu", spec=activation_rule(kind="silu"),
    ),
    Fault(
        name="gelu_for_silu", family="F6", computes="gelu(g) u", references=("sgl-project/sglang#3170",),
        case="jamba@tp2", words="the routed experts use gelu", applies=lambda case: _act(case).kind == "silu",
        spec=activation_rule(kind="gelu", alpha=1.0),
    ),
    Fault(
        name="relu_for_silu", family="F6", computes="relu(g) u", references=("NVIDIA/Megatron-LM#5999",),
        case="minimax_m2", words="the routed experts use relu", applies=lambda case: _act(case).kind == "silu",
        spec=activation_rule(alpha=2.0**40),  # a step in place of the sigmoid
    ),
    Fault(
        name="relu_not_squared", family="F6", computes="silu(x)", references=("vllm-project/vllm#43653", "NVIDIA/Megatron-LM#5999"),
        case="nemotron_h", words="the routed experts use gelu instead of relu2", applies=lambda case: _act(case).kind == "relu2",
        spec=activation_rule(kind="gelu"),
    ),
)  # fmt: skip


# ---- F7: which expert is which


def _mapped(change: Callable[[Tensor], Tensor]) -> Plant:
    """Another map from ids [E + 1] to places of this rank, -1 for elsewhere."""

    def wrong(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        transport: Any = kernel.prepare_finalize
        inner: Any = transport._inner if isinstance(transport, Passthrough) else transport
        wrong_E = change(inner._local_E)
        inner._local_E = wrong_E
        if isinstance(kernel.experts, MonolithicExperts):
            kernel.experts._local_E = wrong_E

    return kernels(wrong)


def _global_as_local(right_E: Tensor) -> Tensor:
    """Ids that a rank has no place for are taken to be elsewhere."""
    ids_E = torch.arange(len(right_E))
    return torch.where(ids_E <= right_E.max(), ids_E, -1)


def _offset_twice(right_E: Tensor) -> Tensor:
    """The rank's first id is taken off twice; what then is no place of the rank is taken to be elsewhere."""
    local_E = torch.arange(len(right_E)) - 2 * int((right_E == 0).nonzero()[0])
    local_E[-1] = -1
    return torch.where((local_E >= 0) & (local_E <= right_E.max()), local_E, -1)


def _experts_of_the_first_rank(spec: MoESpec, given: Weights, comm: Communicator) -> Weights:
    """Places are taken for ids: each rank reads the experts 0, 1, ..., as many as it holds."""
    owners = torch.arange(spec.routing.num_experts).tensor_split(comm.ep.size)
    mine_e = owners[comm.ep.rank]

    def moved(stored: Tensor) -> Tensor:
        copied = stored.clone()
        copied[mine_e] = stored[: len(mine_e)]
        return copied

    names = ("w13", "w2", "b13", "b2", "w13_scale", "w2_scale")
    return {name: moved(t) if name.removeprefix("vision_") in names else t for name, t in given.items()}


def _placed_in_order(case: Case) -> bool:
    return has_experts_elsewhere(case) and case.placement == "linear"


def _seen_by_all(case: Case) -> bool:
    """Every rank looks up all ids in a map of its own."""
    return (
        _placed_in_order(case) and case.kernel in ("partial", "reduced") and case.swap in ("none", "partial", "reduced")
    )


# ---- F8, F9: what was never loaded, or loaded in another's place


def _first_share_everywhere(layer: FusedMoE, comm: Communicator) -> None:
    """The rank that cuts the experts is read off a group that has one rank."""
    layer._parallel = replace(layer._parallel, moe_tp_rank=0)
    layer.runner.kernel = layer.make_kernel(layer._settings.kernel, layer.placement)


def _copies(content: Callable[[Tensor], Tensor]) -> Plant:
    """Slots beyond one for each expert hold something else than the expert's w2 [i, P]."""

    def wrong(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        held = kernel.experts
        if placement is None or isinstance(held, MonolithicExperts):
            return
        local_E = placement.expert_map(layer._parallel.ep_rank)[:-1]
        for slot in range(placement.num_experts, len(local_E)):
            if local_E[slot] >= 0:
                held._w2_EiP = held._w2_EiP.clone()
                held._w2_EiP[local_E[slot]] = content(held._w2_EiP[local_E[slot]])

    return kernels(wrong)


def _has_copies(case: Case) -> bool:
    return case.placement in ("replicas", "moved")


def _junk(right: Tensor) -> Tensor:
    """What stood in the memory: here numbers of the same size, always the same."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(right.shape, generator=generator).to(right.dtype) * right.std()


def _piece_not_loaded(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
    """The first expert of the last rank has no w2."""
    if layer._comm.rank == layer._comm.world_size - 1:
        held: TorchExperts | BatchedExperts = (
            kernel.experts._inner if isinstance(kernel.experts, MonolithicExperts) else kernel.experts
        )
        held._w2_EiP = held._w2_EiP.clone()
        held._w2_EiP[:1] = 0.0


# ---- P1: the dtype of the products


def _in_bf16(inner: TorchExperts, right: Apply) -> Apply:
    """The grouped product takes and gives bf16, whatever the layer is in."""

    def apply(x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        return right(x_NP.bfloat16().to(x_NP.dtype), weights_NK, local_NK).bfloat16().to(x_NP.dtype)

    return apply


def _fp32_rows(case: Case) -> bool:
    return case.dtype == "fp32" and takes_rows(case)


_COPIES = (
    "tp2.ep2.tokens33+placement=replicas",
    "tp4.ep4.tokens33+placement=moved",
    "tp2.ep4.dp2.tokens33+kernel=deepep_ll.placement=replicas",
)

IDENTITY = (
    Fault(
        name="global_id_as_local", family="F7", computes="expert e of each rank for the id e, nobody for the rest",
        references=("flashinfer-ai/flashinfer#3066",),
        case="mixtral@tp2.ep2.tokens33", words="each rank takes global expert ids for its local ones", applies=_seen_by_all, layer=_mapped(_global_as_local),
    ),
    Fault(
        name="offset_twice", family="F7", also=("B8",), computes="R_r = 0, or the experts of other ids", references=("flashinfer-ai/flashinfer#3066",),
        case="mixtral@tp2.ep2.tokens33", words="the share of R of rank 1", applies=_seen_by_all, layer=_mapped(_offset_twice),
    ),
    Fault(
        name="local_id_as_global", family="F7", computes="experts 0, 1, ... on every rank", references=("sgl-project/sglang#23178",),
        case="mixtral@tp2.ep2.tokens33", words="every ep rank holds the experts of the first one",
        applies=_placed_in_order, weights=_experts_of_the_first_rank,
    ),
    Fault(
        name="copies_never_loaded", family="F8", computes="E(copy) = junk",
        references=("vllm-project/vllm-ascend#13161", "vllm-project/vllm-ascend#5311"),
        grids=_COPIES,
        case="mixtral@tp2.ep2.tokens33+placement=replicas", words="rows wrong", applies=_has_copies, layer=_copies(_junk),
    ),
    Fault(
        name="copies_left_zero", family="F8", computes="E(copy) = 0", references=("vllm-project/vllm-ascend#13161",),
        grids=_COPIES,
        case="mixtral@tp2.ep2.tokens33+placement=replicas", words="token-expert pairs do not count", also=("F7", "G9"), applies=_has_copies,
        layer=_copies(torch.zeros_like),
    ),
    Fault(
        name="expert_not_loaded_on_the_last_rank", family="F8", computes="R without one piece of one expert",
        references=("vllm-project/vllm-ascend#13161",), also=("F7", "G9"),
        case="mixtral@tp2.tokens33", words="the piece of expert 0 on rank 1 counts 0",
        applies=lambda case: case.grid.ranks > 1, layer=kernels(_piece_not_loaded),
    ),
    Fault(
        name="first_share_everywhere", family="F9", computes="tp R_0", references=("vllm-project/vllm-ascend#863",), also=("B8", "B14"),
        case="mixtral@tp4", words="every rank computes the share of R of rank 0", applies=lambda case: case.grid.moe_tp > 1, layer=_first_share_everywhere,
    ),
)  # fmt: skip

PRECISION = (
    Fault(
        name="routed_in_bf16", family="P1", computes="bf16(R) in an fp32 layer",
        references=("pytorch/torchtitan#1367", "pytorch/torchtitan#2235"),
        grids=("tp1.tokens33", "tp2.tokens33", "tp2.ep4.dp2.tokens33"),
        case="mixtral", words="every number of the fp32 output is a bf16 number",
        applies=_fp32_rows, layer=experts(_in_bf16),
    ),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (*HALVES, *FUNCTION, *IDENTITY, *PRECISION)
