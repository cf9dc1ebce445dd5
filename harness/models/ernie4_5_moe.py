"""ERNIE 4.5: a correction bias on softmax scores, the sum of the weights clamped from below, two shared experts."""

from harness.models import (
    SHARED_EXPERTS,
    SILU,
    STACKED_EXPERTS,
    Figure,
    Model,
    Upstream,
    plain_experts,
    plain_routing,
    scaled_down,
)
from reference.spec import MoESpec, Output, RouterPrecision, Shared

REAL = MoESpec(
    hidden_size=2560,
    routing=plain_routing(
        num_experts=64,
        top_k=6,
        scoring_func="softmax",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="clamp",
        renormalize_epsilon=1e-12,
        routed_scaling_factor=None,
        precision=RouterPrecision(logits="fp32", scores="fp32", weights="model"),
    ),
    experts=plain_experts(intermediate_size=1536, activation=SILU),
    shared=Shared(n_shared_experts=2, intermediate_size=3072, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="ernie4_5_moe",
    checkpoint="baidu/ERNIE-4.5-21B-A3B-PT",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=24, shared_intermediate_size=48, num_experts=16, top_k=3),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of Ernie4_5_MoeConfig", confidence="high"),),
    notes=(
        "transformers keeps the router in float32 even under autocast and rounds the weights at its end",
        "use_bias would add biases to the shared experts; no checkpoint sets it",
    ),
    upstream=Upstream(
        config="transformers.models.ernie4_5_moe.configuration_ernie4_5_moe:Ernie4_5_MoeConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "moe_num_experts": "=routing.num_experts",
            "moe_k": "=routing.top_k",
            "moe_num_shared_experts": "=shared.n_shared_experts",
            "moe_norm_min": "=routing.renormalize_epsilon",
        },
        modules={"block": "transformers.models.ernie4_5_moe.modeling_ernie4_5_moe:Ernie4_5_MoeSparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.moe_statics.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
