"""Faults of the shared experts: their gate, their clamp, their slot in a fused kernel. R, S, s as in docs/faults.md."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.faults.fault import Fault, layers_of
from harness.faults.plant import put_router
from harness.faults.rules import Weights
from harness.runner.layer import FusedMoE
from harness.runner.precision import wide
from harness.runner.router import SharedSlotsRouter
from harness.runner.shared_experts import SharedMLP
from harness.systems import Layer
from reference.spec import MoESpec


def _has_shared(case: Case) -> bool:
    return case.spec.shared is not None


def _apart(case: Case) -> bool:
    """As an MLP of their own."""
    return _has_shared(case) and case.shared == "separate"


def _fused(case: Case) -> bool:
    return case.shared == "fused"


def _gated(case: Case) -> bool:
    return case.spec.shared is not None and case.spec.shared.sigmoid_gate


def _clamped(case: Case) -> bool:
    return case.spec.shared is not None and case.spec.shared.activation.clamp != "none"


def _latent(case: Case) -> bool:
    return _has_shared(case) and case.spec.experts.latent_size is not None


def _router_scales(case: Case) -> bool:
    return case.scaled_by == "router" and case.spec.scale != 1.0 and case.spec.routing.correction_bias


# ---- E1: the gate


def _without_gate(spec: MoESpec) -> MoESpec:
    assert spec.shared is not None
    return replace(spec, shared=replace(spec.shared, sigmoid_gate=False))


def _module(layer: FusedMoE) -> SharedMLP:
    assert layer.runner.shared_experts is not None
    return layer.runner.shared_experts._module  # type: ignore[return-value]


def _gate_without_sigmoid(layer: FusedMoE, comm: Communicator) -> None:
    right, gate = _module(layer), _module(layer)._gate
    assert gate is not None
    assert layer.runner.shared_experts is not None
    right._gate = None

    def module(x_MH: Tensor) -> Tensor:
        return (torch.nn.functional.linear(wide(x_MH), gate) * wide(right(x_MH))).to(x_MH.dtype)

    layer.runner.shared_experts._module = module


# ---- E2, E3: slots of the fused kernel


def _slots(layer: FusedMoE) -> SharedSlotsRouter:
    assert isinstance(layer._router, SharedSlotsRouter)
    return layer._router


def _slots_weighed(layer: FusedMoE, comm: Communicator) -> None:
    put_router(layer, replace(_slots(layer), weight=1 / layer._spec.scale))


def _slots_lost(layer: FusedMoE, comm: Communicator) -> None:
    put_router(layer, _slots(layer).inner)


def _slots_given_away(layer: FusedMoE, comm: Communicator) -> None:
    """The routing function does not know of the slots: as many more routed experts take them."""
    slots = _slots(layer)
    rule = slots.inner.routing  # type: ignore[attr-defined]
    put_router(layer, replace(slots.inner, routing=replace(rule, top_k=rule.top_k + slots.count)))  # type: ignore[type-var]


def _no_shared(layer: FusedMoE, comm: Communicator) -> None:
    """They run and nobody adds what they return."""
    shared = layer.runner.shared_experts
    assert shared is not None
    right = shared._module
    shared._module = lambda x_MH: torch.zeros_like(right(x_MH))


# ---- E4: added outside


def _added_again(built: Layer, comm: Communicator) -> Layer:
    """The caller adds S to an output that has it."""
    layer = layers_of(built)[0]
    tp = None if layer._parallel.sequence_parallel else comm.tp

    class AddedAgain:
        def __call__(self, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
            y_MH, own_MH = built(hidden_states, **inputs), _module(layer)(hidden_states)
            return y_MH + (own_MH if tp is None else tp.all_reduce(own_MH)) * self.output_unit

        def __getattr__(self, name: str) -> object:
            return getattr(built, name)

        @property
        def output_unit(self) -> float:
            unit: float = built.output_unit  # type: ignore[attr-defined]
            return unit

    return AddedAgain()


# ---- E5, E6: clamp and width


def _unclamped(spec: MoESpec) -> MoESpec:
    assert spec.shared is not None
    plain = replace(spec.shared.activation, clamp="none", limit=None)
    return replace(spec, shared=replace(spec.shared, activation=plain))


def _limit_of_the_routed(spec: MoESpec) -> MoESpec:
    assert spec.shared is not None
    bounded = replace(spec.shared.activation, limit=spec.experts.activation.limit)
    return replace(spec, shared=replace(spec.shared, activation=bounded))


def _both_unclamped(spec: MoESpec) -> MoESpec:
    plain = replace(spec.experts.activation, clamp="none", limit=None)
    return _unclamped(replace(spec, experts=replace(spec.experts, activation=plain)))


def _two_limits(case: Case) -> bool:
    if case.spec.shared is None or not _clamped(case):
        return False
    return case.spec.experts.activation.limit not in (None, case.spec.shared.activation.limit)


def _in_latent_width(spec: MoESpec, given: Weights, comm: Communicator) -> Weights:
    """Only the first columns are read and written, as many as the latent space has."""
    latent = spec.experts.latent_size
    w13, w2 = given["shared_w13"].clone(), given["shared_w2"].clone()
    w13[:, latent:], w2[latent:] = 0.0, 0.0
    changed = {"shared_w13": w13, "shared_w2": w2}
    if "shared_b2" in given:
        changed["shared_b2"] = given["shared_b2"].clone()
        changed["shared_b2"][latent:] = 0.0
    return given | changed


_FUSED = ("tp1+shared=fused.scale=router", "tp2+shared=fused", "tp4.bf16.tokens33+shared=fused.scale=router")

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="shared_gate_lost", family="E1", computes="R + S for R + σ(g x) S",
        references=("NousResearch/torchtitan#36", "vllm-project/vllm#55260", "InternLM/lmdeploy#3491"),
        case="qwen3_next@tp2", words="the shared experts' sigmoid gate is dropped", applies=_gated, spec=_without_gate,
    ),
    Fault(
        name="shared_gate_without_sigmoid", family="E1", computes="R + (g x) S for R + σ(g x) S",
        references=("InternLM/lmdeploy#3491",),
        case="qwen2_moe@tp2", words="gate has no sigmoid", applies=_gated, layer=_gate_without_sigmoid,
    ),
    Fault(
        name="shared_slot_weighed_1_over_s", family="E2", computes="s R + S / s",
        references=("sgl-project/sglang#28237", "sgl-project/sglang#35163", "sgl-project/sglang#29059"),
        grids=_FUSED,
        case="dots1+shared=fused.scale=router", words="y = s*R + 1/s*S", also=("A5",),
        applies=lambda case: _fused(case) and _router_scales(case), layer=_slots_weighed,
    ),
    Fault(
        name="shared_slot_lost", family="E3", computes="s R for s R + S",
        references=("ROCm/ATOM#1076", "sgl-project/sglang#38963"),
        grids=_FUSED,
        case="deepseek_v3@tp2+shared=fused", words="y = s*R", applies=_fused, layer=_slots_lost,
    ),
    Fault(
        name="shared_slot_given_to_an_expert", family="E3", computes="s R(k + 1) for s R(k) + S",
        references=("sgl-project/sglang#38963",),
        grids=_FUSED,
        case="deepseek_v3+shared=fused", words="1 more routed expert takes the place of the shared experts", applies=_fused, layer=_slots_given_away,
    ),
    Fault(
        name="shared_output_lost", family="E3", computes="s R for s R + S", references=("divyamakkar0/JAXformer#21",),
        case="qwen2_moe@tp4", words="y = R", applies=_apart, layer=_no_shared,
    ),
    Fault(
        name="shared_added_again_outside", family="E4", computes="s R + 2 S", references=("sgl-project/sglang#5707",),
        case="glm4_moe_lite@tp4", words="y = s*R + 2*S", also=("B3",), applies=_apart, block=_added_again,
    ),
    Fault(
        name="shared_not_clamped", family="E5", computes="S unclamped", references=("Blaizzy/mlx-vlm#1469",),
        case="step3p5@tp2", words="the shared experts are not clamped", applies=_clamped, spec=_unclamped,
    ),
    Fault(
        name="shared_clamped_like_the_routed", family="E5", computes="S at the limit of R", references=("zml/zml#793",),
        case="step3p5@tp2", words="the shared experts use the routed experts' limit",
        applies=_two_limits, spec=_limit_of_the_routed,
    ),
    Fault(
        name="nothing_clamped", family="E5", computes="R and S unclamped", references=("pie-project/pie#480",), also=("F3",),
        case="step3p5", words="the routed and the shared experts are not clamped",
        applies=_clamped, spec=_both_unclamped,
    ),
    Fault(
        name="shared_in_latent_width", family="E6", computes="S over the first latent columns",
        references=("PaddlePaddle/PaddleFleet#868",), also=("H4",),
        case="nemotron_h", words="the shared experts are as wide as the latent space", applies=_latent, weights=_in_latent_width,
    ),
)  # fmt: skip
