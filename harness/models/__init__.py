"""The model pages: one file a family, named by its model_type, each ending in `PAGE = Model(...)`. Imports no torch.

Adding a model is adding a file here; `names()` finds it. CONTRIBUTING.md walks through it.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from harness.errors import unknown
from reference.spec import Activation, Experts, GroupScore, MoESpec, RouterPrecision, Routing, Scoring

# the word in front of a page in the table: why it is in the main job
Reason = Literal["evaluated", "ours", "rewritten"]

SILU = Activation(kind="silu", gated=True, clamp="none", limit=None, alpha=1.0, up_offset=0.0)
FP32_ROUTER = RouterPrecision(logits="fp32", scores="fp32", weights="fp32")

# how most transformers blocks name their tensors: our name -> theirs, for Upstream.parameters
STACKED_EXPERTS: dict[str, str | tuple[str, ...]] = {"w13": "experts.gate_up_proj", "w2": "experts.down_proj"}
SHARED_EXPERTS: dict[str, str | tuple[str, ...]] = {
    "shared_w13": ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"),
    "shared_w2": "shared_experts.down_proj.weight",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Where figures of a page come from and how sure they are: confidence "high", "medium-high", "medium" or "low"."""

    what: str
    source: str
    confidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """The transformers modules that compute this layer, as data for systems/hf.py.

    config: "package.module:Class".    fields: its keyword arguments; a text like "=routing.top_k", alone or in a list,
        is read from the MoESpec.
    modules: role -> "package.module:Class"; the role "block" alone is a whole layer, other roles are joined by hf.py.
    parameters: our tensor name -> name in the state dict, or several whose rows are stacked in ours. Where roles are
        joined, the state dict's names start with the role.
    inputs: our name of an input -> the block's.    attributes: of modules, where older releases hard-code what newer
        ones read from the configuration; values as in fields.
    """

    config: str
    fields: Mapping[str, object]
    modules: Mapping[str, str]
    parameters: Mapping[str, str | tuple[str, ...]]
    inputs: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One model family.

    reason: "evaluated" on the list of PR #35949, "ours" our 17th, "rewritten" by the PR without being on its list.
    real: the layer of the named checkpoint.    twin: the same rules at CPU size.    wide: real E and K at small widths.
    apply_routed_scale_to_output: who scales in the engine, the runner (True) or the router (False).
    """

    model_type: str
    checkpoint: str
    reason: Reason
    real: MoESpec
    twin: MoESpec
    wide: MoESpec | None
    apply_routed_scale_to_output: bool
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    upstream: Upstream | None

    @property
    def wrapped(self) -> bool:
        """Whether the engine's transformers backend wrapped and all-reduced it: whole blocks with shared experts."""
        spec = self.real
        whole_block = self.upstream is not None and "block" in self.upstream.modules
        return whole_block and spec.shared is not None and spec.vision is None and spec.experts.latent_size is None


def plain_routing(
    *,
    num_experts: int,
    top_k: int,
    scoring_func: Scoring,
    correction_bias: bool,
    n_group: int,
    topk_group: int,
    group_score: GroupScore,
    renormalize: bool,
    renormalize_rule: Literal["add", "clamp"],
    renormalize_epsilon: float,
    routed_scaling_factor: float | None,
    precision: RouterPrecision,
) -> Routing:
    """A router without the rules that one or two models have; their pages add them with `dataclasses.replace`."""
    return Routing(
        num_experts=num_experts,
        top_k=top_k,
        scoring_func=scoring_func,
        score_after_topk=False,
        correction_bias=correction_bias,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
        group_fill=-math.inf,
        renormalize=renormalize,
        renormalize_rule=renormalize_rule,
        renormalize_epsilon=renormalize_epsilon,
        routed_scaling_factor=routed_scaling_factor,
        per_expert_scale=False,
        router_bias=False,
        router_norm_epsilon=None,
        sparsemixer_epsilon=None,
        weight_on="output",
        num_zero_experts=0,
        precision=precision,
    )


def plain_experts(*, intermediate_size: int, activation: Activation) -> Experts:
    """Experts without biases and latent width, stored [E, out, in], gate rows before up rows."""
    return Experts(
        intermediate_size=intermediate_size,
        activation=activation,
        bias=False,
        layout="halved",
        transposed=False,
        latent_size=None,
        latent_bias=False,
    )


def scaled_down(
    real: MoESpec,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    shared_intermediate_size: int | None = None,
    vision_intermediate_size: int | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float | None = None,
    latent_size: int | None = None,
    limit: float | None = None,
    shared_limit: float | None = None,
) -> MoESpec:
    """The same rules at another size. scale replaces s; limit and shared_limit replace those of the activations.

    Left out: the shared experts and the vision branch are as wide as the experts, limits stay.
    """

    def routing(of: Routing) -> Routing:
        return replace(
            of,
            num_experts=num_experts,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            routed_scaling_factor=scale,
        )

    def experts(of: Experts, width: int | None) -> Experts:
        return replace(
            of,
            intermediate_size=width or intermediate_size,
            latent_size=latent_size,
            activation=_limited(of.activation, limit),
        )

    vision, shared = real.vision, real.shared
    return replace(
        real,
        hidden_size=hidden_size,
        routing=routing(real.routing),
        experts=experts(real.experts, None),
        shared=shared
        and replace(
            shared,
            intermediate_size=shared_intermediate_size or intermediate_size,
            activation=_limited(shared.activation, shared_limit),
        ),
        vision=vision
        and replace(
            vision,
            routing=routing(vision.routing),
            experts=experts(vision.experts, vision_intermediate_size),
        ),
    )


def _limited(activation: Activation, limit: float | None) -> Activation:
    return activation if limit is None else replace(activation, limit=limit)


@functools.cache
def names() -> tuple[str, ...]:
    """All model types, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@functools.cache
def load(model_type: str) -> Model:
    """The page of a model; UsageError with the nearest names if there is none."""
    if model_type not in names():
        raise unknown("model", model_type, names(), "moe-harness models")
    page: Model = importlib.import_module(f"{__name__}.{model_type}").PAGE
    return page
