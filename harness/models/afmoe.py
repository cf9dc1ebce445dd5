"""AFMoE (Trinity): sigmoid scores with a correction bias that lives in the block, one shared expert."""

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
    hidden_size=2048,
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
        routed_scaling_factor=2.826,
        precision=RouterPrecision(logits="model", scores="fp32", weights="fp32"),
    ),
    experts=plain_experts(intermediate_size=1024, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=1024, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="afmoe",
    checkpoint="arcee-ai/Trinity-Mini",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=16, top_k=4, scale=2.5),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(
            what="all but the width of the shared expert",
            source="the checkpoint's config as quoted in test fixtures of public repositories",
            confidence="high",
        ),
    ),
    notes=(
        "The defaults of AfmoeConfig (64 experts, top 6, two shared, scale 1.0) belong to no checkpoint of this size",
        "The decoder layer normalises the block's output before it adds the residual: outside this layer",
        "transformers always scores by sigmoid and renormalises; vLLM reads score_func and route_norm",
    ),
    upstream=Upstream(
        config="transformers.models.afmoe.configuration_afmoe:AfmoeConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "num_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "num_shared_experts": "=shared.n_shared_experts",
            "route_scale": "=routing.routed_scaling_factor",
        },
        modules={"block": "transformers.models.afmoe.modeling_afmoe:AfmoeSparseMoeBlock"},
        parameters={
            "router_weight": "router.gate.weight",
            "e_score_correction_bias": "expert_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
