"""DeepSeek-V3 and R1: sigmoid scores with a correction bias, 4 of 8 groups by their two best, one shared expert."""

from harness.models import (
    FP32_ROUTER,
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
from reference.spec import MoESpec, Output, Shared

REAL = MoESpec(
    hidden_size=7168,
    routing=plain_routing(
        num_experts=256,
        top_k=8,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=8,
        topk_group=4,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=1e-20,
        routed_scaling_factor=2.5,
        precision=FP32_ROUTER,
    ),
    experts=plain_experts(intermediate_size=2048, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=2048, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="deepseek_v3",
    checkpoint="deepseek-ai/DeepSeek-R1",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(
        REAL, hidden_size=64, intermediate_size=48, num_experts=16, top_k=4, n_group=4, topk_group=2, scale=2.4375
    ),
    wide=None,
    apply_routed_scale_to_output=True,
    figures=(Figure(what="all", source="transformers 5.24, defaults of DeepseekV3Config", confidence="high"),),
    notes=(
        "transformers scales the weights, vLLM the routed output (the router on ROCm with aiter)",
        "vLLM's renormalisation has no epsilon",
    ),
    upstream=Upstream(
        config="transformers.models.deepseek_v3.configuration_deepseek_v3:DeepseekV3Config",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "n_routed_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "n_shared_experts": "=shared.n_shared_experts",
            "n_group": "=routing.n_group",
            "topk_group": "=routing.topk_group",
            "norm_topk_prob": "=routing.renormalize",
            "routed_scaling_factor": "=routing.routed_scaling_factor",
        },
        modules={"block": "transformers.models.deepseek_v3.modeling_deepseek_v3:DeepseekV3MoE"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
