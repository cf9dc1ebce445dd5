"""DeepSeek-V3 and R1: sigmoid scores with a correction bias, 4 of 8 groups by their two best scores, one shared expert."""

import math

from harness.models import FP32_ROUTER, SILU, Figure, Model, Upstream, scaled_down
from reference.spec import Experts, MoESpec, Output, Routing, Shared

REAL = MoESpec(
    hidden_size=7168,
    routing=Routing(
        num_experts=256,
        top_k=8,
        scoring_func="sigmoid",
        score_after_topk=False,
        correction_bias=True,
        n_group=8,
        topk_group=4,
        group_score="top2",
        group_fill=-math.inf,
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=1e-20,
        routed_scaling_factor=2.5,
        per_expert_scale=False,
        router_bias=False,
        router_norm_epsilon=None,
        sparsemixer_epsilon=None,
        weight_on="output",
        num_zero_experts=0,
        precision=FP32_ROUTER,
    ),
    experts=Experts(
        intermediate_size=2048,
        activation=SILU,
        bias=False,
        layout="halved",
        transposed=False,
        latent_size=None,
        latent_bias=False,
    ),
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
    figures=(Figure(what="all", source="transformers 5.24 DeepseekV3Config defaults", confidence="high"),),
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
            "n_shared_experts": 1,
            "n_group": "=routing.n_group",
            "topk_group": "=routing.topk_group",
            "norm_topk_prob": "=routing.renormalize",
            "routed_scaling_factor": "=routing.routed_scaling_factor",
        },
        modules={"block": "transformers.models.deepseek_v3.modeling_deepseek_v3:DeepseekV3MoE"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            "w13": "experts.gate_up_proj",
            "w2": "experts.down_proj",
            "shared_w13": ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"),
            "shared_w2": "shared_experts.down_proj.weight",
        },
    ),
)
