"""Wrong layers: the runner with one thing changed. Each is data; the tests say what the harness has to answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.runner.layer import FusedMoE
from harness.runner.plan import Reduced
from harness.systems import Layer
from harness.systems.runner import RunnerSystem

Plant = Callable[[FusedMoE, Communicator], None]


@dataclass(frozen=True)
class Faulty(RunnerSystem):
    """The runner, changed by `plant` right after each rank built it: the layer, not the block of the model around it."""

    plant: Plant

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        block = super().build(case, weights, comm)
        self.plant(block._layer, comm)  # type: ignore[attr-defined]
        return block


def answering(change: Callable[[Tensor], Tensor]) -> Plant:
    """The right output, changed afterwards."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner.forward
        layer.runner.forward = lambda *given: change(right(*given))

    return plant


def planning(**changes: object) -> Plant:
    """A plan that differs in some fields; this is the way round its own refusals."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner.plan

        def wrong(dtype: torch.dtype, width: int):
            plan = copy.copy(right(dtype, width))
            for name, value in changes.items():
                object.__setattr__(plan, name, value)
            return plan

        layer.runner.plan = wrong

    return plant


def scaling(on_routed: Callable[[float], float], on_shared: Callable[[float], float] = lambda s: 1.0) -> Plant:
    """R and S multiplied by other powers of s than the law's, whoever was to scale."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        scale = layer.runner.facts.scale

        def wrong(shared_MH, routed_ML, plan):
            has = scale if plan.scaled_by in (("router",), ("kernel",)) else 1.0
            routed_ML = routed_ML * (on_routed(scale) / has)
            return None if shared_MH is None else shared_MH * on_shared(scale), routed_ML

        layer.runner._maybe_apply_routed_scale_to_output = wrong

    return plant


def shared_summed_per_rank(layer: FusedMoE, comm: Communicator) -> None:
    """The shared MLP is whole on every rank, and the runner sums it."""
    module = layer.runner.shared_experts._module

    def whole(x: Tensor) -> Tensor:
        return comm.all_reduce(module(x))

    def unguarded(planned, moment, x, micro_batch):
        if planned is moment:
            layer.runner.shared_experts._outputs[micro_batch] = whole(x)

    layer.runner.shared_experts.run = unguarded


def shared_left_partial(layer: FusedMoE, comm: Communicator) -> None:
    def forward(x, logits, num_tokens):
        unreduced = layer.runner.shared_experts._module(x)
        saved, layer.runner.shared_experts = layer.runner.shared_experts, None
        facts, layer.runner.facts = layer.runner.facts, replace(layer.runner.facts, has_shared_experts=False)
        routed = type(layer.runner).forward(layer.runner, x, logits, num_tokens)
        layer.runner.shared_experts, layer.runner.facts = saved, facts
        return routed + unreduced

    layer.runner.forward = forward


def shared_reads_an_overwritten_buffer(layer: FusedMoE, comm: Communicator) -> None:
    """The kernel works in place and the shared experts run after it on the same buffer."""

    def forward(x, logits, num_tokens):
        saved, layer.runner.shared_experts = layer.runner.shared_experts, None
        facts, layer.runner.facts = layer.runner.facts, replace(layer.runner.facts, has_shared_experts=False)
        routed = type(layer.runner).forward(layer.runner, x, logits, num_tokens)
        layer.runner.shared_experts, layer.runner.facts = saved, facts
        return routed + comm.all_reduce(layer.runner.shared_experts._module(routed))

    layer.runner.forward = forward


def bias_in_the_weights(layer: FusedMoE, comm: Communicator) -> None:
    router = layer.runner.router
    right = router.select_experts

    class Wrong:
        scales = True

        def select_experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
            _, ids = right(logits)
            biased = (logits.float().sigmoid() + router.bias_E).gather(1, ids)
            return biased / biased.sum(-1, keepdim=True) * router.scale, ids

    layer.runner.router = Wrong()


def only_rank(rank: int, plant: Plant) -> Plant:
    def planted(layer: FusedMoE, comm: Communicator) -> None:
        if comm.rank == rank:
            plant(layer, comm)

    return planted


def expert_dropped(expert: int) -> Plant:
    def plant(layer: FusedMoE, comm: Communicator) -> None:
        experts = layer.runner.kernel.experts
        experts._w2_EiP = experts._w2_EiP.clone()
        experts._w2_EiP[expert] = 0.0

    return plant


def undeclared_unit(layer: FusedMoE, comm: Communicator) -> None:
    """What the layer tells its caller, not what it does."""
    layer.__class__ = type("Undeclared", (FusedMoE,), {"output_unit": 1.0})  # properties live on the class


NOTHING_REDUCED = planning(routed_reduced=Reduced.NOT_NEEDED, shared_reduced=Reduced.NOT_NEEDED)


def all_reduced_twice(layer: FusedMoE, comm: Communicator) -> None:
    right = layer.runner.forward
    layer.runner.forward = lambda *given: comm.all_reduce(right(*given))


# ---- wrong in ways that no list named beforehand


def adding_input(times: Callable[[int], float] = lambda tp: 1.0) -> Plant:
    """The residual, which the decoder adds, in the layer."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner.forward
        layer.runner.forward = lambda x, *given: right(x, *given) + times(comm.tp.size) * x

    return plant


def reducing(how: Callable[[Tensor, Communicator], Tensor]) -> Plant:
    """Every rank's partial sum, reduced in another way. how: (the rank's own y, comm) -> y."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        NOTHING_REDUCED(layer, comm)
        answering(lambda y: how(y, comm))(layer, comm)

    return plant


def routing(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Plant:
    """The right weights and ids, changed afterwards: (weights [M, K], ids [M, K]) -> the same."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        right = layer.runner.router

        class Wrong:
            scales = right.scales

            def select_experts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
                return change(*right.select_experts(logits))

        layer.runner.router = Wrong()

    return plant


def router_with(**changes: Callable[[object], object]) -> Plant:
    """The router with some fields of its rule, or its bias_E, changed."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        router = layer.runner.router
        if "bias_E" in changes:
            layer.runner.router = replace(router, bias_E=changes["bias_E"](router.bias_E))
            return
        rule = {name: change(getattr(router.routing, name)) for name, change in changes.items()}
        layer.runner.router = replace(router, routing=replace(router.routing, **rule))

    return plant


def w2_as(change: Callable[[Tensor], Tensor]) -> Plant:
    """The kernel's w2 [E, i, P] changed."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        experts = layer.runner.kernel.experts
        experts._w2_EiP = change(experts._w2_EiP).contiguous()

    return plant


def w2_of_the_next_rank(layer: FusedMoE, comm: Communicator) -> None:
    experts = layer.runner.kernel.experts
    everyone = comm.tp.all_gather(experts._w2_EiP[None].contiguous())
    experts._w2_EiP = everyone[(comm.tp.rank + 1) % comm.tp.size].contiguous()


def gate_and_up_exchanged(layer: FusedMoE, comm: Communicator) -> None:
    experts = layer.runner.kernel.experts
    swapped = experts.weights.w13_EnP.unflatten(1, (2, -1)).flip(1).flatten(1, 2)
    experts._w13_Pm = swapped.float().flatten(0, 1).T


def dropped_beyond(capacity: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Each expert serves its first tokens alone."""

    def change(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        weights = weights.clone()
        for e in ids.unique().tolist():
            rows, slot = (ids == e).nonzero(as_tuple=True)
            weights[rows[capacity:], slot[capacity:]] = 0.0
        return weights, ids

    return change
