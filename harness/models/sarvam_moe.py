"""Sarvam: DeepSeek-V3's routing without groups, one shared expert."""

from harness.models import (
    FP32_ROUTER,
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
from reference.spec import MoESpec, Output, Shared

REAL = MoESpec(
    hidden_size=4096,
    routing=plain_routing(
        num_experts=128,
        top_k=6,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=1e-20,
        routed_scaling_factor=2.5,
        precision=FP32_ROUTER,
    ),
    experts=plain_experts(intermediate_size=1024, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=1024, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="sarvam_moe",
    checkpoint="sarvamai/sarvam-30b",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=48, num_experts=16, top_k=3, scale=2.4375),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(Figure(what="all", source="transformers 5.24, defaults of SarvamMoEConfig", confidence="medium"),),
    notes=(
        "transformers has a config but no block of its own: the auto classes run it with GLM-4-MoE's",
        "vLLM runs it with Bailing's block: no epsilon, logits in the model's dtype, the bias normalised at load",
        "sarvam_mla, the 105B model, has the same block; its figures were not found",
    ),
    upstream=Upstream(
        config="transformers.models.sarvam_moe.configuration_sarvam_moe:SarvamMoEConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "n_routed_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "n_shared_experts": "=shared.n_shared_experts",
            "n_group": "=routing.n_group",
            "topk_group": "=routing.topk_group",
            "norm_topk_prob": "=routing.renormalize",
            "routed_scaling_factor": "=routing.routed_scaling_factor",
        },
        modules={"block": "transformers.models.glm4_moe.modeling_glm4_moe:Glm4MoeMoE"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
