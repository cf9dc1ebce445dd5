"""Ways to plant a fault: one thing of a built layer is changed, for this call and for kernels that come later.

M tokens, H hidden, L latent, P kernel width, K top-k; R routed sum, S shared experts' output, s routed scaling factor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator, Group
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.plan import OutputPlan
from harness.runner.router import FusedMoERouter
from harness.systems import Layer

Plant = Callable[[FusedMoE, Communicator], None]

# ---- what a layer has


def has_shared(case: Case) -> bool:
    """Shared experts as a module of their own."""
    return case.spec.shared is not None and case.shared == "separate"


def unreduced(case: Case) -> bool:
    """The kernel leaves the sum over tp to the runner, and the runner makes it."""
    return case.kernel == "partial" and case.grid.sp == 1 and case.reduce == "layer"


def scaler(case: Case) -> str | None:
    """Who multiplies by s: "router", "kernel" or "runner"; "unit" where the call returns R + S/s; None without s."""
    spec = case.spec
    if spec.scale == 1.0:
        return None
    if case.scaled_by == "kernel" or (case.scaled_by == "router" and case.experts == "monolithic"):
        return "kernel"
    able = spec.routing.n_group > 1 or spec.routing.correction_bias
    if case.scaled_by == "router" and able:
        return "router"
    return "unit" if case.scaled_by == "output" and case.dtype == "fp16" and has_shared(case) else "runner"


# ---- the change


def together(*plants: Plant) -> Plant:
    """Several changes that make one fault."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        for each in plants:
            each(layer, comm)

    return plant


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


@dataclass(frozen=True, slots=True, eq=False)
class Rerouted:
    """A router whose weights [M, K] and ids [M, K] are changed afterwards."""

    inner: FusedMoERouter
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def scales(self) -> bool:
        return self.inner.scales

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        return self.change(*self.inner.select_experts(router_logits_ME))


def weighing(change: Callable[[Tensor, FusedMoE, Communicator], Tensor]) -> Plant:
    """The router's weights [M, K], changed; also of a router inside the kernel."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        def changed(weights_MK: Tensor, ids_MK: Tensor) -> tuple[Tensor, Tensor]:
            return change(weights_MK, layer, comm), ids_MK

        layer._router = layer.runner.router = Rerouted(layer.runner.router, changed)
        kernels(lambda kernel, layer, comm: _use_router(kernel, layer._router))(layer, comm)

    return plant


def _use_router(kernel: FusedMoEKernel, router: FusedMoERouter) -> None:
    if kernel.is_monolithic:
        kernel.experts._router = router  # type: ignore[union-attr]


def kernels(change: Callable[[FusedMoEKernel, FusedMoE, Communicator], None]) -> Plant:
    """The kernel changed in place, and every one that is made later."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.make_kernel

        def made(*given: Any) -> FusedMoEKernel:
            kernel = right(*given)
            change(kernel, layer, comm)
            return kernel

        layer.make_kernel = made  # type: ignore[assignment, method-assign]
        change(layer.runner.kernel, layer, comm)

    return plant


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
