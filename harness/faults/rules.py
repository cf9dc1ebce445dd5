"""Layers built by another spec or from other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from harness.comm import Communicator
from reference.spec import MoESpec

Rules = Callable[[MoESpec], MoESpec]
Weights = dict[str, Tensor]


def routing_rule(**changes: object) -> Rules:
    """The spec with fields of its routing changed, for images too."""

    def change(spec: MoESpec) -> MoESpec:
        vision = spec.vision and replace(spec.vision, routing=replace(spec.vision.routing, **changes))  # type: ignore[arg-type]
        return replace(spec, routing=replace(spec.routing, **changes), vision=vision)  # type: ignore[arg-type]

    return change


def expert_rule(**changes: object) -> Rules:
    """The spec with fields of its routed experts changed, for images too."""

    def change(spec: MoESpec) -> MoESpec:
        vision = spec.vision and replace(spec.vision, experts=replace(spec.vision.experts, **changes))  # type: ignore[arg-type]
        return replace(spec, experts=replace(spec.experts, **changes), vision=vision)  # type: ignore[arg-type]

    return change


def activation_rule(**changes: object) -> Rules:
    """The spec with fields of the routed experts' activation changed."""
    return lambda spec: expert_rule(activation=replace(spec.experts.activation, **changes))(spec)  # type: ignore[arg-type]


def tensors(
    change: Callable[[MoESpec, Tensor], Tensor], *names: str
) -> Callable[[MoESpec, Weights, Communicator], Weights]:
    """Other values in the tensors of these names, for images too."""

    def weights(spec: MoESpec, given: Weights, comm: Communicator) -> Weights:
        return {name: change(spec, t) if name.removeprefix("vision_") in names else t for name, t in given.items()}

    return weights


def without(*names: str) -> Callable[[MoESpec, Weights, Communicator], Weights]:
    """The layer never gets these tensors."""

    def weights(spec: MoESpec, given: Weights, comm: Communicator) -> Weights:
        return {name: t for name, t in given.items() if name.removeprefix("vision_") not in names}

    return weights


def zeroed(*names: str) -> Callable[[MoESpec, Weights, Communicator], Weights]:
    return tensors(lambda spec, stored: torch.zeros_like(stored), *names)
