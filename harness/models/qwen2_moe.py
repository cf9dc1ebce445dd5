"""Qwen1.5-MoE: 60 experts, softmax weights not renormalised, a wide shared expert under a sigmoid gate."""

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision, Shared

REAL = MoESpec(
    hidden_size=2048,
    routing=plain_routing(
        num_experts=60,
        top_k=4,
        scoring_func="softmax",
        correction_bias=False,
        n_group=1,
        topk_group=1,
        group_score="max",
        renormalize=False,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=None,
        precision=RouterPrecision(logits="model", scores="fp32", weights="model"),
    ),
    experts=plain_experts(intermediate_size=1408, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=5632, activation=SILU, bias=False, sigmoid_gate=True),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="qwen2_moe",
    checkpoint="Qwen/Qwen1.5-MoE-A2.7B",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=24, shared_intermediate_size=96, num_experts=12, top_k=4),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of Qwen2MoeConfig", confidence="high"),),
    notes=("60 experts are neither a power of two nor a multiple of 8",),
    upstream=Upstream(
        config="transformers.models.qwen2_moe.configuration_qwen2_moe:Qwen2MoeConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "shared_expert_intermediate_size": "=shared.intermediate_size",
            "num_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "norm_topk_prob": "=routing.renormalize",
        },
        modules={"block": "transformers.models.qwen2_moe.modeling_qwen2_moe:Qwen2MoeSparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            **STACKED_EXPERTS,
            "shared_w13": ("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"),
            "shared_w2": "shared_expert.down_proj.weight",
            "shared_gate": "shared_expert_gate.weight",
        },
    ),
)
