"""Right layers over int8 experts, in the ways in which kernels unpack them: none of them may be accused.

    moe-harness check --system tests/int8_layers.py:after deepseek_v3@tp4.bf16.tokens33+quant=int8

Written against the public contract, like clean_layers.py, whose layers they are but for the weights.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from reference.spec import Activation, MoESpec
from tests.clean_layers import STYLES, Layer, Style

quant = ("int8",)  # what the contract asks of a module that can load it


def unpacked(spec: MoESpec, weights: dict[str, Tensor], to: torch.dtype) -> dict[str, Tensor]:
    """int8 matrices times their float32 scales, rounded once to a dtype. (Scales that are rounded first are a fault.)"""
    found = {name: t for name, t in weights.items() if not name.endswith(("w13_scale", "w2_scale"))}
    for name, q in found.items():
        if q.dtype == torch.int8:
            experts = spec.vision.experts if name.startswith("vision_") else spec.experts
            scale = weights[f"{name}_scale"]
            found[name] = (q.float() * (scale[:, None, :] if experts.transposed else scale[:, :, None])).to(to)
    return found


class Unpacking(Layer):
    """Unpacks once, when it is loaded; in the style's own precision."""

    def __init__(self, spec: MoESpec, weights: dict[str, Tensor], comm: object, style: Style) -> None:
        to = torch.float32 if style.wide else weights["router_weight"].dtype
        super().__init__(spec, unpacked(spec, weights, to), comm, style)


class After(Layer):
    """Multiplies by int8, accumulates in float32, and scales each channel of the sum before it is stored, as vLLM does."""

    def cut(self, experts, weights: dict[str, Tensor]) -> dict[str, Tensor | None]:
        held, piece = list(self.held(len(weights["w13"]))), self.expert_piece
        cut = super().cut(experts, weights)
        if "w13_scale" not in weights:
            return cut
        interleaved = experts.layout == "interleaved"
        gate, up = piece.halves(weights["w13_scale"][held], experts.activation.gated, interleaved)
        return cut | {"gate_s": gate, "up_s": up, "w2_s": weights["w2_scale"][held]}

    def mlp(self, x: Tensor, cut, e: int, rule: Activation, w: Tensor | None = None) -> Tensor:
        if "w2_s" not in cut:
            return super().mlp(x, cut, e, rule, w)

        def into(x: Tensor, name: str, bias: str) -> Tensor:
            y = (x.float() @ cut[name][e].float().T) * cut[f"{name}_s"][e]
            return y if cut[bias] is None else y + cut[bias][e].float()

        gate = None if cut["gate"] is None else into(x, "gate", "gate_b").to(x.dtype)
        a = self.activated(gate, into(x, "up", "up_b").to(x.dtype), rule)
        return (into(a, "w2", "b2") * w).to(x.dtype)


def _build(spec: MoESpec, weights: dict[str, Tensor], comm: object, *, of: type[Layer], style: Style) -> Layer:
    return of(spec, weights, comm, style)


_OF = {
    "loop": Style(),
    **{name: STYLES[name] for name in ("wide", "everything_in_dtype", "dense", "units", "gathered")},
}
WAYS = {name: functools.partial(_build, of=Unpacking, style=style) for name, style in _OF.items()}
WAYS["after"] = functools.partial(_build, of=After, style=Style(scale="output", reduce="reversed"))
loop, wide, everything_in_dtype, dense, units, gathered, after = WAYS.values()
