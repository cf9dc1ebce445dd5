"""Granite 4: the softmax runs over the chosen logits; a shared MLP stands beside the MoE block."""

from dataclasses import replace

from harness.models import SILU, Figure, Model, Upstream, plain_experts, plain_routing, scaled_down
from reference.spec import MoESpec, Output, RouterPrecision, Shared

REAL = MoESpec(
    hidden_size=4096,
    routing=replace(
        plain_routing(
            num_experts=72,
            top_k=10,
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
        score_after_topk=True,
    ),
    experts=plain_experts(intermediate_size=768, activation=SILU),
    shared=Shared(n_shared_experts=1, intermediate_size=1536, activation=SILU, bias=False, sigmoid_gate=False),
    output=Output(combine="sum"),
    vision=None,
)

PAGE = Model(
    model_type="granitemoehybrid",
    checkpoint="ibm-granite/granite-4.0-h-small",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(REAL, hidden_size=64, intermediate_size=24, shared_intermediate_size=48, num_experts=12, top_k=5),
    wide=None,
    apply_routed_scale_to_output=False,
    figures=(
        Figure(
            what="all",
            source="the checkpoint's config as quoted in test fixtures of public repositories",
            confidence="high",
        ),
    ),
    notes=("The decoder layer adds the shared MLP (in this layer) and multiplies by residual_multiplier (outside)",),
    upstream=Upstream(
        config="transformers.models.granitemoehybrid.configuration_granitemoehybrid:GraniteMoeHybridConfig",
        fields={
            "hidden_size": "=hidden_size",
            "intermediate_size": "=experts.intermediate_size",
            "num_local_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "shared_intermediate_size": "=shared.intermediate_size",
        },
        modules={
            "block": "transformers.models.granitemoehybrid.modeling_granitemoehybrid:GraniteMoeHybridMoE",
            "shared": "transformers.models.granitemoehybrid.modeling_granitemoehybrid:GraniteMoeHybridMLP",
        },
        parameters={
            "router_weight": "block.router.weight",
            "w13": "block.experts.gate_up_proj",
            "w2": "block.experts.down_proj",
            "shared_w13": "shared.input_linear.weight",
            "shared_w2": "shared.output_linear.weight",
        },
    ),
)
