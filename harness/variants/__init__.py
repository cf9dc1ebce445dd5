"""Wrong laws: each one is what a layer computes that gets a single rule of its model wrong.

A variant is the oracle itself with one field of the spec, one tensor or the choice of experts replaced. Diagnosis asks
which of them explains an output that the law does not.

Here is their order alone; a module holds those of one subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from harness.layout import Layout
from harness.problem import Problem
from harness.variants import (
    activations,
    choice,
    experts,
    groups,
    misread,
    modalities,
    places,
    quantised,
    rounded,
    shared,
    weighing,
)  # fmt: skip
from harness.variants.law import Variant
from reference.moe import Stages

__all__ = ["Variant", "variants"]


def variants(
    given: Problem, picks_MK: Tensor | None, tp: int, layout: Layout | None = None, blocks: Sequence[Tensor] = ()
) -> Iterator[Variant]:
    """Every wrong law that differs from this layer's, the commonest first.

    picks_MK: the experts that an output must come from, if known: they decide where a wrong law leaves exact ties.
    tp: into how many pieces an expert is cut.    layout: which rank holds what, where laws of single ranks are asked for too.
    blocks: the rows of each table that some ranks make of tokens of their own, where misread tables are asked for too.
    """
    yield from _router(given, picks_MK)
    yield from misread.tables(given, picks_MK, blocks) if blocks else ()
    yield from _in_both(given, [*_experts(given, tp, layout)])
    yield from modalities.branches(given)


def _router(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """Where images have a branch of their own, only the laws that change the rule of both branches alike."""
    one_branch = given.spec.vision is None
    yield from choice.correction_bias(given, picks_MK)
    yield from groups.groups(given, picks_MK)
    yield from weighing.scores(given, picks_MK)
    if one_branch:
        yield from choice.rounded_logits(given, torch.bfloat16)
    yield from weighing.uses(given, picks_MK)
    yield from choice.counts(given, picks_MK)
    yield from weighing.scale(given, picks_MK)
    yield from choice.router_terms(given, picks_MK)
    if one_branch:
        yield from weighing.other_weights(given)
        yield from choice.rankings(given)
        yield from weighing.final_weights(given)
        if given.dtype is torch.float32:
            yield from choice.rounded_logits(given, torch.float16)
        yield from rounded.router(given)


def _experts(given: Problem, tp: int, layout: Layout | None) -> Iterator[Variant]:
    """Of the routed and of the shared experts."""
    yield from quantised.scales(given, tp)
    yield from experts.rules(given)
    yield from shared.rules(given)
    yield from shared.other_buffers(given, layout)
    yield from activations.activations(given)
    yield from experts.weighed_sides(given)
    yield from shared.gates(given)
    yield from shared.width_and_input(given)
    yield from places.cuts(given, tp)
    yield from places.neighbours(given)
    yield from experts.first_bias(given)
    yield from misread.matrices(given, tp)
    yield from rounded.experts(given, layout)


def _in_both(given: Problem, variants: Sequence[Variant]) -> Iterator[Variant]:
    """The given ones, and each that routed and shared experts can have alike in both: one loader or kernel serves them."""
    kept = [replace(variant, compute=cache(variant.compute)) for variant in variants]
    by_sentence = {variant.sentence: variant for variant in kept}
    for variant in kept:
        yield variant
        sentence = variant.sentence
        twin = by_sentence.get(sentence.replace("the routed experts", "the shared experts"))
        if twin is not None and twin is not variant:
            both = sentence.replace("the routed experts", "the routed and the shared experts")
            yield replace(variant, stage="output", sentence=both, compute=partial(_sum_of, given, variant, twin))


def _sum_of(given: Problem, one: Variant, other: Variant) -> Stages:
    """Two variants at once, one of R and one of S."""
    first, second = one.compute(), other.compute()
    return replace(first, output_MH=first.output_MH + second.output_MH - given.stages.output_MH)
