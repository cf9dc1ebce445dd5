"""Weights and tokens of a case, from integer arithmetic on Philox bits: offset + width * u, with u in (-1, 1).

All constants are powers of two (or their small multiples), so every value is exact in float32 before it is rounded once
to the dtype of the case. System and oracle read the same rounded tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.philox import uint16, uniform
from reference.spec import MoESpec, weight_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# offset and width by tensor name; everything else is a matrix, whose width follows from the length of its sums
_VECTORS: dict[str, tuple[float, float]] = {
    "router_bias": (0.0, 0.5),
    "per_expert_scale": (1.0, 0.5),
    "b13": (0.0, 0.5),
    "b2": (0.0, 1.0),
    "fc1_latent_bias": (0.0, 0.5),
    "fc2_latent_bias": (0.0, 1.0),
    "shared_b13": (0.0, 0.5),
    "shared_b2": (0.0, 1.0),
}
# Far below 0 and below -1, so that a fill value of 0 or -1 beats every legal score; the spread is that of the scores, so
# that the bias changes choices without making them alone.
_CORRECTION_OFFSET = -2.0
_CORRECTION_WIDTH = {"sigmoid": 0.25, "sqrtsoftplus": 0.25, "softmax": 0.0625}
TOKEN_WIDTH = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """hidden_states: [M, H] in the dtype of the case.    is_vision: bool [M] where the spec has a vision branch."""

    hidden_states: Tensor
    is_vision: Tensor | None


def make_weights(spec: MoESpec, seed: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of `weight_shapes(spec)`, as stored: rounded once to dtype; e_score_correction_bias stays float32."""
    return {name: make_weight(spec, name, seed, dtype, device) for name in weight_shapes(spec)}


def make_weight(
    spec: MoESpec, name: str, seed: int, dtype: torch.dtype, device: str = "cpu", expert: int | None = None
) -> Tensor:
    """One tensor by name; with expert=e only the slice [e] of a tensor that has one for each expert."""
    shape = weight_shapes(spec)[name]
    start, stop = 0, math.prod(shape)
    if expert is not None:
        shape = shape[1:]
        start, stop = expert * math.prod(shape), (expert + 1) * math.prod(shape)
    offset, width = _offset_and_width(spec, name, shape)
    values = offset + width * uniform(name, seed, start, stop, device)
    stored = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    return values.to(stored).view(shape)


def make_tokens(spec: MoESpec, tokens: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tokens:
    """tokens rows of hidden states; the first rows do not depend on how many follow. About half of them are images."""
    values = TOKEN_WIDTH * uniform("hidden_states", seed, 0, tokens * spec.hidden_size, device)
    is_vision = uint16("is_vision", seed, 0, tokens, device) < 32768 if spec.vision else None
    return Tokens(values.to(dtype).view(tokens, spec.hidden_size), is_vision)


def _offset_and_width(spec: MoESpec, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    bare = name.removeprefix("vision_")
    if bare == "e_score_correction_bias":
        routing = spec.vision.routing if spec.vision and name != bare else spec.routing
        return _CORRECTION_OFFSET, _CORRECTION_WIDTH[routing.scoring_func]
    if bare in _VECTORS:
        return _VECTORS[bare]
    if bare == "router_scale":  # the router multiplies by H**-0.5 as well: about 1 together
        near_root = 2.0 ** (spec.hidden_size.bit_length() // 2)
        return near_root, near_root / 2
    summed = shape[-2] if spec.experts.transposed and bare in ("w13", "w2") else shape[-1]
    # results of about unit size: the power of two next below 2 / sqrt(terms), found in integers to be the same everywhere
    exponent = 0
    while summed > 4 << (2 * exponent):
        exponent += 1
    return 0.0, 2.0**-exponent
