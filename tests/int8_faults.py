"""Loaders of int8 experts that get a single thing wrong, planted in the weights that a rank of the runner gets.

python -m tests.int8_faults          how many are found and named, by dtype, in some minutes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import DTYPES, parse
from harness.check import check
from harness.comm import Communicator
from harness.finding import Verdict
from harness.systems.runner import RunnerSystem
from reference.spec import MoESpec

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Int8Fault:
    """words: what the diagnosis in fp32 contains.    plant: changes the weights of a rank, a dict that is its own."""

    words: str
    plant: Callable[[MoESpec, Weights, Communicator], None]

    def __str__(self) -> str:
        return self.words


class FaultyLoader(RunnerSystem):
    """The runner with one fault."""

    def __init__(self, fault: Int8Fault) -> None:
        self._fault = fault

    def build(self, case, weights: Mapping[str, Tensor], comm: Communicator):
        mine = dict(weights)
        self._fault.plant(case.spec, mine, comm)
        return super().build(case, mine, comm)


def _each(*names: str, q: Callable[[Tensor], Tensor] | None = None, scale: Callable[[Tensor], Tensor] | None = None):
    def plant(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
        for name in list(weights):
            if name.removeprefix("vision_") in names:
                weights[name] = weights[name] if q is None else q(weights[name])
                key = f"{name}_scale"
                weights[key] = weights[key] if scale is None else scale(weights[key])

    return plant


def _inputs(*names: str):
    """The scales along what a product sums over: multiplied in before, and 1 where the loader looks for them."""

    def plant(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
        for name in names:
            q, scale = weights[name].float(), weights[f"{name}_scale"]
            inputs = q.shape[1 if spec.experts.transposed else 2]
            along = torch.cat([scale] * 9, 1)[:, :inputs]
            weights[name] = q * (along[:, :, None] if spec.experts.transposed else along[:, None, :])
            weights[f"{name}_scale"] = torch.ones_like(scale)

    return plant


def _first_share(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
    """Every rank reads the scales of the first one's rows of w13."""
    scale, width = weights["w13_scale"], spec.experts.intermediate_size
    own = width // comm.tp.size
    if spec.experts.layout == "interleaved":
        weights["w13_scale"] = scale[:, : 2 * own].repeat(1, comm.tp.size)
    else:
        gate, up = scale[:, :own], scale[:, width : width + own]
        weights["w13_scale"] = torch.cat([gate] * comm.tp.size + [up] * comm.tp.size, 1)


def _block(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
    """A rank's scales are one block of w13's, its rows are gate and up."""
    scale, width, tp = weights["w13_scale"], spec.experts.intermediate_size, comm.tp
    own = width // tp.size
    mine = scale[:, tp.rank * 2 * own : (tp.rank + 1) * 2 * own]
    changed = scale.clone()
    changed[:, tp.rank * own : (tp.rank + 1) * own] = mine[:, :own]
    changed[:, width + tp.rank * own : width + (tp.rank + 1) * own] = mine[:, own:]
    weights["w13_scale"] = changed


def _exchanged(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
    for name in ("w13_scale", "vision_w13_scale"):
        if name in weights:
            pairs = weights[name].unflatten(1, (-1, 2) if spec.experts.layout == "interleaved" else (2, -1))
            weights[name] = pairs.flip(2 if spec.experts.layout == "interleaved" else 1).flatten(1)


def _other_layout(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
    scale = weights["w13_scale"]
    if spec.experts.layout == "interleaved":  # a reader of halves finds gate i at i: put it where gate i is stored
        weights["w13_scale"] = torch.stack(scale.chunk(2, 1), 2).flatten(1)
    else:
        weights["w13_scale"] = torch.cat([scale[:, 0::2], scale[:, 1::2]], 1)


def _with_bias(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
    weights["b2"] = (weights["b2"].float() * weights["w2_scale"]).to(weights["b2"].dtype)


def _every(where: str, *names: str) -> dict[str, Int8Fault]:
    """The faults that w13, w2 or both may have."""
    plain = {
        f"the scales of {where} are dropped": _each(*names, scale=torch.ones_like),
        f"the scales of {where} are applied twice": _each(*names, scale=torch.square),
        f"every expert has the scales of {where} of the one before it": _each(*names, scale=lambda s: s.roll(1, 0)),
        f"every expert has the scales of {where} of the first one": _each(*names, scale=lambda s: s[:1].repeat(len(s), 1)),
        f"every channel has the scale of {where} of the one after it": _each(*names, scale=lambda s: s.roll(-1, 1)),
        f"all channels of an expert have the scale of {where} of its first one": _each(
            *names, scale=lambda s: s[:, :1].repeat(1, s.shape[1])),
        f"all channels of an expert have the largest scale of {where} among them": _each(
            *names, scale=lambda s: s.amax(1, keepdim=True).repeat(1, s.shape[1])),
        f"the int8 of {where} is read as unsigned": _each(*names, q=lambda q: torch.where(q < 0, q.short() + 256, q.short())),
        f"the bytes of {where} are read with a zero point of 128 that is not taken off": _each(
            *names, q=lambda q: q.short() + 128),
        f"the int8 of {where} is divided by 128, its scales are made for 127": _each(*names, scale=lambda s: s * (127 / 128)),
        f"the scales of {where} are rounded to bf16": _each(*names, scale=lambda s: s.bfloat16().float()),
    }  # fmt: skip
    return {words: Int8Fault(words, plant) for words, plant in plain.items()}


FAULTS = {**_every("w2", "w2"), **_every("w13", "w13"), **_every("w13 and w2", "w13", "w2")}
GATED = {
    "exchanged": Int8Fault("the scales of w13 have gate and up exchanged", _exchanged),
    "layout": Int8Fault("they are stored as w13 is", _other_layout),
    "inputs of w2": Int8Fault("the scales of w2 stand at its inputs", _inputs("w2")),
    "inputs of w13": Int8Fault("the scales of w13 stand at its inputs", _inputs("w13")),
}
SHARDED = {
    "first share": Int8Fault("not cut with its rows: every rank has those of the first", _first_share),
    "block": Int8Fault("the scales of w13 are cut as one block", _block),
}
BIASED = {"bias": Int8Fault("the scales of w2 multiply the bias behind it too", _with_bias)}


def _one(name: str, change: Callable[[Tensor], None]):
    def plant(spec: MoESpec, weights: Weights, comm: Communicator) -> None:
        scale = weights[f"{name}_scale"].clone()
        change(scale)
        weights[f"{name}_scale"] = scale

    return plant


def _lost(scale: Tensor) -> None:
    scale[3, 5] = 1.0


def _of_a_neighbour(scale: Tensor) -> None:
    scale[3] = scale[4]


# of one expert that the tokens visit: found in every dtype; expert and column are what a diagnosis can say
SINGLE = {
    "a channel of w2 without its scale": Int8Fault("only columns 5 of 64", _one("w2", _lost)),
    "a channel of w13 without its scale": Int8Fault("expert 3", _one("w13", _lost)),
    "an expert with its neighbour's scales of w2": Int8Fault("expert 3", _one("w2", _of_a_neighbour)),
    "an expert with its neighbour's scales of w13": Int8Fault("expert 3", _one("w13", _of_a_neighbour)),
}


def faults_of(model: str) -> list[Int8Fault]:
    """Those that a model's experts can have on four ranks."""
    more = {
        "deepseek_v3": {**GATED, **SHARDED, **SINGLE},
        "gpt_oss": {**GATED, **BIASED},
        "mixtral": {**GATED, **SHARDED},
    }
    return [*FAULTS.values(), *more.get(model, {}).values()]


def main() -> None:
    for dtype in DTYPES:
        counts, missed = Counter(), Counter()
        for model in ("deepseek_v3", "gpt_oss", "mixtral", "ernie4_5_vl_moe", "nemotron_h"):
            for fault in faults_of(model):
                finding = check(parse(f"{model}@tp4.{dtype}.tokens33+quant=int8"), FaultyLoader(fault))
                counts.update(
                    planted=1, found=finding.verdict is Verdict.MISMATCH, named=fault.words in finding.diagnosis
                )
                missed[fault.words] += finding.verdict is not Verdict.MISMATCH
        print(dtype, dict(counts), "missed:", {words: n for words, n in missed.items() if n}, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
