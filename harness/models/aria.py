"""Aria: the softmax runs over the chosen logits, experts are stored transposed, two shared experts."""

from dataclasses import replace

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
    routing=replace(
        plain_routing(
            num_experts=64,
            top_k=6,
            scoring_func="softmax",
            correction_bias=False,
            n_group=1,
            topk_group=1,
            group_score="max",
            renormalize=False,
            renormalize_rule="add",
            renormalize_epsilon=0.0,
            routed_scaling_factor=None,
            precision=RouterPrecision(logits="model", scores="model", weights="model"),
        ),
        score_after_topk=True,
    ),
    experts=replace(plain_experts(intermediate_size=1664, activation=SILU), transposed=True),
    shared=Shared(n_shared_experts=2, intermediate_size=3328, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="aria",
    checkpoint="rhymes-ai/Aria",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=24, shared_intermediate_size=48, num_experts=16, top_k=3),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="the published config, from memory", confidence="medium"),),
    notes=("transformers runs the whole router in the model's dtype, softmax included",),
    upstream=Upstream(
        config="transformers.models.aria.configuration_aria:AriaTextConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "moe_num_experts": "=routing.num_experts",
            "moe_topk": "=routing.top_k",
            "moe_num_shared_experts": "=shared.n_shared_experts",
        },
        modules={"block": "transformers.models.aria.modeling_aria:AriaTextMoELayer"},
        parameters={
            "router_weight": "router.weight",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
