"""Llama 4: one expert a token, chosen by its logit; its sigmoid multiplies the expert's input."""

from dataclasses import replace

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision, Shared

REAL = MoESpec(
    hidden_size=5120,
    routing=replace(
        plain_routing(
            num_experts=16,
            top_k=1,
            scoring_func="sigmoid",
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
        score_after_topk=True,
        weight_on="input",
    ),
    experts=replace(plain_experts(intermediate_size=8192, activation=SILU), transposed=True),
    shared=Shared(n_shared_experts=1, intermediate_size=8192, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="llama4",
    checkpoint="meta-llama/Llama-4-Scout-17B-16E",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=16, top_k=1),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of Llama4TextConfig", confidence="high"),),
    notes=("transformers runs every expert on every token, on zeros if not chosen: the same without biases",),
    upstream=Upstream(
        config="transformers.models.llama4.configuration_llama4:Llama4TextConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_local_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
        },
        modules={"block": "transformers.models.llama4.modeling_llama4:Llama4TextMoe"},
        parameters={
            "router_weight": "router.weight",
            **STACKED_EXPERTS,
            "shared_w13": ("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"),
            "shared_w2": "shared_expert.down_proj.weight",
        },
    ),
)
