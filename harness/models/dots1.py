"""dots.llm1: DeepSeek-V3's routing without groups, two shared experts."""

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
    hidden_size=4096,
    routing=plain_routing(
        num_experts=128,
        top_k=6,
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
    experts=plain_experts(intermediate_size=1408, activation=SILU),
    shared=Shared(n_shared_experts=2, intermediate_size=2816, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="dots1",
    checkpoint="rednote-hilab/dots.llm1.base",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(
        REAL, hidden_size=64, intermediate_size=24, shared_intermediate_size=48, num_experts=16, top_k=3, scale=2.4375
    ),
    wide=None,
    apply_routed_scale_to_output=True,
    figures=(
        Figure(
            what="all",
            source="the checkpoint's config as quoted in test fixtures of public repositories",
            confidence="high",
        ),
    ),
    notes=(
        "n_group and topk_group are null in the checkpoint: no groups",
        "vLLM 0.12 to 0.19.1 scaled the shared experts too; the file is gone since 0.32",
    ),
    upstream=Upstream(
        config="transformers.models.dots1.configuration_dots1:Dots1Config",
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
        modules={"block": "transformers.models.dots1.modeling_dots1:Dots1MoE"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
