"""Quantised experts: scales lost, doubled, of other channels or experts, and bytes read as another type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from harness.problem import Problem
from harness.quantised import LARGEST, QUANTISED, dequantise, input_dim
from harness.variants.law import Variant, run
from reference.moe import Stages
from reference.spec import Experts

# int8 [E, ., .] as stored and its scale [E, channels] -> both as a loader has them that gets them wrong
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def scales(given: Problem, tp: int) -> Iterator[Variant]:
    """What a loader of int8 experts makes of them, in w13, in w2 or in both.

    tp: into how many pieces the ranks cut an expert.
    """
    if not given.is_quantised:
        return
    for names in (("w2",), ("w13",), QUANTISED):
        where, plural = " and ".join(names), "s" if len(names) == 1 else ""
        for sentence, change in _CHANGES.items():
            told = sentence.format(where=where, reads="read" + plural)
            yield Variant("F10", "routed", told, partial(_changed, given, names, change))
    gated = given.spec.experts.activation.gated
    for sentence, at in _rows_of_w13(given.spec.experts, tp) if gated and given.spec.vision is None else ():
        yield Variant("F10", "routed", sentence, partial(_changed, given, ("w13",), partial(_at, at)))
    yield Variant(
        "F10", "routed", "the scales of w2 stand at its inputs, not at its outputs", partial(_at_inputs, given, "w2")
    )
    yield Variant(
        "F10", "routed", "the scales of w13 stand at its inputs, not at its outputs", partial(_at_inputs, given, "w13")
    )
    if given.spec.experts.bias:
        for name in QUANTISED:
            told = f"the scales of {name} multiply the bias behind it too"
            yield Variant("F10", "routed", told, partial(_scaled_bias, given, name))


def _one_for_all(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return q, scale[:, :1].expand_as(scale)


_CHANGES: dict[str, Change] = {
    "the scales of {where} are dropped": lambda q, scale: (q, torch.ones_like(scale)),
    "the scales of {where} are applied twice": lambda q, scale: (q, scale.double() ** 2),
    "every expert has the scales of {where} of the one before it": lambda q, scale: (q, scale.roll(1, 0)),
    "every expert has the scales of {where} of the one after it": lambda q, scale: (q, scale.roll(-1, 0)),
    "every expert has the scales of {where} of the first one": lambda q, scale: (q, scale[:1].expand_as(scale)),
    "every channel has the scale of {where} of the one before it": lambda q, scale: (q, scale.roll(1, 1)),
    "every channel has the scale of {where} of the one after it": lambda q, scale: (q, scale.roll(-1, 1)),
    "all channels of an expert have the scale of {where} of its first one": _one_for_all,
    "all channels of an expert have the largest scale of {where} among them": lambda q, scale: (
        q, scale.amax(1, keepdim=True).expand_as(scale)),
    "the int8 of {where} is read as unsigned": lambda q, scale: (q.view(torch.uint8), scale),
    "the bytes of {where} are read with a zero point of 128 that is not taken off": lambda q, scale: (
        q.double() + 128, scale),
    "the sign of the int8 of {where} is lost": lambda q, scale: (q.double().abs(), scale),
    "the int8 of {where} is divided by 128, its scales are made for 127": lambda q, scale: (
        q, scale.double() * LARGEST / 128),
    "the scales of {where} are rounded to bf16": lambda q, scale: (q, scale.bfloat16()),
    "the scales of {where} are rounded to fp16": lambda q, scale: (q, scale.half()),
}  # fmt: skip


def _rows_of_w13(experts: Experts, tp: int) -> Iterator[tuple[str, Tensor]]:
    """A sentence, and at which row the scale stands that each row of w13 gets, as stored."""
    width = experts.intermediate_size
    halved = torch.arange(2 * width)
    paired = halved.view(2, width).T.flatten()  # gate 0, up 0, gate 1, ... of halves
    stored = paired.argsort() if experts.layout == "interleaved" else halved  # where row i of halves is stored
    rows = stored.argsort()  # which row of halves is stored at i

    def as_stored(at: Tensor) -> Tensor:
        """at: by row of halves, the row of halves whose scale it gets."""
        return stored[at[rows]]

    yield "the scales of w13 have gate and up exchanged", as_stored((halved + width) % (2 * width))
    if experts.layout == "interleaved":
        yield "the scales of w13 are read as halved, they are stored as w13 is, interleaved", paired
    else:
        yield "the scales of w13 are read as interleaved, they are stored as w13 is, halved", paired.argsort()
    if tp > 1:
        share = width // tp
        own = halved % width % share
        yield (
            "the scales of w13 are not cut with its rows: every rank has those of the first",
            as_stored(own + halved // width * width),
        )
    if tp > 1 and experts.layout == "halved":  # of pairs of gate and up, one block is the right cut
        rank, half = halved % width // share, halved // width
        yield "the scales of w13 are cut as one block, its rows as gate and up", rank * 2 * share + half * share + own


def _at(rows: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return q, scale[:, rows]


def _changed(given: Problem, names: tuple[str, ...], change: Change) -> Stages:
    """The law of what is read, in both branches where images have their own."""
    stored = dict(given.weights)
    for name in _named(given.weights, names):
        stored[name], stored[f"{name}_scale"] = change(stored[name], stored[f"{name}_scale"])
    return run(given, weights=dequantise(given.spec, stored))


def _at_inputs(given: Problem, name: str) -> Stages:
    """Repeated or cut to the number of inputs."""
    exact = dict(given.exact)
    for each in _named(given.weights, (name,)):
        q, scale = given.weights[each].double(), given.weights[f"{each}_scale"].double()
        summed = input_dim(given.spec, each)
        count = q.shape[summed]
        repeated = scale.repeat(1, -(-count // scale.shape[1]))[:, :count]
        exact[each] = q * repeated.unsqueeze(3 - summed)
    return run(given, weights=exact)


def _scaled_bias(given: Problem, name: str) -> Stages:
    exact = dict(given.exact)
    for each in _named(given.weights, (name,)):
        bias = each.replace("w", "b")
        exact[bias] = exact[bias] * given.weights[f"{each}_scale"].double()
    return run(given, weights=exact)


def _named(stored: Mapping[str, Tensor], names: tuple[str, ...]) -> list[str]:
    return [name for name in stored if name.removeprefix("vision_") in names]
