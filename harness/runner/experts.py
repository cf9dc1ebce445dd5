"""The routed experts behind the kernel interface: this rank's weights, both products, the weighted sum over K.

M tokens, P kernel width (hidden or latent, and padding), E experts, i this rank's share of the intermediate width,
n rows of w13 on this rank (2i if gated), K top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from harness.comm import Communicator
from reference.spec import Activation, Experts

# rows of a dense pass: bounds the memory of [rows, E, n] for large M
_ROWS = 2048


class FusedMoEKernel(Protocol):
    """What the runner asks of a kernel, at each call.

    output_is_reduced: returns the sum over all ranks.    scales: multiplies by s itself.    runs_shared: its finalize
    calls back to run the shared experts.    writes_input: may overwrite x.    width: columns it reads and writes, P.
    """

    output_is_reduced: bool
    scales: bool
    runs_shared: bool
    writes_input: bool
    width: int

    def apply(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor, in_finalize: Callable[[], None]) -> Tensor:
        """R [M, P] in the dtype of x: this rank's partial sum, or the sum of all ranks if output_is_reduced."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """One rank's shard, in one layout whatever the checkpoint's: w13 [E, n, P] gate rows first, w2 [E, P, i]."""

    w13_EnP: Tensor
    w2_EPi: Tensor
    b13_En: Tensor | None
    b2_EP: Tensor | None
    activation: Activation
    weight_on_input: bool


def shard(
    weights: Mapping[str, Tensor], experts: Experts, weight_on_input: bool, rank: int, tp: int, pad: int
) -> ExpertWeights:
    """Cut the whole weights for one rank: gate and up each into tp pieces, w2 by columns; pad adds zero columns to P.

    Only rank 0 keeps b2: every rank's would be added once per rank.
    """
    w13, w2 = weights["w13"], weights["w2"]
    if experts.transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    share = experts.intermediate_size // tp
    w13_EnP = _gate_up_rows(w13, experts, rank * share, share)
    w2_EPi = w2[:, :, rank * share : (rank + 1) * share]
    b13_En = b2_EP = None
    if experts.bias:
        b13_En = _gate_up_rows(weights["b13"], experts, rank * share, share)
        b2_EP = weights["b2"] if rank == 0 else torch.zeros_like(weights["b2"])
    if pad:
        w13_EnP, w2_EPi = functional.pad(w13_EnP, (0, pad)), functional.pad(w2_EPi, (0, 0, 0, pad))
        b2_EP = None if b2_EP is None else functional.pad(b2_EP, (0, pad))
    return ExpertWeights(w13_EnP, w2_EPi, b13_En, b2_EP, experts.activation, weight_on_input)


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
    wide = h.float()
    if not rule.gated:
        return _act(wide, rule).to(h.dtype)
    gate, up = wide.chunk(2, -1)
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


class TorchExperts:
    """The kernel in plain torch. It may be told to reduce, to scale or to run the shared experts in its finalize.

    All experts see all tokens and each slot takes the row it was routed to: at these sizes faster than gathering weights.
    Rounding: one to the dtype after each product, the weight before it.
    """

    writes_input = False

    def __init__(
        self, weights: ExpertWeights, comm: Communicator, *, reduces: bool = False, scale: float | None = None,
        runs_shared: bool = False,
    ) -> None:  # fmt: skip
        self.weights = weights
        self.comm = comm
        self.output_is_reduced = reduces
        self.scale = scale
        self.scales = scale is not None
        self.runs_shared = runs_shared
        self.width = weights.w13_EnP.shape[2]
        wide = weights.w13_EnP.float()
        self._w13_Pm = wide.flatten(0, 1).T  # m = E * n: one product for all experts
        self._w2_EiP = weights.w2_EPi.float().transpose(1, 2)

    def apply(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor, in_finalize: Callable[[], None]) -> Tensor:
        if self.scale is not None:
            weights_MK = weights_MK * self.scale
        if x_MP.shape[0] <= _ROWS:
            routed_MP = self._experts(x_MP, weights_MK, ids_MK)
        else:
            chunks = zip(x_MP.split(_ROWS), weights_MK.split(_ROWS), ids_MK.split(_ROWS), strict=True)
            routed_MP = torch.cat([self._experts(*chunk) for chunk in chunks])
        if self.runs_shared:
            in_finalize()
        return self.comm.tp.all_reduce(routed_MP) if self.output_is_reduced else routed_MP

    def _experts(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Tensor:
        experts = self.weights
        rows, dtype = x_MP.shape[0], x_MP.dtype
        if rows == 0:
            return torch.empty_like(x_MP)
        if experts.weight_on_input:
            x_MP = (x_MP * weights_MK).to(dtype)
            weights_MK = torch.ones_like(weights_MK)
        h_MEn = (x_MP.float() @ self._w13_Pm).view(rows, *experts.w13_EnP.shape[:2])
        if experts.b13_En is not None:
            h_MEn = h_MEn + experts.b13_En.float()
        a_MEi = activate(h_MEn.to(dtype), experts.activation)
        count, _, width = self._w2_EiP.shape
        y_eMP = self._w2_EiP.new_zeros(
            count + 1, rows, width
        )  # id -1 is no expert: it reads the last row, which stays 0
        y_EMP = torch.bmm(a_MEi.float().transpose(0, 1), self._w2_EiP, out=y_eMP[:count])
        if experts.b2_EP is not None:
            y_EMP += experts.b2_EP.float()[:, None, :]
        y_MKP = y_eMP[ids_MK, _column(rows)] * weights_MK[:, :, None]
        if dtype is not torch.float32:
            y_MKP = y_MKP.to(dtype).float()
        return y_MKP.sum(1).to(dtype)


@functools.lru_cache(maxsize=64)
def _column(rows: int) -> Tensor:
    """0 to rows - 1 as [rows, 1]."""
    return torch.arange(rows)[:, None]
