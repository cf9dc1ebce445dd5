"""Routed experts stored in 8 bits: int8 matrices with one float32 scale for each output channel.

    q = 127 * w / amax, rounded to the nearest integer, ties to even        scale = gain * amax / 127, as float32

amax is the largest |w| of the channel, and w are the numbers of the case before they are rounded to a dtype: q and scale
are the same in every dtype. Each channel has a gain of its own, between 1/2 and 3/2: with Philox numbers alone all scales
would be alike within a few hundredths, and another channel's would pass for the right one.
Everything follows exactly from integers (docs/numbers.md). Source of the format: vLLM, quantization/experts_int8.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.philox import uniform
from reference.spec import MoESpec

QUANTISED = ("w13", "w2")
LARGEST = 127


def quantise(spec: MoESpec, weights: Mapping[str, Tensor], fp32: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The weights as an int8 checkpoint stores them: `w13`, `w2` int8 in their own layout, `w13_scale` [E, N] and
    `w2_scale` [E, P] float32 behind each, with `vision_` in front in the second branch; all others as they are.

    fp32: the same tensors before rounding to a dtype.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stored[name] = tensor
        if name.removeprefix("vision_") in QUANTISED:
            scale = f"{name}_scale"
            stored[name], stored[scale] = _quantise(fp32[name], input_dim(spec, name), scale, seed)
    return stored


def _quantise(w: Tensor, dim: int, scale: str, seed: int) -> tuple[Tensor, Tensor]:
    """In float64, which is exact here: no quotient lies so near a tie that a second rounding could decide it."""
    amax = w.double().abs().amax(dim, keepdim=True)
    amax = torch.where(amax == 0, 1.0, amax)  # a channel of zeros has q = 0, whatever its scale
    q = torch.round(LARGEST * w.double() / amax)
    channels = amax.squeeze(dim)
    gain = 1 + uniform(scale, seed, 0, channels.numel(), w.device).double().view_as(channels) / 2
    return q.to(torch.int8), (gain * channels / LARGEST).float()


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
