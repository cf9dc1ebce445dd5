"""Mixtral: the plain softmax router with two renormalised weights."""

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision

REAL = MoESpec(
    hidden_size=4096,
    routing=plain_routing(
        num_experts=8,
        top_k=2,
        scoring_func="softmax",
        correction_bias=False,
        n_group=1,
        topk_group=1,
        group_score="max",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=None,
        precision=RouterPrecision(logits="model", scores="fp32", weights="fp32"),
    ),
    experts=plain_experts(intermediate_size=14336, activation=SILU),
    shared=None,
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="mixtral",
    checkpoint="mistralai/Mixtral-8x7B-v0.1",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=8, top_k=2),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of MixtralConfig", confidence="high"),),
    notes=("The smallest page: a good one to copy",),
    upstream=Upstream(
        config="transformers.models.mixtral.configuration_mixtral:MixtralConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_local_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
        },
        modules={"block": "transformers.models.mixtral.modeling_mixtral:MixtralSparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            **STACKED_EXPERTS,
        },
    ),
)
