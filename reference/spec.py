"""The specification of a Mixture-of-Experts layer, as frozen data nested by subject. No torch here.

No field that changes the result has a default: every model page states every rule it follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"]
GroupScore = Literal["max", "top2"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu2"]
Precision = Literal["fp32", "model"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "logits": ("fp32", "model"),
    "scores": ("fp32", "model"),
    "weights": ("fp32", "model"),
    "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"),
    "group_score": ("max", "top2"),
    "renormalize_rule": ("add", "clamp"),
    "weight_on": ("output", "input"),
    "kind": ("silu", "gelu", "gelu_tanh", "relu2"),
    "clamp": ("none", "before", "after"),
    "layout": ("halved", "interleaved"),
    "combine": ("sum", "average"),
}


class SpecError(ValueError):
    """A specification that no layer can follow; the message names the fields, their values and the rule."""


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 1:
            raise SpecError(f"{type(owner).__name__}.{name}={value}: expected at least 1")


def _check_choices(owner: object) -> None:
    for field, allowed in _CHOICES.items():
        if hasattr(owner, field) and (value := getattr(owner, field)) not in allowed:
            raise SpecError(f"{type(owner).__name__}.{field}={value!r}: expected one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterPrecision:
    """Where the released router rounds: "fp32", or "model" for the dtype of the layer.

    Changes no exact result. Only the naive runs read it, so that a bf16 router is judged by a bf16 yardstick.
    """

    logits: Precision
    scores: Precision
    weights: Precision

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which experts a token visits and with which weight.

    scoring_func: turns logits into scores; "sparsemixer" (PhiMoE) picks twice, each pick with its own masked softmax.
    score_after_topk: choose on the raw logits, then score only the K chosen (gpt-oss, Granite, Llama-4).
    correction_bias: e_score_correction_bias [E + zero experts] takes part in the choice, never in the weights.
    n_group, topk_group, group_score, group_fill: keep the best topk_group of n_group groups of experts; group_score is the
        best score of a group ("max") or the sum of its two best ("top2"); scores of dropped groups become group_fill, -inf
        or 0.0. n_group = 1 means no groups.
    renormalize, renormalize_rule, renormalize_epsilon: divide the K weights by sum + epsilon ("add") or by
        max(sum, epsilon) ("clamp").
    routed_scaling_factor: s, multiplies the routed part once, after renormalising; None where the model has none.
    per_expert_scale: each weight is multiplied by a learned factor of its expert (Gemma-4).
    router_norm_epsilon: the router reads rms_norm(x) * router_scale * H**-0.5 instead of x (Gemma-4); None elsewhere.
    sparsemixer_epsilon: half width of the mask of "sparsemixer", relative; None elsewhere.
    weight_on: "output" multiplies the expert's result, "input" its input (Llama-4; only K = 1).
    num_zero_experts: identity experts with ids num_experts, num_experts + 1, ...: they return their input.
    precision: see RouterPrecision.
    """

    num_experts: int
    top_k: int
    scoring_func: Scoring
    score_after_topk: bool
    correction_bias: bool
    n_group: int
    topk_group: int
    group_score: GroupScore
    group_fill: float
    renormalize: bool
    renormalize_rule: Literal["add", "clamp"]
    renormalize_epsilon: float
    routed_scaling_factor: float | None
    per_expert_scale: bool
    router_bias: bool
    router_norm_epsilon: float | None
    sparsemixer_epsilon: float | None
    weight_on: Literal["output", "input"]
    num_zero_experts: int
    precision: RouterPrecision

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_positive(self, "num_experts")
        if not 1 <= self.top_k <= self.num_logits:
            raise SpecError(f"top_k={self.top_k}: expected 1 to {self.num_logits}, the number of experts")
        if self.n_group < 1 or self.num_logits % self.n_group:
            raise SpecError(f"n_group={self.n_group} does not divide num_experts={self.num_logits}")
        if not 1 <= self.topk_group <= self.n_group:
            raise SpecError(f"topk_group={self.topk_group}: expected 1 to n_group={self.n_group}")
        kept = self.topk_group * (self.num_logits // self.n_group)
        if self.top_k > kept:
            raise SpecError(f"top_k={self.top_k} exceeds the {kept} experts of {self.topk_group} kept groups")
        if self.group_score == "top2" and self.n_group > 1 and self.num_logits // self.n_group < 2:
            raise SpecError(f"group_score='top2' needs 2 experts a group: {self.num_logits} in {self.n_group} groups")
        if self.group_fill not in (0.0, -math.inf):
            raise SpecError(f"group_fill={self.group_fill}: expected -inf or 0.0")
        if self.weight_on == "input" and self.top_k != 1:
            raise SpecError(
                f"weight_on='input' needs top_k=1, got top_k={self.top_k}: one input cannot carry two weights"
            )
        if (self.scoring_func == "sparsemixer") != (self.sparsemixer_epsilon is not None):
            raise SpecError("sparsemixer_epsilon is set exactly when scoring_func='sparsemixer'")
        if self.sparsemixer_epsilon is not None and not 0 < self.sparsemixer_epsilon < 0.5:
            raise SpecError(f"sparsemixer_epsilon={self.sparsemixer_epsilon}: expected above 0 and below 0.5")
        if self.per_expert_scale and self.num_zero_experts:
            raise SpecError("per_expert_scale with zero experts: a zero expert has no factor")
        if self.scoring_func == "sparsemixer" and self.top_k != 2:
            raise SpecError(f"scoring_func='sparsemixer' picks exactly 2 experts, got top_k={self.top_k}")
        if self.scoring_func == "sparsemixer" and (self.correction_bias or self.n_group > 1 or self.num_zero_experts):
            raise SpecError("scoring_func='sparsemixer' has neither correction bias, groups nor zero experts")
        if self.scoring_func == "sparsemixer" and (self.renormalize or self.score_after_topk):
            raise SpecError(
                "scoring_func='sparsemixer' scores while it picks: renormalize and score_after_topk stay False"
            )

    @property
    def num_logits(self) -> int:
        """Rows of the router: experts with weights and zero experts."""
        return self.num_experts + self.num_zero_experts

    @property
    def scale(self) -> float:
        """s as a number; 1.0 where the model has no factor (an absent factor is not zero)."""
        return 1.0 if self.routed_scaling_factor is None else self.routed_scaling_factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """What stands between the two products of an expert. g is the gate half of the first product, u the up half.

    gated: act(g) * (u + up_offset); otherwise act(h) of the only half.
    clamp: "before" bounds g from above and u on both sides by limit, then activates (gpt-oss);
        "after" activates, then bounds act(g) from above and u on both sides (Step-3.5); "none" needs limit=None.
    alpha: slope inside silu, g * sigmoid(alpha * g); 1.0 for plain silu.
    """

    kind: ActivationKind
    gated: bool
    clamp: Literal["none", "before", "after"]
    limit: float | None
    alpha: float
    up_offset: float

    def __post_init__(self) -> None:
        _check_choices(self)
        if (self.clamp == "none") != (self.limit is None):
            raise SpecError(f"clamp={self.clamp!r} with limit={self.limit}: a clamp needs a limit, no clamp needs None")
        if not self.gated and (self.clamp != "none" or self.up_offset != 0.0):
            raise SpecError("an activation without a gate has neither clamp nor up_offset")
        if self.alpha != 1.0 and self.kind != "silu":
            raise SpecError(f"alpha={self.alpha} belongs to silu, not to {self.kind}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The routed experts and how their weights are stored.

    bias: b13 and b2 exist; b2 is multiplied by the router weight like the rest of the expert's result.
    layout: w13 holds all gate rows, then all up rows ("halved"), or gate, up, gate, up ... ("interleaved", gpt-oss).
    transposed: stored [E, in, out] instead of [E, out, in].
    latent_size: the experts work in this width, between fc1_latent and fc2_latent (Nemotron-H); None: in hidden_size.
    latent_bias: both latent projections have a bias.
    """

    intermediate_size: int
    activation: Activation
    bias: bool
    layout: Literal["halved", "interleaved"]
    transposed: bool
    latent_size: int | None
    latent_bias: bool

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_positive(self, "intermediate_size", "latent_size")
        if self.layout == "interleaved" and not self.activation.gated:
            raise SpecError("layout='interleaved' needs a gated activation: there is only one half to store")
        if self.latent_bias and self.latent_size is None:
            raise SpecError("latent_bias=True needs a latent_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """The shared experts: one MLP that every token visits, in full width, never scaled by s.

    n_shared_experts: how many the checkpoint counts; they are stored as one MLP, since a sum of MLPs is a wider one.
    intermediate_size: the total width of that MLP.
    sigmoid_gate: the result is multiplied by sigmoid(x . shared_gate), one number for each token (Qwen).
    """

    n_shared_experts: int
    intermediate_size: int
    activation: Activation
    bias: bool
    sigmoid_gate: bool

    def __post_init__(self) -> None:
        _check_positive(self, "n_shared_experts", "intermediate_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """How the parts join: y = s * (R + Z) + S ("sum"), or half of it ("average", Cohere)."""

    combine: Literal["sum", "average"]

    def __post_init__(self) -> None:
        _check_choices(self)

    @property
    def share(self) -> float:
        return 1.0 if self.combine == "sum" else 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionBranch:
    """A second router with experts of its own, for the tokens of images (ERNIE-VL); text tokens use the first."""

    routing: Routing
    experts: Experts


@dataclass(frozen=True, kw_only=True, slots=True)
class MoESpec:
    """One Mixture-of-Experts layer: tokens [M, hidden_size] in, [M, hidden_size] out."""

    hidden_size: int
    routing: Routing
    experts: Experts
    shared: Shared | None
    output: Output
    vision: VisionBranch | None

    def __post_init__(self) -> None:
        _check_positive(self, "hidden_size")
        if self.vision is not None and (
            self.vision.routing.num_logits != self.routing.num_logits or self.vision.routing.top_k != self.routing.top_k
        ):
            raise SpecError(
                "both branches need the same num_experts and top_k: their choices are reported as one table"
            )
        if self.vision is not None and (self.experts.latent_bias or self.vision.experts.latent_bias):
            raise SpecError("a vision branch with latent_bias: one bias would be added to both kinds of tokens")
        if self.vision is not None and self.vision.routing.scale != self.routing.scale:
            raise SpecError("both branches need the same routed_scaling_factor")

    @property
    def scale(self) -> float:
        """s as a number, 1.0 where the model has none."""
        return self.routing.scale

    def tp_widths(self) -> dict[str, int]:
        """The widths that tensor parallelism cuts, by name: tp has to divide each of them."""
        widths = {"intermediate_size": self.experts.intermediate_size}
        if self.vision is not None:
            widths["vision intermediate_size"] = self.vision.experts.intermediate_size
        if self.shared is not None:
            widths["shared intermediate_size"] = self.shared.intermediate_size
        return widths


def weight_shapes(spec: MoESpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the layer stores, in the order of the README's table.

    Tensors of the vision branch carry the prefix "vision_". All are of the layer's dtype, except e_score_correction_bias,
    which is float32 always.
    """
    shapes = _branch_shapes("", spec.hidden_size, spec.routing, spec.experts)
    if spec.vision is not None:
        shapes |= _branch_shapes("vision_", spec.hidden_size, spec.vision.routing, spec.vision.experts)
    if spec.shared is not None:
        width, hidden = spec.shared.intermediate_size, spec.hidden_size
        rows = 2 * width if spec.shared.activation.gated else width
        shapes |= {"shared_w13": (rows, hidden), "shared_w2": (hidden, width)}
        if spec.shared.bias:
            shapes |= {"shared_b13": (rows,), "shared_b2": (hidden,)}
        if spec.shared.sigmoid_gate:
            shapes["shared_gate"] = (1, hidden)
    return shapes


def _branch_shapes(prefix: str, hidden: int, routing: Routing, experts: Experts) -> dict[str, tuple[int, ...]]:
    count, width = routing.num_experts, experts.intermediate_size
    rows = 2 * width if experts.activation.gated else width
    inner = experts.latent_size or hidden
    shapes: dict[str, tuple[int, ...]] = {"router_weight": (routing.num_logits, hidden)}
    if routing.router_bias:
        shapes["router_bias"] = (routing.num_logits,)
    if routing.router_norm_epsilon is not None:
        shapes["router_scale"] = (hidden,)
    if routing.correction_bias:
        shapes["e_score_correction_bias"] = (routing.num_logits,)
    if routing.per_expert_scale:
        shapes["per_expert_scale"] = (routing.num_experts,)
    shapes["w13"] = (count, inner, rows) if experts.transposed else (count, rows, inner)
    shapes["w2"] = (count, width, inner) if experts.transposed else (count, inner, width)
    if experts.bias:
        shapes |= {"b13": (count, rows), "b2": (count, inner)}
    if experts.latent_size is not None:
        shapes |= {"fc1_latent": (inner, hidden), "fc2_latent": (hidden, inner)}
        if experts.latent_bias:
            shapes |= {"fc1_latent_bias": (inner,), "fc2_latent_bias": (hidden,)}
    return {prefix + name: shape for name, shape in shapes.items()}
