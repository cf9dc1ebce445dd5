"""LFM2: sigmoid scores with a correction bias, renormalised with an epsilon of 1e-6; no shared experts."""

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision

REAL = MoESpec(
    hidden_size=2048,
    routing=plain_routing(
        num_experts=32,
        top_k=4,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=1e-6,
        routed_scaling_factor=1.0,
        precision=RouterPrecision(logits="model", scores="model", weights="model"),
    ),
    experts=plain_experts(intermediate_size=1792, activation=SILU),
    shared=None,
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="lfm2_moe",
    checkpoint="LiquidAI/LFM2-8B-A1B",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=72, intermediate_size=48, num_experts=16, top_k=4, scale=2.5),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of Lfm2MoeConfig", confidence="high"),),
    notes=(
        "The checkpoint's factor is 1.0, which sees neither a lost nor a doubled one: the twin takes 2.5",
        "transformers rounds logits, scores and weights to the model's dtype, and keeps the bias in float32",
    ),
    upstream=Upstream(
        config="transformers.models.lfm2_moe.configuration_lfm2_moe:Lfm2MoeConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "num_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "norm_topk_prob": "=routing.renormalize",
            "routed_scaling_factor": "=routing.routed_scaling_factor",
            "use_expert_bias": "=routing.correction_bias",
        },
        modules={"block": "transformers.models.lfm2_moe.modeling_lfm2_moe:Lfm2MoeSparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "expert_bias",
            **STACKED_EXPERTS,
        },
    ),
)
