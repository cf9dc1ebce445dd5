"""The runner, computed in another legal way: small changes to a layer that was built, one for each step of a way.

A system of this module shares every decision with the runner it varies, and changes only where numbers are rounded and in
which order they are added. M tokens of this rank, N rows that reach it, P kernel width, E experts of this rank, K top-k,
i the experts' width on this rank, R ranks of a group.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from harness.case import Case
from harness.comm import Communicator, Group
from harness.faults.fault import OtherRules, layers_of
from harness.nightly.ways import Way
from harness.runner.experts import BatchedExperts, MonolithicExperts, SlotExperts, TorchExperts, _act, _limit
from harness.runner.layer import FusedMoE, Kernel
from harness.runner.modular_kernel import ALL_TO_ALL, FusedMoEKernel, Steps
from harness.runner.moe_runner import MoERunner
from harness.runner.placement import Placement
from harness.runner.plan import OutputPlan, Reduced
from harness.runner.prepare_finalize import Prepared
from harness.runner.prepare_finalize.all_to_all import DeepEPLLPrepareAndFinalize
from harness.runner.shared_experts import SharedMLP
from harness.runner.weight_and_reduce import Batch, TopKWeightAndReduceDelegate
from harness.systems import Layer
from harness.systems.runner import RunnerSystem
from reference.spec import Activation, MoESpec

_CHUNKS = 3
T = TypeVar("T")


class VariedRunner(RunnerSystem):
    """The runner in one way."""

    def __init__(self, way: Way) -> None:
        self.way = way

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        way, built_as = self.way, case
        if way.ranks != "in_order":
            tp, ep, dp = (_Summing.of(group, way, case.seed) for group in (comm.tp, comm.ep, comm.dp))
            comm = replace(comm, tp=tp, ep=ep, dp=dp)
        if way.scale == "w2":
            weights, built_as = _scaled_w2(weights, case.spec.scale), OtherRules.of(case, _without_scale)
        if way.layer == "wide":
            weights = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
        built = super().build(built_as, weights, comm)
        for layer in layers_of(built):
            _vary(layer, way, case)
        return _Wide(built) if way.layer == "wide" else built


class _Wide:
    """A block that gets its tokens in fp32 and stores its result in their dtype."""

    def __init__(self, block: Layer) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
        return self._block(hidden_states.float(), **inputs).to(hidden_states.dtype)


def _scaled_w2(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """s in the stored weights of the second product, rounded to their dtype."""
    second = ("w2", "b2", "vision_w2", "vision_b2")
    return {name: stored * scale if name in second else stored for name, stored in weights.items()}


def _without_scale(spec: MoESpec) -> MoESpec:
    return replace(
        spec,
        routing=replace(spec.routing, routed_scaling_factor=1.0),
        vision=spec.vision and replace(spec.vision, routing=replace(spec.vision.routing, routed_scaling_factor=1.0)),
    )


def _vary(layer: FusedMoE, way: Way, case: Case) -> None:
    runner, make = layer.runner, layer.make_kernel

    def varied(backend: Kernel, placement: Placement | None) -> FusedMoEKernel:
        return _kernel(make(backend, placement), way, case)

    runner.kernel = _kernel(runner.kernel, way, case)
    layer.make_kernel = varied  # type: ignore[method-assign]  # the kernels of later swaps as well
    if way.gate == "fp32":
        layer.gate = replace(layer.gate, logits_in_fp32=True)
    if way.shared == "apart" or way.scale == "with_shared":
        layer.runner = _turned(runner, _Runner, way)
    module = getattr(runner.shared_experts, "_module", None)
    if runner.shared_experts is not None and type(module) is SharedMLP:
        runner.shared_experts._module = _turned(module, _Shared, way)


def _turned(old: object, kind: type[T], way: Way) -> T:
    """The same object as one of a class that takes a way."""
    new = object.__new__(kind)
    new.__dict__.update(old.__dict__, way=way)
    return new


class _Runner(MoERunner):
    """Reduces R and S one by one, or scales R while it adds S."""

    way: Way

    def plan(self, dtype: torch.dtype, width: int) -> OutputPlan:
        plan = super().plan(dtype, width)
        if self.way.shared == "apart" and plan.shared_reduced is Reduced.FINAL:
            return replace(plan, routed_reduced=Reduced.EARLY, shared_reduced=Reduced.EARLY)
        return plan

    def _maybe_apply_routed_scale_to_output(
        self, shared_MH: Tensor | None, routed_ML: Tensor, plan: OutputPlan
    ) -> tuple[Tensor | None, Tensor]:
        if self.way.scale != "with_shared" or shared_MH is None or "runner" not in plan.scaled_by:
            return super()._maybe_apply_routed_scale_to_output(shared_MH, routed_ML, plan)
        return None, (shared_MH.float() + routed_ML.float() * self.facts.scale).to(routed_ML.dtype)


# -- the kernel --------------------------------------------------------------------------------------------------------


def _kernel(kernel: FusedMoEKernel, way: Way, case: Case) -> FusedMoEKernel:
    varied = _turned(kernel, _Kernel, way)
    varied.seed = case.seed
    experts = kernel.experts
    if isinstance(experts, MonolithicExperts):
        experts._inner = _turned(experts._inner, _Experts, way)
    elif isinstance(experts, BatchedExperts):
        varied.experts = _turned(experts, _Batched, way)
    else:
        varied.experts = _turned(experts, _Slots if isinstance(experts, SlotExperts) else _Experts, way)
    transport = kernel.prepare_finalize
    inner = getattr(transport, "_inner", transport)
    send = inner.send

    def sent(out: Tensor, prepared: Prepared, how: Any) -> Tensor:
        if isinstance(how, TopKWeightAndReduceDelegate) and not isinstance(inner, DeepEPLLPrepareAndFinalize):
            how = _WeighAndAdd(way)
        return send(out, prepared, how)

    inner.send = sent  # type: ignore[method-assign]
    if way.combine != "fp32" and type(inner) in ALL_TO_ALL.values():
        inner.receive = _combine(way, inner)  # type: ignore[method-assign]
    return varied


class _Kernel(FusedMoEKernel):
    """Gets its router weights in another dtype and its slots in another order."""

    way: Way
    seed: int

    def steps(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Steps:
        if self.way.weights == "dtype":
            weights_MK = weights_MK.to(x_MP.dtype).float()
        if self.way.slots == "by_expert":
            by_expert_MK = ids_MK.argsort(-1)
            weights_MK, ids_MK = weights_MK.gather(1, by_expert_MK), ids_MK.gather(1, by_expert_MK)
        elif self.way.slots != "router":
            slots = list(range(ids_MK.shape[1]))[::-1]
            if self.way.slots == "shuffled":
                random.Random(self.seed).shuffle(slots)
            weights_MK, ids_MK = weights_MK[:, slots], ids_MK[:, slots]
        return super().steps(x_MP, weights_MK, ids_MK)


def _combine(way: Way, transport: Any) -> Any:
    """An all-to-all's `receive` in another order or with a rounding after each addition."""

    def receive(sent: Tensor, prepared: Prepared) -> Tensor:
        _, row_D, rows, *more = prepared.home
        rows_DP = sent
        if isinstance(transport, DeepEPLLPrepareAndFinalize):
            rows_DP = sent.float() * more[0][:, None]
        elif more:
            rows_DP = sent[more[0]]
        terms = _terms(rows_DP.to(sent.dtype) if way.combine == "dtype" else rows_DP.float(), row_D, rows)
        return _in_order(terms[::-1] if way.combine == "reversed" else terms).to(sent.dtype)

    return receive


def _terms(rows_DP: Tensor, row_D: Tensor, rows: int) -> list[Tensor]:
    """[rows, P] each: what belongs to each row first, second, and so on; 0 where it has no more. One at least.

    Not index_add_, which adds bf16 and fp16 in fp32 on a CPU.
    """
    by_row_D, count_N = row_D.argsort(stable=True), row_D.bincount(minlength=rows)
    turn_D = torch.empty_like(row_D)
    turn_D[by_row_D] = torch.arange(len(row_D)) - (count_N.cumsum(0) - count_N)[row_D[by_row_D]]
    most = int(count_N.max()) if rows else 0
    terms_TNP = rows_DP.new_zeros(max(most, 1), rows, rows_DP.shape[1])
    terms_TNP[turn_D, row_D] = rows_DP
    return list(terms_TNP)


class _WeighAndAdd:
    """What `TopKWeightAndReduceContiguous` and `NaiveBatched` do."""

    def __init__(self, way: Way) -> None:
        self._way = way

    def apply(self, y: Tensor, weights_NK: Tensor, batch: Batch | None) -> Tensor:
        if batch is not None:
            y_NKP = y.new_zeros(*weights_NK.shape, y.shape[2])
            y_NKP[batch.n_J, batch.k_J] = y[batch.e_J, batch.at_J]
            y = y_NKP
        return _added(self._way, y.float() * weights_NK[:, :, None], y.dtype)


def _added(way: Way, y_NKP: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over K of fp32 terms, in the dtype."""
    if way.sum == "unstored":
        return y_NKP.sum(1).to(dtype)
    y_NKP = y_NKP.to(dtype)
    if way.sum == "fp32":
        return y_NKP.float().sum(1).to(dtype)
    return _in_order(y_NKP.unbind(1))


def _in_order(terms: Sequence[Tensor]) -> Tensor:
    """Stored after each addition."""
    total, *others = terms
    for term in others:
        total = total + term
    return total


# -- experts -----------------------------------------------------------------------------------------------------------


class _Experts(TorchExperts):
    way: Way

    def apply(self, x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        if self.way.rows == "whole":
            return self._rows(x_NP, weights_NK, local_NK)
        return torch.cat([self._rows(*chunk) for chunk in _chunks(x_NP, weights_NK, local_NK)])

    def _rows(self, x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        dtype = x_NP.dtype
        if x_NP.shape[0] == 0 or self._w2_EiP.shape[0] == 0:
            return torch.zeros_like(x_NP)
        if self.way.weigh == "activation":
            return _added(self.way, _slots(self, x_NP, local_NK, self.way, weights_NK), dtype)
        y_NKP = _slots(self, x_NP, local_NK, self.way)
        if self.way.weigh == "stored":
            y_NKP = y_NKP.to(dtype).float()
        return _added(self.way, y_NKP * weights_NK[:, :, None], dtype)


class _Slots(SlotExperts):
    way: Way

    def apply(self, x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        if x_NP.shape[0] == 0 or self._w2_EiP.shape[0] == 0:
            return x_NP.new_zeros(*local_NK.shape, self.width)
        if self.way.rows == "whole":
            return _slots(self, x_NP, local_NK, self.way).to(x_NP.dtype)
        return torch.cat([_slots(self, x, ids, self.way) for x, ids in _chunks(x_NP, local_NK)]).to(x_NP.dtype)


def _chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows in parts, all tensors cut alike."""
    return zip(*(each.tensor_split(_CHUNKS) for each in rows), strict=True)


def _slots(experts: TorchExperts, x_NP: Tensor, local_NK: Tensor, way: Way, weights_NK: Tensor | None = None) -> Tensor:
    """fp32 [N, K, P], 0 for the id -1; weighted where weights are given, in the activation."""
    held, rows, dtype = experts.weights, x_NP.shape[0], x_NP.dtype
    count, _, width = experts._w2_EiP.shape
    h_NEn = _product(x_NP.float(), experts._w13_Pm, way, dtype).view(rows, *held.w13_EnP.shape[:2])
    h_NEn = _biased(h_NEn, held.b13_En, way, dtype)
    a_ENi = activated(h_NEn, held.activation, way, dtype).transpose(0, 1)
    y_eNP = a_ENi.new_zeros(count + 1, rows, width)
    b2_E1P = None if held.b2_EP is None else held.b2_EP[:, None, :].float()
    if weights_NK is None:
        y_eNP[:count] = _biased(_product(a_ENi, experts._w2_EiP, way, dtype), b2_E1P, way, dtype)
    else:
        w_eN1 = (
            weights_NK.new_zeros(rows, count + 1).scatter_(1, local_NK.long() % (count + 1), weights_NK).T[..., None]
        )
        a_ENi = a_ENi * w_eN1[:count]
        a_ENi = a_ENi if way.activation in ("wide", "fused") else a_ENi.to(dtype).float()
        b2_ENP = None if b2_E1P is None else b2_E1P * w_eN1[:count]
        y_eNP[:count] = _biased(_product(a_ENi, experts._w2_EiP, way, dtype), b2_ENP, way, dtype)
    return y_eNP[local_NK, torch.arange(rows)[:, None]]


class _Batched(BatchedExperts):
    way: Way

    def apply(self, x_EBP: Tensor) -> Tensor:
        held, way, dtype = self.weights, self.way, x_EBP.dtype
        b13, b2 = (None if b is None else b[:, None] for b in (held.b13_En, held.b2_EP))
        h_EBn = _biased(_product(x_EBP.float(), self._w13_EPn, way, dtype), b13, way, dtype)
        a_EBi = activated(h_EBn, held.activation, way, dtype)
        return _biased(_product(a_EBi, self._w2_EiP, way, dtype), b2, way, dtype).to(dtype)


class _Shared(SharedMLP):
    way: Way

    def __call__(self, x_MH: Tensor) -> Tensor:
        dtype, way, wide_MH = x_MH.dtype, self.way, x_MH.float()
        h = _biased(_product(wide_MH, self._w13.T, way, dtype), self._b13, way, dtype)
        y_MH = _product(activated(h, self._activation, way, dtype), self._w2.T, way, dtype)
        y_MH = _biased(y_MH, self._b2, way, dtype).to(dtype)
        if self._gate is None:
            return y_MH
        gate_M1 = torch.sigmoid(functional.linear(wide_MH, self._gate))
        if way.sigmoid == "dtype":
            gate_M1 = gate_M1.to(dtype)
        return (gate_M1.float() * y_MH.float()).to(dtype)


def _product(x: Tensor, w: Tensor, way: Way, dtype: torch.dtype) -> Tensor:
    """x [.., m, in] @ w [.., in, out] in fp32, both fp32."""
    if way.product == "whole":
        return x @ w
    if way.product == "native":
        return (x.to(dtype) @ w.to(dtype)).float()
    half = x.shape[-1] // 2
    first, second = x[..., :half] @ w[..., :half, :], x[..., half:] @ w[..., half:, :]
    if way.product == "split_in_dtype":
        return (first.to(dtype) + second.to(dtype)).float()
    return first + second


def _biased(y: Tensor, bias: Tensor | None, way: Way, dtype: torch.dtype) -> Tensor:
    if bias is None:
        return y
    return (y.to(dtype).float() if way.bias == "apart" else y) + bias.float()


def activated(h: Tensor, rule: Activation, way: Way, dtype: torch.dtype) -> Tensor:
    """fp32 [*, n] -> fp32 [*, i], rounded to the dtype where the way says."""

    def stored(t: Tensor) -> Tensor:
        return t.to(dtype).float()

    if way.activation != "fused":
        h = stored(h)
    if not rule.gated:
        act = _act(h, rule)
        return act if way.activation in ("wide", "fused") else stored(act)
    gate, up = h.chunk(2, -1)
    if rule.clamp == "before":
        gate, up = gate.clamp(max=rule.limit), up.clamp(-_limit(rule), rule.limit)
    gate = _act(gate, rule)
    if way.activation == "each":
        gate = stored(gate)
    if rule.clamp == "after":
        gate, up = gate.clamp(max=rule.limit), up.clamp(-_limit(rule), rule.limit)
    if rule.up_offset:
        up = up + rule.up_offset
        up = stored(up) if way.activation == "each" else up
    return gate * up if way.activation in ("wide", "fused") else stored(gate * up)


# -- ranks -------------------------------------------------------------------------------------------------------------


class _Summing(Group):
    """A group whose sums are made in another order or precision; the ledger shows the same collectives.

    Each rank fills a place of its own in a tensor of zeros, [R, *], so the sum in rank order brings every term to every
    rank unchanged, and each adds them as it likes.
    """

    __slots__ = ("order", "way")
    way: Way
    order: list[int]

    @classmethod
    def of(cls, group: Group, way: Way, seed: int) -> _Summing:
        summing = cls(group.name, group.ranks, group.rank, group.post)
        summing.way, summing.order = way, list(range(group.size))[::-1]
        if way.ranks == "shuffled":
            random.Random(seed).shuffle(summing.order)
        return summing

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.size < 3 or not tensor.is_floating_point():
            return super().all_reduce(tensor)
        return self._sum(super().all_reduce(self._placed(tensor)))

    def reduce_scatter(self, tensor: Tensor, dim: int = 0, sizes: Sequence[int] = ()) -> Tensor:
        if self.size < 3 or dim != 0:
            return super().reduce_scatter(tensor, dim, sizes)
        return self._sum(super().reduce_scatter(self._placed(tensor), 1, sizes))

    def _placed(self, tensor: Tensor) -> Tensor:
        placed_R = tensor.new_zeros(self.size, *tensor.shape)
        placed_R[self.rank] = tensor
        return placed_R

    def _sum(self, terms_R: Tensor) -> Tensor:
        how, dtype = self.way.ranks, terms_R.dtype
        if how == "fp32":
            return terms_R.float().sum(0).to(dtype)
        if how == "ring":  # each piece of the rows begins its way at another rank
            pieces = terms_R.tensor_split(self.size, -1)
            return torch.cat([_in_order(list(piece_R.roll(-start, 0))) for start, piece_R in enumerate(pieces)], -1)
        terms = list(terms_R)
        if how == "tree":
            while len(terms) > 1:
                pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
                terms = pairs + terms[len(pairs) * 2 :]
            return terms[0]
        if how == "twice":
            return _in_order([*terms, terms[-1]])
        return _in_order([terms[rank] for rank in self.order])
