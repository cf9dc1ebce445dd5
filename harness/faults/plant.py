"""Ways to plant a fault in a built layer: one thing of it is changed, for this call and for what the layer makes later.

A layer makes its kernel anew when kernels are swapped or experts are placed, and its router serves two callers: what is
planted here meets all of them. M tokens, N tokens on this rank, H hidden, L latent, P kernel width, E experts, K top-k;
R routed sum, S shared experts' output, s routed scaling factor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.comm import Communicator, Group
from harness.runner.experts import BatchedExperts, MonolithicExperts, TorchExperts
from harness.runner.layer import FusedMoE, Kernel
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.plan import OutputPlan
from harness.runner.router import FusedMoERouter, SharedSlotsRouter, ZeroExpertRouter
from harness.systems import Layer

Plant = Callable[[FusedMoE, Communicator], None]
# (weights [N, K], ids [N, K])
Routes = tuple[Tensor, Tensor]


def put(owner: object, name: str, value: object) -> None:
    """Shadow a method or an attribute of one object."""
    setattr(owner, name, value)


def together(*plants: Plant) -> Plant:
    """Several changes that make one fault."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        for each in plants:
            each(layer, comm)

    return plant


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


def weighing(change: Callable[[Tensor, FusedMoE, Communicator], Tensor]) -> Plant:
    """The router's weights [M, K], those of slots of shared experts among them, changed; also of a router inside the kernel."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        def select(right: FusedMoERouter, logits_ME: Tensor) -> Routes:
            weights_MK, ids_MK = right.select_experts(logits_ME)
            return change(weights_MK, layer, comm), ids_MK

        put_router(layer, WrongRouter(layer.runner.router, select))

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


# ---- the plan and the scale

Replan = Callable[[OutputPlan, FusedMoE], Mapping[str, object]]


def planning(change: Replan) -> Plant:
    """A plan that differs in some fields, (right plan, layer) -> those; this is the way round the plan's own refusals."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner.plan

        def wrong(dtype: torch.dtype, width: int) -> OutputPlan:
            return replanned(right(dtype, width), **change(right(dtype, width), layer))

        layer.runner.plan = wrong  # type: ignore[method-assign]

    return plant


def replanned(plan: OutputPlan, **fields: object) -> OutputPlan:
    """A copy of the plan with other fields, unchecked."""
    wrong = copy.copy(plan)
    for name, value in fields.items():
        object.__setattr__(wrong, name, value)
    return wrong


def scaling(change: Callable[[Tensor | None, Tensor, float, OutputPlan], tuple[Tensor | None, Tensor]]) -> Plant:
    """(S, R, s, plan) as they leave the step that scales, changed."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner._maybe_apply_routed_scale_to_output

        def wrong(shared_MH: Tensor | None, routed_ML: Tensor, plan: OutputPlan) -> tuple[Tensor | None, Tensor]:
            return change(*right(shared_MH, routed_ML, plan), layer.runner.facts.scale, plan)

        layer.runner._maybe_apply_routed_scale_to_output = wrong  # type: ignore[method-assign]

    return plant


# ---- the shared experts, the answer, the block around the layer


def answering(change: Callable[[Tensor, Tensor, FusedMoE, Communicator], Tensor]) -> Plant:
    """What the runner returns [M, H], changed: (y, x, layer, comm) -> y."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner.steps

        def steps(x_MH: Tensor, *given: Any) -> Generator[None, None, Tensor]:
            y_MH = yield from right(x_MH, *given)
            return change(y_MH, x_MH, layer, comm)

        layer.runner.steps = steps  # type: ignore[assignment, method-assign]

    return plant


def sharing(change: Callable[[Callable[[Tensor], Tensor], Tensor, Communicator], Tensor]) -> Plant:
    """The shared module replaced: (right module, its input, comm) -> S. Nobody looks whether it reduces itself."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        shared = layer.runner.shared_experts
        if shared is None or isinstance(shared._module, _Planted):  # two branches have one module between them
            return
        shared._module = _Planted(shared._module, change, comm)
        shared._collectives = lambda: 0  # type: ignore[method-assign]

    return plant


@dataclass(frozen=True, slots=True, eq=False)
class _Planted:
    module: Callable[[Tensor], Tensor]
    change: Callable[[Callable[[Tensor], Tensor], Tensor, Communicator], Tensor]
    comm: Communicator

    def __call__(self, x_MH: Tensor) -> Tensor:
        return self.change(self.module, x_MH, self.comm)


def summed(group: Group, partial: Tensor) -> Tensor:
    """An all-reduce as engines make it: none on one rank."""
    return partial if group.size == 1 else group.all_reduce(partial)


class Around:
    """A model's block with something around it. call: (block, hidden states, other inputs) -> y; told: attributes."""

    def __init__(self, block: Layer, call: Callable[..., Tensor], **told: object) -> None:
        self._block, self._called, self._told = block, call, told

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._told[name] if name in self._told else getattr(self._block, name)

    def __call__(self, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
        return self._called(self._block, hidden_states, **inputs)


def around(call: Callable[..., Tensor]) -> Callable[[Layer, Communicator], Layer]:
    """The block hook for (comm, block, hidden states, other inputs) -> y."""

    def hook(block: Layer, comm: Communicator) -> Layer:
        return Around(block, lambda *given, **inputs: call(comm, *given, **inputs))

    return hook


def telling(**told: Callable[[Any], object]) -> Callable[[Layer, Communicator], Layer]:
    """The block hook for a block that declares something else: name -> (right block) -> value, read after the call."""

    class Told(Around):
        def __getattr__(self, name: str) -> Any:
            return told[name](self._block) if name in told else super().__getattr__(name)

    return lambda block, comm: Told(block, lambda inner, *given, **inputs: inner(*given, **inputs))
