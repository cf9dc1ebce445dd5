"""GLM-4.5 and 4.6: DeepSeek-V3's routing without groups, one shared expert."""

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
        top_k=8,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=1e-20,
        routed_scaling_factor=2.5,
        precision=FP32_ROUTER,
    ),
    experts=plain_experts(intermediate_size=1536, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=1536, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="glm4_moe",
    checkpoint="zai-org/GLM-4.5",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=10, top_k=4, scale=2.4375),
    wide=None,
    apply_routed_scale_to_output=True,
    figures=(
        Figure(
            what="all",
            source="the published config, from memory; the defaults of Glm4MoeConfig are the Air's",
            confidence="medium-high",
        ),
    ),
    notes=(
        "transformers scales the weights, vLLM the routed output, without making up for 1/s in fp16",
        "vLLM's renormalisation has no epsilon",
    ),
    upstream=Upstream(
        config="transformers.models.glm4_moe.configuration_glm4_moe:Glm4MoeConfig",
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
        modules={"block": "transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeMoE"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
