"""DeepSeek-V2: softmax scores, 3 of 8 groups by their best score, weights not renormalised, two shared experts."""

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
    hidden_size=5120,
    routing=plain_routing(
        num_experts=160,
        top_k=6,
        scoring_func="softmax",
        correction_bias=False,
        n_group=8,
        topk_group=3,
        group_score="max",
        renormalize=False,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=16.0,
        precision=FP32_ROUTER,
    ),
    experts=plain_experts(intermediate_size=1536, activation=SILU),
    shared=Shared(n_shared_experts=2, intermediate_size=3072, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="deepseek_v2",
    checkpoint="deepseek-ai/DeepSeek-V2",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(
        REAL,
        hidden_size=64,
        intermediate_size=24,
        shared_intermediate_size=48,
        num_experts=12,
        top_k=3,
        n_group=4,
        topk_group=2,
        scale=2.5,
    ),
    wide=None,
    apply_routed_scale_to_output=True,
    figures=(
        Figure(
            what="all",
            source="the published config, from memory; the defaults of DeepseekV2Config belong to no checkpoint",
            confidence="medium-high",
        ),
    ),
    notes=(
        "transformers fills dropped groups with 0, vLLM with -inf; softmax scores are positive, so both choose alike",
        "transformers scales the weights, vLLM the routed output; transformers does not read norm_topk_prob",
        "V2-Lite (2048 wide, 64 experts) has no groups and a factor of 1.0",
    ),
    upstream=Upstream(
        config="transformers.models.deepseek_v2.configuration_deepseek_v2:DeepseekV2Config",
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
            "topk_method": "group_limited_greedy",
        },
        modules={"block": "transformers.models.deepseek_v2.modeling_deepseek_v2:DeepseekV2Moe"},
        parameters={
            "router_weight": "gate.weight",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
