"""Gemma 4: a router with its own norm, a learned factor for each expert, a dense MLP wider than the experts."""

from dataclasses import replace

from harness.models import STACKED_EXPERTS, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import Activation, MoESpec, Output, RouterPrecision, Shared

GEGLU = Activation(kind="gelu_tanh", gated=True, clamp="none", limit=None, alpha=1.0, up_offset=0.0)

REAL = MoESpec(
    hidden_size=2816,
    routing=replace(
        plain_routing(
            num_experts=128,
            top_k=8,
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
        per_expert_scale=True,
        router_norm_epsilon=1e-6,
    ),
    experts=plain_experts(intermediate_size=704, activation=GEGLU),
    shared=Shared(n_shared_experts=1, intermediate_size=2112, activation=GEGLU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="gemma4",
    checkpoint="google/gemma-4-26B-A4B",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=72, intermediate_size=24, shared_intermediate_size=72, num_experts=16, top_k=4),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(
            what="all but the epsilon",
            source="the checkpoint's config as quoted in test fixtures of public repositories",
            confidence="high",
        ),
        Figure(what="router_norm_epsilon", source="transformers 5.24, defaults of Gemma4TextConfig", confidence="high"),
    ),
    notes=(
        "No block class: router, experts and MLP belong to the decoder layer, which norms the input of each",
        "Here all three read the same tokens: those norms and the factor on the layer's output are outside",
        "The norm behind the experts hides a factor on the routed part: a lost renormalisation shows only here",
    ),
    upstream=Upstream(
        config="transformers.models.gemma4.configuration_gemma4:Gemma4TextConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=shared.intermediate_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "num_experts": "=routing.num_experts",
            "top_k_experts": "=routing.top_k",
            "enable_moe_block": True,
            "rms_norm_eps": "=routing.router_norm_epsilon",
        },
        modules={
            "router": "transformers.models.gemma4.modeling_gemma4:Gemma4TextRouter",
            "experts": "transformers.models.gemma4.modeling_gemma4:Gemma4TextExperts",
            "shared": "transformers.models.gemma4.modeling_gemma4:Gemma4TextMLP",
        },
        parameters={
            "router_weight": "router.proj.weight",
            "router_scale": "router.scale",
            "per_expert_scale": "router.per_expert_scale",
            **STACKED_EXPERTS,
            "shared_w13": ("shared.gate_proj.weight", "shared.up_proj.weight"),
            "shared_w2": "shared.down_proj.weight",
        },
    ),
)
