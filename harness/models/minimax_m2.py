"""MiniMax-M2: sigmoid scores with a correction bias, renormalised without an epsilon; no factor, no shared experts."""

from harness.models import SILU, STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision

REAL = MoESpec(
    hidden_size=3072,
    routing=plain_routing(
        num_experts=256,
        top_k=8,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=None,
        precision=RouterPrecision(logits="model", scores="fp32", weights="fp32"),
    ),
    experts=plain_experts(intermediate_size=1536, activation=SILU),
    shared=None,
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="minimax_m2",
    checkpoint="MiniMaxAI/MiniMax-M2",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=40, intermediate_size=48, num_experts=16, top_k=4),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of MiniMaxM2Config", confidence="high"),),
    notes=(
        "transformers' from_pretrained(dtype=bf16) rounds the correction bias, which changes choices; vLLM keeps it float32",
    ),
    upstream=Upstream(
        config="transformers.models.minimax_m2.configuration_minimax_m2:MiniMaxM2Config",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_local_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
        },
        modules={"block": "transformers.models.minimax_m2.modeling_minimax_m2:MiniMaxM2SparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "e_score_correction_bias",
            **STACKED_EXPERTS,
        },
    ),
)
