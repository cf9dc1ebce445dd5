"""gpt-oss: biases everywhere, softmax over the chosen logits, a clamped SwiGLU on interleaved rows."""

from dataclasses import replace

from harness.models import STACKED_EXPERTS, Figure, Model, Upstream, plain_routing, scaled_down
from reference.spec import Activation, Experts, MoESpec, Output, RouterPrecision

REAL = MoESpec(
    hidden_size=2880,
    routing=replace(
        plain_routing(
            num_experts=32,
            top_k=4,
            scoring_func="softmax",
            correction_bias=False,
            n_group=1,
            topk_group=1,
            group_score="max",
            renormalize=False,
            renormalize_rule="add",
            renormalize_epsilon=0.0,
            routed_scaling_factor=None,
            precision=RouterPrecision(logits="model", scores="model", weights="model"),
        ),
        score_after_topk=True,
        router_bias=True,
    ),
    experts=Experts(
        intermediate_size=2880,
        activation=Activation(
            kind="silu",
            gated=True,
            clamp="before",
            limit=7.0,
            alpha=1.702,
            up_offset=1.0,
        ),
        bias=True,
        layout="interleaved",
        transposed=True,
        latent_size=None,
        latent_bias=False,
    ),
    shared=None,
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="gpt_oss",
    checkpoint="openai/gpt-oss-20b",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=72, intermediate_size=48, num_experts=16, top_k=4, limit=0.75),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(what="alpha and limit", source="transformers 5.24, defaults of GptOssConfig", confidence="high"),
        Figure(
            what="the rest",
            source="the published config, from memory; the defaults are the 120b's 128 experts",
            confidence="high",
        ),
    ),
    notes=(
        "Before the activation: the gate is clamped from above, the up half on both sides and raised by 1",
        "The twin's limit is 0.75, so that about a third of all values reach it",
    ),
    upstream=Upstream(
        config="transformers.models.gpt_oss.configuration_gpt_oss:GptOssConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_local_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "swiglu_alpha": "=experts.activation.alpha",
            "swiglu_limit": "=experts.activation.limit",
        },
        attributes={"experts.limit": "=experts.activation.limit", "experts.alpha": "=experts.activation.alpha"},
        modules={"block": "transformers.models.gpt_oss.modeling_gpt_oss:GptOssMLP"},
        parameters={
            "router_weight": "router.weight",
            "router_bias": "router.bias",
            **STACKED_EXPERTS,
            "b13": "experts.gate_up_proj_bias",
            "b2": "experts.down_proj_bias",
        },
    ),
)
