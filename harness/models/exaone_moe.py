"""K-EXAONE: DeepSeek-V3's routing without groups, one shared expert."""

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
    hidden_size=6144,
    routing=plain_routing(
        num_experts=128,
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
    experts=plain_experts(intermediate_size=2048, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=2048, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="exaone_moe",
    checkpoint="LGAI-EXAONE/K-EXAONE-236B-A23B",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=16, top_k=4, scale=2.4375),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(
            what="all",
            source="the checkpoint's config as quoted in test fixtures of public repositories",
            confidence="high",
        ),
    ),
    notes=(
        "The defaults of ExaoneMoeConfig (4096 wide, 64 experts) belong to no checkpoint",
        "vLLM's renormalisation has no epsilon",
    ),
    upstream=Upstream(
        config="transformers.models.exaone_moe.configuration_exaone_moe:ExaoneMoeConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "num_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "num_shared_experts": "=shared.n_shared_experts",
            "n_group": "=routing.n_group",
            "topk_group": "=routing.topk_group",
            "norm_topk_prob": "=routing.renormalize",
            "routed_scaling_factor": "=routing.routed_scaling_factor",
        },
        modules={"block": "transformers.models.exaone_moe.modeling_exaone_moe:ExaoneMoeSparseMoEBlock"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
