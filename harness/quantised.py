"""Routed experts stored in 8 bits: int8 matrices with one float32 scale for each output channel.

    q = 127 * w / amax, rounded to the nearest integer, ties to even        scale = amax / 127, rounded once to float32

where amax is the largest |w| of the channel and w are the numbers of the case before they are rounded to a dtype: q and
scale are the same in every dtype. Both follow exactly from integers: w is an integer times a power of two, whose
quotients by 127 or by another integer lie too far from a tie for a second rounding to matter.
Source of the format: vLLM, quantization/experts_int8.py (`w13_scale`, `w2_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.spec import MoESpec

QUANTISED = ("w13", "w2")
_LARGEST = 127


def quantise(spec: MoESpec, weights: Mapping[str, Tensor], fp32: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as an int8 checkpoint stores them: `w13`, `w2` int8 in their own layout, `w13_scale` [E, N] and
    `w2_scale` [E, P] float32 behind each, with `vision_` in front in the second branch; all others as they are.

    fp32: the same tensors before rounding to a dtype.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.removeprefix("vision_") in QUANTISED:
            stored[name], stored[f"{name}_scale"] = _quantise(fp32[name], input_dim(spec, name))
        else:
            stored[name] = tensor
    return stored


def _quantise(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    amax = w.double().abs().amax(dim, keepdim=True)
    used = torch.where(amax == 0, 1.0, amax)  # a channel of zeros has q = 0, whatever its scale
    q = torch.round(w.double() * _LARGEST / used)
    return q.to(torch.int8), (used / _LARGEST).squeeze(dim).float()


def dequantise(spec: MoESpec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of `weight_shapes(spec)` in float64, exactly: 7 bits times 24 fit into 53. Scales are gone."""
    exact = {name: tensor.double() for name, tensor in stored.items() if not name.endswith(("w13_scale", "w2_scale"))}
    for name in exact:
        if f"{name}_scale" in stored and name.removeprefix("vision_") in QUANTISED:
            exact[name] = exact[name] * stored[f"{name}_scale"].double().unsqueeze(input_dim(spec, name))
    return exact


def input_dim(spec: MoESpec, name: str) -> int:
    """The dimension of a routed matrix that its product sums over; the channels are the other one."""
    experts = spec.vision.experts if spec.vision is not None and name.startswith("vision_") else spec.experts
    return 1 if experts.transposed else 2
