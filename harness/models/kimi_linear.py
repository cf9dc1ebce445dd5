"""Kimi-Linear: DeepSeek-V3's routing without groups, one shared expert."""

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
    hidden_size=2304,
    routing=plain_routing(
        num_experts=256,
        top_k=8,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=1e-20,
        routed_scaling_factor=2.446,
        precision=FP32_ROUTER,
    ),
    experts=plain_experts(intermediate_size=1024, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=1024, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="kimi_linear",
    checkpoint="moonshotai/Kimi-Linear-48B-A3B-Instruct",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=72, intermediate_size=48, num_experts=16, top_k=4, scale=2.5),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of KimiLinearConfig", confidence="high"),),
    notes=(
        "The checkpoint's config calls them num_experts_per_token, num_expert_group and moe_renormalize",
        "vLLM's renormalisation has no epsilon",
    ),
    upstream=Upstream(
        config="transformers.models.kimi_linear.configuration_kimi_linear:KimiLinearConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "num_local_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "n_shared_experts": "=shared.n_shared_experts",
            "n_group": "=routing.n_group",
            "topk_group": "=routing.topk_group",
            "norm_topk_prob": "=routing.renormalize",
            "routed_scaling_factor": "=routing.routed_scaling_factor",
        },
        modules={"block": "transformers.models.kimi_linear.modeling_kimi_linear:KimiLinearMoE"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
