"""Qwen3-Next: 10 of 512 experts by a renormalised softmax, a shared expert under a sigmoid gate."""

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision, Shared

REAL = MoESpec(
    hidden_size=2048,
    routing=plain_routing(
        num_experts=512,
        top_k=10,
        scoring_func="softmax",
        correction_bias=False,
        n_group=1,
        topk_group=1,
        group_score="max",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=None,
        precision=RouterPrecision(logits="model", scores="fp32", weights="model"),
    ),
    experts=plain_experts(intermediate_size=512, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=512, activation=SILU, bias=False, sigmoid_gate=True),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="qwen3_next",
    checkpoint="Qwen/Qwen3-Next-80B-A3B-Instruct",
    reason="ours",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=16, top_k=5),
    wide=scaled_down(REAL, hidden_size=64, intermediate_size=16, num_experts=512, top_k=10),
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of Qwen3NextConfig", confidence="high"),),
    notes=("The gate of the shared expert is one number for each token",),
    upstream=Upstream(
        config="transformers.models.qwen3_next.configuration_qwen3_next:Qwen3NextConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "shared_expert_intermediate_size": "=shared.intermediate_size",
            "num_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "norm_topk_prob": "=routing.renormalize",
        },
        modules={"block": "transformers.models.qwen3_next.modeling_qwen3_next:Qwen3NextSparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            **STACKED_EXPERTS,
            "shared_w13": ("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"),
            "shared_w2": "shared_expert.down_proj.weight",
            "shared_gate": "shared_expert_gate.weight",
        },
    ),
)
