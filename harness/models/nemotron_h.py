"""Nemotron 3 Super: experts without a gate in a latent width, 22 of 512, beside a shared expert in full width."""

from dataclasses import replace

from harness.models import FP32_ROUTER, Figure, Model, Upstream, plain_routing, scaled_down
from reference.spec import Activation, Experts, MoESpec, Output, Shared

RELU2 = Activation(kind="relu2", gated=False, clamp="none", limit=None, alpha=1.0, up_offset=0.0)
SHARED = Shared(n_shared_experts=1, intermediate_size=5376, activation=RELU2, bias=False, sigmoid_gate=False)

REAL = MoESpec(
    hidden_size=4096,
    routing=plain_routing(
        num_experts=512,
        top_k=22,
        scoring_func="sigmoid",
        correction_bias=True,
        n_group=1,
        topk_group=1,
        group_score="top2",
        renormalize=True,
        renormalize_rule="add",
        renormalize_epsilon=1e-20,
        routed_scaling_factor=5.0,
        precision=FP32_ROUTER,
    ),
    experts=Experts(
        intermediate_size=2688,
        activation=RELU2,
        bias=False,
        layout="halved",
        transposed=False,
        latent_size=1024,
        latent_bias=False,
    ),
    shared=SHARED,
    output=Output(combine="sum"),
    vision=None,
)

# A bias behind the latent projection is added once a rank where ranks are summed late: only a bias shows that.
BIASED = replace(REAL, experts=replace(REAL.experts, latent_bias=True), shared=replace(SHARED, bias=True))

PAGE = Model(
    model_type="nemotron_h",
    checkpoint="nvidia/NVIDIA-Nemotron-3-Super-120B-A12B",
    reason="evaluated",
    real=REAL,
    twin=scaled_down(
        BIASED,
        hidden_size=64,
        intermediate_size=24,
        shared_intermediate_size=48,
        num_experts=16,
        top_k=6,
        latent_size=32,
        scale=2.5,
    ),
    wide=scaled_down(
        REAL,
        hidden_size=64,
        intermediate_size=8,
        shared_intermediate_size=16,
        num_experts=512,
        top_k=22,
        latent_size=32,
        scale=2.5,
    ),
    apply_routed_scale_to_output=True,
    figures=(
        Figure(
            what="all but n_shared_experts",
            source="the checkpoint's config, quoted alike by four independent repositories",
            confidence="high",
        ),
        Figure(what="n_shared_experts", source="one shared MLP of the stated width", confidence="high"),
    ),
    notes=(
        "Router and shared expert read the tokens in full width, the experts their latent projection",
        "The released model has no biases; the twin sets mlp_bias: latent projections and shared expert get one",
        "transformers takes the shared width as it is, vLLM multiplies it by n_shared_experts (1 here)",
        "transformers scales the weights, vLLM the routed output",
    ),
    upstream=Upstream(
        config="transformers.models.nemotron_h.configuration_nemotron_h:NemotronHConfig",
        fields={
            "hidden_size": "=hidden_size",
            "moe_intermediate_size": "=experts.intermediate_size",
            "moe_shared_expert_intermediate_size": "=shared.intermediate_size",
            "moe_latent_size": "=experts.latent_size",
            "mlp_bias": "=experts.latent_bias",
            "n_routed_experts": "=routing.num_experts",
            "num_experts_per_tok": "=routing.top_k",
            "n_shared_experts": "=shared.n_shared_experts",
            "n_group": "=routing.n_group",
            "topk_group": "=routing.topk_group",
            "norm_topk_prob": "=routing.renormalize",
            "routed_scaling_factor": "=routing.routed_scaling_factor",
        },
        modules={"block": "transformers.models.nemotron_h.modeling_nemotron_h:NemotronHMoE"},
        parameters={
            "router_weight": "gate.weight",
            "e_score_correction_bias": "gate.e_score_correction_bias",
            "w13": "experts.up_proj",
            "w2": "experts.down_proj",
            "fc1_latent": "fc1_latent_proj.weight",
            "fc1_latent_bias": "fc1_latent_proj.bias",
            "fc2_latent": "fc2_latent_proj.weight",
            "fc2_latent_bias": "fc2_latent_proj.bias",
            "shared_w13": "shared_experts.up_proj.weight",
            "shared_b13": "shared_experts.up_proj.bias",
            "shared_w2": "shared_experts.down_proj.weight",
            "shared_b2": "shared_experts.down_proj.bias",
        },
    ),
)
