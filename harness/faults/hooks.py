"""Where a fault is planted in a built layer, in another spec or in other weights, and what a case's layer has to have.

A layer makes its kernel anew when kernels are swapped or experts are placed, and its router serves two callers: what is
planted here meets all of them. M tokens, N tokens on this rank, E experts, K top-k, P kernel width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.runner.experts import BatchedExperts, MonolithicExperts, TorchExperts
from harness.runner.layer import FusedMoE, Kernel
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.router import FusedMoERouter, SharedSlotsRouter, ZeroExpertRouter
from reference.spec import MoESpec

Plant = Callable[[FusedMoE, Communicator], None]
Rules = Callable[[MoESpec], MoESpec]
Weights = dict[str, Tensor]
# (weights [N, K], ids [N, K])
Routes = tuple[Tensor, Tensor]


def put(owner: object, name: str, value: object) -> None:
    """Shadow a method or an attribute of one object."""
    setattr(owner, name, value)


# ---- the router


@dataclass(frozen=True, slots=True, eq=False)
class WrongRouter:
    """select: (the right router, logits [M, E]) -> weights and ids."""

    right: FusedMoERouter
    select: Callable[[FusedMoERouter, Tensor], Routes]

    @property
    def scales(self) -> bool:
        return self.right.scales

    def select_experts(self, router_logits_ME: Tensor) -> Routes:
        return self.select(self.right, router_logits_ME)


def routing(select: Callable[[FusedMoERouter, Tensor], Routes]) -> Plant:
    """Another choice by the router of the routed experts; slots of shared experts are appended to it as before."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer._router
        if isinstance(right, SharedSlotsRouter | ZeroExpertRouter):
            put_router(layer, replace(right, inner=WrongRouter(right.inner, select)))
        else:
            put_router(layer, WrongRouter(right, select))

    return plant


def rerouted(change: Callable[[Tensor, Tensor], Routes]) -> Plant:
    """The right weights and ids, changed afterwards."""
    return routing(lambda right, logits_ME: change(*right.select_experts(logits_ME)))


def put_router(layer: FusedMoE, router: FusedMoERouter) -> None:
    """For the runner, for kernels to come, and for a kernel that routes by itself."""
    layer._router = layer.runner.router = router
    experts = layer.runner.kernel.experts
    if isinstance(experts, MonolithicExperts):
        experts._router = router


def logits(change: Callable[[Tensor], Tensor]) -> Plant:
    """What the gate returns [M, E], changed afterwards."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.gate
        put(layer, "gate", lambda x_MH: change(right(x_MH)))

    return plant


# ---- the kernel


def kernels(change: Callable[[FusedMoEKernel, Placement | None, FusedMoE], None]) -> Plant:
    """The kernel that the layer has, and each that it makes later."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        make = layer.make_kernel

        def make_wrong(backend: Kernel, placement: Placement | None) -> FusedMoEKernel:
            kernel = make(backend, placement)
            change(kernel, placement, layer)
            return kernel

        put(layer, "make_kernel", make_wrong)
        change(layer.runner.kernel, layer.placement, layer)

    return plant


Apply = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts(wrong: Callable[[TorchExperts, Apply], Apply]) -> Plant:
    """Experts that take rows with local ids. wrong: (they, what they did) -> what they do, (x, weights, ids) -> rows."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        inner = rows_of(kernel)
        put(inner, "apply", wrong(inner, inner.apply))

    return kernels(change)


def rows_of(kernel: FusedMoEKernel) -> TorchExperts:
    """The experts that take rows, in a kernel that routes by itself too."""
    inner = kernel.experts._inner if isinstance(kernel.experts, MonolithicExperts) else kernel.experts
    assert not isinstance(inner, BatchedExperts)  # `takes_rows` is part of what such a fault applies to
    return inner


# ---- other rules, other weights


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


# ---- what a case's layer has


def chooses_with_bias(case: Case) -> bool:
    return case.spec.routing.correction_bias


def has_groups(case: Case) -> bool:
    return case.spec.routing.n_group > 1


def has_experts_elsewhere(case: Case) -> bool:
    return case.grid.ep > 1


def takes_rows(case: Case) -> bool:
    """No kernel of the case sorts its rows by expert."""
    return case.experts != "batched" and "deepep_ll" not in (case.kernel, case.swap)


def both(*conditions: Callable[[Case], bool]) -> Callable[[Case], bool]:
    """All of them."""
    return lambda case: all(condition(case) for condition in conditions)
