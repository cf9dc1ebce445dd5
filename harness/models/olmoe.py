"""OLMoE: the plain softmax router with eight weights, not renormalised."""

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision

REAL = MoESpec(
    hidden_size=2048,
    routing=plain_routing(
        num_experts=64,
        top_k=8,
        scoring_func="softmax",
        correction_bias=False,
        n_group=1,
        topk_group=1,
        group_score="max",
        renormalize=False,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=None,
        precision=RouterPrecision(logits="model", scores="fp32", weights="model"),
    ),
    experts=plain_experts(intermediate_size=1024, activation=SILU),
    shared=None,
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="olmoe",
    checkpoint="allenai/OLMoE-1B-7B-0924",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=16, top_k=4),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(
            what="all but intermediate_size", source="transformers 5.24, defaults of OlmoeConfig", confidence="high"
        ),
        Figure(
            what="intermediate_size",
            source="the published config, from memory; the default is 2048",
            confidence="medium",
        ),
    ),
    notes=("vLLM never renormalises here and does not read norm_topk_prob",),
    upstream=Upstream(
        config="transformers.models.olmoe.configuration_olmoe:OlmoeConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "norm_topk_prob": "=routing.renormalize",
        },
        modules={"block": "transformers.models.olmoe.modeling_olmoe:OlmoeSparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            **STACKED_EXPERTS,
        },
    ),
)
