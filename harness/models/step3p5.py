"""Step-3.5-Flash: 288 experts, activations clamped after the SiLU, the shared expert's at another limit."""

from dataclasses import replace

from harness.models import (
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
from reference.spec import Activation, MoESpec, Output, RouterPrecision, Shared


def clamped(limit: float) -> Activation:
    """SwiGLU that is clamped after the SiLU."""
    return replace(SILU, clamp="after", limit=limit)


REAL = MoESpec(
    hidden_size=4096,
    routing=plain_routing(
        num_experts=288,
        top_k=8,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=0.0,
        routed_scaling_factor=3.0,
        precision=RouterPrecision(logits="model", scores="fp32", weights="fp32"),
    ),
    experts=plain_experts(intermediate_size=1280, activation=clamped(7.0)),
    shared=Shared(n_shared_experts=1, intermediate_size=1280, activation=clamped(16.0), bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="step3p5",
    checkpoint="stepfun-ai/Step-3.5-Flash",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(
        REAL, hidden_size=64, intermediate_size=48, num_experts=12, top_k=4, scale=2.4375, limit=0.75, shared_limit=1.25
    ),
    wide=scaled_down(
        REAL,
        hidden_size=64,
        intermediate_size=16,
        num_experts=288,
        top_k=8,
        scale=2.4375,
        limit=0.75,
        shared_limit=1.25,
    ),
    apply_routed_scale_to_output=False,
    figures=(
        Figure(what="sizes", source="transformers 5.24, defaults of Step3p7TextConfig", confidence="high"),
        Figure(
            what="s and the limits",
            source="the checkpoint's config as quoted in test fixtures of public repositories; the default s is 1.0",
            confidence="medium-high",
        ),
    ),
    notes=(
        "This is the layer of the last blocks: the others have no limits",
        "transformers runs it with the classes of Step-3.7 and scales the routed output; vLLM folds s into the weights",
        "transformers' from_pretrained(dtype=bf16) rounds the correction bias, which changes choices; vLLM keeps it float32",
        "The twins' limits are 0.75 and 1.25, so that many values reach them",
    ),
    upstream=Upstream(
        config="transformers.models.step3p7.configuration_step3p7:Step3p7TextConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "share_expert_dim": "=shared.intermediate_size",
            "n_routed_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "moe_router_scaling_factor": "=routing.routed_scaling_factor",
            "num_hidden_layers": 1,
            "swiglu_limits": ["=experts.activation.limit"],
            "swiglu_limits_shared": ["=shared.activation.limit"],
        },
        modules={"block": "transformers.models.step3p7.modeling_step3p7:Step3p7SparseMoeBlock"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            **STACKED_EXPERTS,
            **SHARED_EXPERTS,
        },
    ),
)
