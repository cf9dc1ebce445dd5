"""Jamba: the plain softmax router, its two weights not renormalised."""

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision

REAL = MoESpec(
    hidden_size=4096,
    routing=plain_routing(
        num_experts=16,
        top_k=2,
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
    experts=plain_experts(intermediate_size=14336, activation=SILU),
    shared=None,
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="jamba",
    checkpoint="ai21labs/AI21-Jamba2-Mini",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=56, intermediate_size=48, num_experts=16, top_k=2),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(
            what="all",
            source="transformers 5.24, defaults of JambaConfig, the sizes of Jamba 1.5 and 2 Mini",
            confidence="high",
        ),
    ),
    notes=("The two weights add up to less than 1",),
    upstream=Upstream(
        config="transformers.models.jamba.configuration_jamba:JambaConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
        },
        modules={"block": "transformers.models.jamba.modeling_jamba:JambaSparseMoeBlock"},
        parameters={
            "router_weight": "router.weight",
            **STACKED_EXPERTS,
        },
    ),
)
