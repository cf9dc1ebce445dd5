"""The inputs of a case and what the oracle makes of them, kept for the cases that share them.

Systems, grids and options of a case change none of this, so a matrix computes it once for each model, dtype and M.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from harness.case import Case, Grid
from harness.labels import tensors as labelled
from harness.labels.columns import Labels
from harness.quantised import dequantise, quantise
from harness.weights import DTYPES, Tokens, make_tokens, make_weights
from reference.moe import Stages, forward
from reference.naive import naive
from reference.spec import MoESpec, RouterPrecision


class Ways(NamedTuple):
    """Into how many partial sums the ranks of a grid cut the routed and the shared experts: what rounding depends on."""

    routed: int
    shared: int


@functools.lru_cache(maxsize=512)
def ways(spec: MoESpec, grid: Grid) -> Ways:
    """The ranks that hold experts, and those that share the shared experts.

    Experts that stay whole round no worse than experts cut into as many pieces, so one count serves every placement; it
    is lowered to one that divides their widths.
    """
    widths = [spec.experts.intermediate_size]
    widths += [spec.vision.experts.intermediate_size] if spec.vision else []
    routed = next(n for n in range(grid.ranks, 0, -1) if all(width % n == 0 for width in widths))
    return Ways(routed, grid.shared_tp)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """spec, the weights as stored, the tokens, and the oracle's stages. Nobody may write into them.

    exact: the stored weights upcast to float64, which is what the oracle computes from; quantised ones as the numbers that
    they stand for, under the names of `weight_shapes(spec)`.
    labels: of a labelled layer, whose ranks each get copies of their own (`weights_of`).
    """

    spec: MoESpec
    dtype: torch.dtype
    weights: dict[str, Tensor]
    exact: dict[str, Tensor]
    tokens: Tokens
    stages: Stages
    labels: Labels | None = None
    _errors: dict[tuple[Ways, RouterPrecision], Tensor] = field(default_factory=dict)

    @property
    def is_quantised(self) -> bool:
        """The routed experts are stored in fewer bits than the dtype has, so a layer rounds them when it unpacks them."""
        return "w13_scale" in self.weights

    @property
    def unpacked(self) -> dict[str, Tensor]:
        """The weights in the dtype of the case; quantised ones are rounded to it once more."""
        if not self.is_quantised:
            return self.weights
        return {
            name: stored if (stored := self.weights[name]).is_floating_point() else tensor.to(self.dtype)
            for name, tensor in self.exact.items()
        }

    def weights_of(self, rank: int) -> Mapping[str, Tensor]:
        """The whole weights, as that rank gets them."""
        return self.weights if self.labels is None else labelled.weights_of(self.labels, self.weights, rank)

    def naive_error(self, ways: Ways, precision: RouterPrecision) -> Tensor:
        """float64 [M]: the larger row error (L2) of the two naive runs, the unit in which a system's error is read."""
        if (ways, precision) not in self._errors:
            self._errors[ways, precision] = _naive_error(self, ways, precision)
        return self._errors[ways, precision]


def problem(case: Case) -> Problem:
    """The problem of a case; cases that differ in system, grid or placement share one."""
    if case.size == "labels":
        return _labelled(case.labels, case.grid.dp, case.dtype)
    return _problem(case.spec, case.dtype, case.tokens, case.seed, case.quant)


@functools.lru_cache(maxsize=32)
def _labelled(labels: Labels, dp: int, dtype: str) -> Problem:
    """All its numbers are exact in every dtype, so one oracle serves all."""
    with torch.inference_mode():
        if dtype != "fp32":
            exact = _labelled(labels, dp, "fp32")
            rows = Tokens(exact.tokens.hidden_states.to(DTYPES[dtype]), exact.tokens.is_vision)
            stored = {
                name: tensor if name.endswith("e_score_correction_bias") else tensor.to(DTYPES[dtype])
                for name, tensor in exact.weights.items()
            }
            return replace(exact, dtype=DTYPES[dtype], weights=stored, tokens=rows, _errors={})
        weights = labelled.make_weights(labels, DTYPES[dtype])
        rows = labelled.make_tokens(labels, dp, DTYPES[dtype])
        exact_weights = {name: tensor.double() for name, tensor in weights.items()}
        stages = forward(labels.spec, exact_weights, rows.hidden_states, is_vision_M=rows.is_vision)
    return Problem(labels.spec, DTYPES[dtype], weights, exact_weights, rows, stages, labels)


# A twin's weights take 0.2 MB a dtype and its stages less: the cases of one model fit, and a matrix goes model by model.
@functools.lru_cache(maxsize=48)
def _problem(spec: MoESpec, dtype: str, tokens: int, seed: int, quant: str) -> Problem:
    with torch.inference_mode():
        weights, exact = _stored(spec, dtype, seed, quant), _exact(spec, dtype, seed, quant)
        rows = _tokens(spec, dtype, tokens, seed)
        stages = forward(spec, exact, rows.hidden_states, is_vision_M=rows.is_vision)
    return Problem(spec, DTYPES[dtype], weights, exact, rows, stages)


@functools.lru_cache(maxsize=12)
def _weights(spec: MoESpec, dtype: str, seed: int) -> dict[str, Tensor]:
    if dtype == "fp32":
        return make_weights(spec, seed, DTYPES[dtype])
    exact = _weights(spec, "fp32", seed)
    return {name: t if name.endswith("e_score_correction_bias") else t.to(DTYPES[dtype]) for name, t in exact.items()}


@functools.lru_cache(maxsize=12)
def _stored(spec: MoESpec, dtype: str, seed: int, quant: str) -> dict[str, Tensor]:
    weights = _weights(spec, dtype, seed)
    return quantise(spec, weights, _weights(spec, "fp32", seed), seed) if quant == "int8" else weights


@functools.lru_cache(maxsize=6)
def _exact(spec: MoESpec, dtype: str, seed: int, quant: str) -> dict[str, Tensor]:
    return dequantise(spec, _stored(spec, dtype, seed, quant))


@functools.lru_cache(maxsize=256)
def _tokens(spec: MoESpec, dtype: str, tokens: int, seed: int) -> Tokens:
    return make_tokens(spec, tokens, seed, DTYPES[dtype])


def _naive_error(given: Problem, ways: Ways, precision: RouterPrecision) -> Tensor:
    x_MH, is_vision_M = given.tokens.hidden_states, given.tokens.is_vision
    if x_MH.shape[0] == 0:
        return x_MH.new_zeros(0, dtype=torch.float64)
    with torch.inference_mode():
        runs = naive(
            given.spec, given.unpacked, x_MH, given.stages, ways.routed, precision, is_vision_M, shared_tp=ways.shared
        )
        return (torch.stack(runs).double() - given.stages.output_MH).norm(dim=-1).amax(0)


def make_inputs(case: Case) -> None:
    """Make weights and tokens of a case, so that a benchmark can leave them out."""
    _exact(case.spec, case.dtype, case.seed, case.quant)
    _tokens(case.spec, case.dtype, case.tokens, case.seed)


def forget_oracle() -> None:
    """Drop what the oracle and the naive runs computed; weights and tokens stay. For benchmarks."""
    _problem.cache_clear()
