"""Phi-MoE: the sparsemixer, two picks with a masked softmax each, so that the two weights may add up to 2."""

import math

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision, Routing

REAL = MoESpec(
    hidden_size=4096,
    routing=Routing(
        num_experts=16,
        top_k=2,
        scoring_func="sparsemixer",
        score_after_topk=False,
        correction_bias=False,
        n_group=1,
        topk_group=1,
        group_score="max",
        group_fill=-math.inf,
        renormalize=False,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=None,
        per_expert_scale=False,
        router_bias=False,
        router_norm_epsilon=None,
        sparsemixer_epsilon=0.01,
        weight_on="output",
        num_zero_experts=0,
        precision=RouterPrecision(logits="model", scores="model", weights="model"),
    ),
    experts=plain_experts(intermediate_size=448, activation=SILU),
    shared=None,
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="phimoe",
    checkpoint="microsoft/Phi-tiny-MoE-instruct",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=72, intermediate_size=48, num_experts=16, top_k=2),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(
            what="sparsemixer_epsilon",
            source="transformers 5.24, defaults of PhimoeConfig (router_jitter_noise)",
            confidence="high",
        ),
        Figure(
            what="the rest",
            source="the published config, from memory; the defaults are Phi-3.5-MoE's",
            confidence="medium",
        ),
    ),
    notes=(
        "The sparsemixer runs at inference too; jitter of the input is for training only",
        "vLLM's epsilon is 0.01 whatever router_jitter_noise says",
    ),
    upstream=Upstream(
        config="transformers.models.phimoe.configuration_phimoe:PhimoeConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_local_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "router_jitter_noise": "=routing.sparsemixer_epsilon",
        },
        modules={"block": "transformers.models.phimoe.modeling_phimoe:PhimoeSparseMoeBlock"},
        parameters={
            "router_weight": "router.weight",
            **STACKED_EXPERTS,
        },
    ),
)
