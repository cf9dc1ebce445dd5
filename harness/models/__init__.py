"""The model pages: one file a family, named by its model_type, each ending in `PAGE = Model(...)`. Imports no torch.

Adding a model is adding a file here; `names()` finds it. CONTRIBUTING.md walks through it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from harness.errors import unknown
from reference.spec import Activation, Experts, MoESpec, RouterPrecision, Routing, Shared, VisionBranch

# the word in front of a page in the table: why it is in the main job
Reason = Literal["evaluated", "ours", "rewritten"]

SILU = Activation(kind="silu", gated=True, clamp="none", limit=None, alpha=1.0, up_offset=0.0)
FP32_ROUTER = RouterPrecision(logits="fp32", scores="fp32", weights="fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Where figures of a page come from and how sure they are: confidence "high", "medium-high", "medium" or "low"."""

    what: str
    source: str
    confidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """The transformers modules that compute this layer, as data for systems/hf.py.

    config: "package.module:Class".    fields: its keyword arguments; a value "=routing.top_k" is read from the MoESpec.
    modules: role -> "package.module:Class"; the role "block" alone is a whole layer, other roles are joined by hf.py.
    parameters: our tensor name -> name in the state dict, or several whose rows are stacked in ours.
    """

    config: str
    fields: Mapping[str, object]
    modules: Mapping[str, str]
    parameters: Mapping[str, str | tuple[str, ...]]


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


def scaled_down(
    real: MoESpec,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    shared_intermediate_size: int | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float | None = None,
    latent_size: int | None = None,
) -> MoESpec:
    """The same rules at another size; scale replaces s where the model has one."""
    routing = replace(
        real.routing,
        num_experts=num_experts,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=scale,
    )
    experts = replace(real.experts, intermediate_size=intermediate_size, latent_size=latent_size)
    shared = real.shared and replace(real.shared, intermediate_size=shared_intermediate_size or intermediate_size)
    return replace(real, hidden_size=hidden_size, routing=routing, experts=experts, shared=shared)


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


__all__ = [
    "FP32_ROUTER", "SILU", "Activation", "Experts", "Figure", "MoESpec", "Model", "RouterPrecision", "Routing", "Shared",
    "Upstream", "VisionBranch", "load", "names", "scaled_down",
]  # fmt: skip
