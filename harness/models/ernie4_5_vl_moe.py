"""ERNIE 4.5 VL: a router and experts for text, narrower ones for images, and one shared MLP for both."""

from harness.models import SHARED_EXPERTS, SILU, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision, Shared, VisionBranch

ROUTING = plain_routing(
    num_experts=64,
    top_k=6,
    scoring_func="softmax",
    correction_bias=True,
    n_group=1,
    topk_group=1,
    group_score="top2",
    renormalize=True,
    renormalize_rule="clamp",
    renormalize_epsilon=1e-12,
    routed_scaling_factor=None,
    precision=RouterPrecision(logits="fp32", scores="fp32", weights="model"),
)

REAL = MoESpec(
    hidden_size=2560,
    routing=ROUTING,
    experts=plain_experts(intermediate_size=1536, activation=SILU),
    shared=Shared(n_shared_experts=2, intermediate_size=3072, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=VisionBranch(routing=ROUTING, experts=plain_experts(intermediate_size=512, activation=SILU)),
)

PAGE = Model(
    model_type="ernie4_5_vl_moe",
    checkpoint="baidu/ERNIE-4.5-VL-28B-A3B-PT",
    reason="rewritten",
    real=REAL,
    twin=scaled_down(
        REAL,
        hidden_size=64,
        intermediate_size=48,
        vision_intermediate_size=24,
        shared_intermediate_size=96,
        num_experts=16,
        top_k=3,
    ),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of Ernie4_5_VLMoeTextConfig", confidence="high"),),
    notes=(
        "The width of the shared MLP is that of the text experts times the number of shared experts",
        "A batch without image tokens runs the text branch alone",
    ),
    upstream=Upstream(
        config="transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe:Ernie4_5_VLMoeTextConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": ["=experts.intermediate_size", "=vision.experts.intermediate_size"],
            "moe_num_experts": "=routing.num_experts",
            "moe_k": "=routing.top_k",
            "moe_num_shared_experts": "=shared.n_shared_experts",
            "moe_norm_min": "=routing.renormalize_epsilon",
        },
        modules={"block": "transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe:Ernie4_5_VLMoeMoeBlock"},
        parameters={
            "router_weight": "text_moe.gate.weight",
            "e_score_correction_bias": "text_moe.gate.moe_statics.e_score_correction_bias",
            "w13": "text_moe.experts.gate_up_proj",
            "w2": "text_moe.experts.down_proj",
            "vision_router_weight": "vision_moe.gate.weight",
            "vision_e_score_correction_bias": "vision_moe.gate.moe_statics.e_score_correction_bias",
            "vision_w13": "vision_moe.experts.gate_up_proj",
            "vision_w2": "vision_moe.experts.down_proj",
            **SHARED_EXPERTS,
        },
        inputs={"modality": "moe_mm_token_type_ids"},
    ),
)
