"""Tokens of images and of text in each other's branch, in models that have one for each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from harness.problem import Problem
from harness.variants.law import Variant, run


def branches(given: Problem) -> Iterator[Variant]:
    """Exchanged, or all tokens taken for one kind."""
    if given.spec.vision is None:
        return
    is_vision_M = given.tokens.is_vision
    assert is_vision_M is not None
    for sentence, wrong_M in (
        ("image tokens take the text branch and text tokens the image branch", ~is_vision_M),
        ("all tokens take the text branch", torch.zeros_like(is_vision_M)),
        ("all tokens take the image branch", torch.ones_like(is_vision_M)),
    ):
        yield Variant("H3", "output", sentence, partial(run, given, is_vision_M=wrong_M))
