"""The routed experts: one rank's weights, and kernels that compute both products for tokens that have reached the rank.

M tokens, N tokens on this rank, P kernel width (hidden or latent, and padding), E experts of this rank, i its share of
the intermediate width, n rows of its w13 (2i if gated), K top-k, B rows of a batch. A local id is the place of an expert
among this rank's, -1 if it is none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from harness.runner.precision import wide
from harness.runner.router import FusedMoERouter
from reference.spec import Activation, Experts

# rows of a dense pass: bounds the memory of [rows, E, n] for large N
_ROWS = 2048

Format = Literal["standard", "batched", "monolithic"]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """One rank's shard, in one layout whatever the checkpoint's: w13 [E, n, P] gate rows first, w2 [E, P, i]."""

    w13_EnP: Tensor
    w2_EPi: Tensor
    b13_En: Tensor | None
    b2_EP: Tensor | None
    activation: Activation


def shard(
    weights: Mapping[str, Tensor],
    experts: Experts,
    rank: int,
    tp: int,
    pad: int,
    held: Sequence[int] | None = None,
) -> ExpertWeights:
    """Cut the whole weights for one rank: gate and up each into tp pieces, w2 by columns; pad adds zero columns to P.

    held: the experts of this rank in the order of its slots, None for all.
    Matrices with a `w13_scale` [E, N] and `w2_scale` [E, P] beside them, one number for each row of results, become fp32:
    those of w13 are cut like its rows, those of w2 not at all, since tp cuts what a row sums over.
    Of the ranks that cut an expert among them only the first keeps its b2: every rank's would be added once per rank.
    """
    w13, w2 = weights["w13"], weights["w2"]
    b13, b2 = (weights["b13"], weights["b2"]) if experts.bias else (None, None)
    scale13, scale2 = weights.get("w13_scale"), weights.get("w2_scale")
    if held is not None:
        ids = _as_index(held)
        w13, w2 = w13[ids], w2[ids]
        b13, b2, scale13, scale2 = (None if t is None else t[ids] for t in (b13, b2, scale13, scale2))
    if experts.transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    share = experts.intermediate_size // tp
    w13_EnP = _gate_up_rows(w13, experts, rank * share, share)
    w2_EPi = w2[:, :, rank * share : (rank + 1) * share]
    if scale13 is not None and scale2 is not None:
        w13_EnP = dequantised(w13_EnP, _gate_up_rows(scale13, experts, rank * share, share))
        w2_EPi = dequantised(w2_EPi, scale2)
    b13_En = None if b13 is None else _gate_up_rows(b13, experts, rank * share, share)
    b2_EP = b2 if b2 is None or rank == 0 else torch.zeros_like(b2)
    if pad:
        w13_EnP, w2_EPi = functional.pad(w13_EnP, (0, pad)), functional.pad(w2_EPi, (0, 0, 0, pad))
        b2_EP = None if b2_EP is None else functional.pad(b2_EP, (0, pad))
    return ExpertWeights(w13_EnP, w2_EPi, b13_En, b2_EP, experts.activation)


def dequantised(stored_Eoi: Tensor, scale_Eo: Tensor) -> Tensor:
    """The numbers that int8 stands for, each row of o times its scale, rounded once to the dtype of the scales, fp32."""
    return stored_Eoi.to(scale_Eo.dtype) * scale_Eo[:, :, None]


def _as_index(held: Sequence[int]) -> slice | Tensor:
    """Neighbours as a slice, which copies no weights."""
    if held and list(held) == list(range(held[0], held[0] + len(held))):
        return slice(held[0], held[0] + len(held))
    return torch.tensor(held, dtype=torch.int64)


def join(routed: ExpertWeights, shared: ExpertWeights) -> ExpertWeights:
    """One kernel's weights for both: the shared experts stand behind the routed ones, as experts of the same width."""
    return ExpertWeights(
        torch.cat([routed.w13_EnP, shared.w13_EnP]), torch.cat([routed.w2_EPi, shared.w2_EPi]), None, None, routed.activation
    )  # fmt: skip


def _gate_up_rows(stored: Tensor, experts: Experts, start: int, count: int) -> Tensor:
    """Rows start to start + count of the gate half and of the up half, gate first."""
    if not experts.activation.gated:
        return stored[:, start : start + count]
    count_E, width = stored.shape[0], experts.intermediate_size
    if experts.layout == "interleaved":
        halves = stored.reshape(count_E, width, 2, *stored.shape[2:]).transpose(1, 2)
    else:
        halves = stored.reshape(count_E, 2, width, *stored.shape[2:])
    return halves[:, :, start : start + count].flatten(1, 2)


def activate(h: Tensor, rule: Activation) -> Tensor:
    """[*, n] -> [*, i] in the dtype of h, computed in fp32."""
    wide_h = wide(h)
    if not rule.gated:
        return _act(wide_h, rule).to(h.dtype)
    gate, up = wide_h.chunk(2, -1)
    if rule.clamp == "before":
        gate, up = gate.clamp(max=rule.limit), up.clamp(-_limit(rule), rule.limit)
    gate = _act(gate, rule)
    if rule.clamp == "after":
        gate, up = gate.clamp(max=rule.limit), up.clamp(-_limit(rule), rule.limit)
    return (gate * (up + rule.up_offset if rule.up_offset else up)).to(h.dtype)


def _limit(rule: Activation) -> float:
    return float("inf") if rule.limit is None else rule.limit


def _act(x: Tensor, rule: Activation) -> Tensor:
    match rule.kind:
        case "silu":
            return functional.silu(x) if rule.alpha == 1.0 else x * torch.sigmoid(rule.alpha * x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return functional.relu(x).square()


def weigh_input(x_MP: Tensor, weights_M1: Tensor) -> tuple[Tensor, Tensor]:
    """x times the weight of its one expert, rounded to the dtype, and weights of 1 for what comes after."""
    return (x_MP * weights_M1).to(x_MP.dtype), torch.ones_like(weights_M1)


class FusedMoEExperts(Protocol):
    """What a kernel asks of its experts.

    format: "standard" takes rows with K local ids each, "batched" rows sorted by expert, "monolithic" rows and logits.
    weighs: multiplies by the router weights and sums over K itself (`TopKWeightAndReduceNoOP`), else the finalize does.
    writes_input: may overwrite x.    width: columns it reads and writes, P.
    """

    format: Format
    weighs: bool
    writes_input: bool
    width: int


class TorchExperts:
    """Experts in plain torch, both products for all rows; weighs and adds the K results itself.

    All of the rank's experts see all rows and each slot takes the row it was routed to: at these sizes faster than
    gathering weights. Rounding: one to the dtype after each product, the weight before it.
    """

    format: Format = "standard"
    weighs: ClassVar[bool] = True
    writes_input = False

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights
        self.width = weights.w13_EnP.shape[2]
        self._w13_Pm = wide(weights.w13_EnP).flatten(0, 1).T  # m = E * n: one product for all experts
        self._w2_EiP = wide(weights.w2_EPi).transpose(1, 2)

    def apply(self, x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        """[N, P]: each row's sum over its local experts, 0 for a row without one."""
        if x_NP.shape[0] <= _ROWS:
            return self._rows(x_NP, weights_NK, local_NK)
        chunks = zip(x_NP.split(_ROWS), weights_NK.split(_ROWS), local_NK.split(_ROWS), strict=True)
        return torch.cat([self._rows(*chunk) for chunk in chunks])

    def _rows(self, x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        rows, dtype = x_NP.shape[0], x_NP.dtype
        if rows == 0 or self._w2_EiP.shape[0] == 0:
            return torch.zeros_like(x_NP)
        y_NKP = self._slots(x_NP, local_NK) * weights_NK[:, :, None]
        if dtype in (torch.bfloat16, torch.float16):
            y_NKP = wide(y_NKP.to(dtype))
        return y_NKP.sum(1).to(dtype)

    def _slots(self, x_NP: Tensor, local_NK: Tensor) -> Tensor:
        """fp32 [N, K, P], not weighted, 0 for the id -1."""
        experts, rows = self.weights, x_NP.shape[0]
        h_NEn = (wide(x_NP) @ self._w13_Pm).view(rows, *experts.w13_EnP.shape[:2])
        if experts.b13_En is not None:
            h_NEn = h_NEn + wide(experts.b13_En)
        a_NEi = activate(h_NEn.to(x_NP.dtype), experts.activation)
        count, _, width = self._w2_EiP.shape
        y_eNP = self._w2_EiP.new_zeros(count + 1, rows, width)  # the id -1 reads the last row, which stays 0
        y_ENP = torch.bmm(wide(a_NEi).transpose(0, 1), self._w2_EiP, out=y_eNP[:count])
        if experts.b2_EP is not None:
            y_ENP += wide(experts.b2_EP)[:, None, :]
        return y_eNP[local_NK, _column(rows)]


class SlotExperts(TorchExperts):
    """The same, but each slot's result comes out unweighted, [N, K, P]: the finalize weighs and adds."""

    weighs = False

    def apply(self, x_NP: Tensor, weights_NK: Tensor, local_NK: Tensor) -> Tensor:
        if x_NP.shape[0] == 0 or self._w2_EiP.shape[0] == 0:
            return x_NP.new_zeros(*local_NK.shape, self.width)
        return self._slots(x_NP, local_NK).to(x_NP.dtype)


class BatchedExperts:
    """Experts over rows sorted by expert, [E, B, P] in and out, unweighted; what lies beyond an expert's count is junk."""

    format: Format = "batched"
    weighs: ClassVar[bool] = False
    writes_input = False

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights
        self.width = weights.w13_EnP.shape[2]
        self._w13_EPn = wide(weights.w13_EnP).transpose(1, 2)
        self._w2_EiP = wide(weights.w2_EPi).transpose(1, 2)

    def apply(self, x_EBP: Tensor) -> Tensor:
        experts, dtype = self.weights, x_EBP.dtype
        h_EBn = torch.bmm(wide(x_EBP), self._w13_EPn)
        if experts.b13_En is not None:
            h_EBn = h_EBn + wide(experts.b13_En)[:, None]
        y_EBP = torch.bmm(wide(activate(h_EBn.to(dtype), experts.activation)), self._w2_EiP)
        if experts.b2_EP is not None:
            y_EBP = y_EBP + wide(experts.b2_EP)[:, None]
        return y_EBP.to(dtype)


class MonolithicExperts:
    """A kernel that routes by itself, from the logits; the layer's own router is not asked.

    local_E: physical id -> local id, None where all experts are here.
    """

    format: Format = "monolithic"
    weighs: ClassVar[bool] = True
    writes_input = False

    def __init__(
        self, weights: ExpertWeights, router: FusedMoERouter, local_E: Tensor | None, weight_on_input: bool
    ) -> None:
        self._inner = TorchExperts(weights)
        self._router = router
        self._local_E = local_E
        self._weight_on_input = weight_on_input
        self.width = self._inner.width

    def apply(self, x_NP: Tensor, logits_NE: Tensor, scale: float | None) -> Tensor:
        weights_NK, ids_NK = self._router.select_experts(logits_NE)
        if scale is not None:
            weights_NK = weights_NK * scale
        if self._weight_on_input:
            x_NP, weights_NK = weigh_input(x_NP, weights_NK)
        return self._inner.apply(x_NP, weights_NK, ids_NK if self._local_E is None else self._local_E[ids_NK])


@functools.lru_cache(maxsize=64)
def _column(rows: int) -> Tensor:
    """0 to rows - 1 as [rows, 1]."""
    return torch.arange(rows)[:, None]
