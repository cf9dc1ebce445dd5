"""Routers and experts, certified apart from the runner: labelled layers of every model, and every class of token numbers.

The states of the runner are run with labels in the place of experts and with one saturated router. What is left to show
is that the real ones do what the labels stand for: each model's routing, activation and layout of weights, cut over grids.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

from harness import models
from harness.case import KERNELS, parse
from harness.errors import UsageError

LABELLED_GRIDS = ("tp1", "tp2", "tp3", "tp4", "tp8", "tp4.ep2", "tp4.ep4", "tp2.ep4.dp2", "ep4.dp4", "tp4.ep4.sp4")
DTYPES = ("fp32", "bf16", "fp16")
EXPERTS = ("slots", "batched", "monolithic")
TOKENS = ("0", "1", "2", "33", "130")  # none, one, fewer and more than ranks, more than a block of 128
SPLITS = ("5_0", "0_1")
RIGHT = ("exact", "rounded", "ok")


def cases() -> tuple[str, ...]:
    """The same for every model. Labelled cases show coefficients; those with tokens are compared with the oracle."""
    ends = [f"{grid}.{dtype}+size=labels" for grid, dtype in _product(LABELLED_GRIDS, DTYPES)]
    ends += [f"{grid}.fp32+size=labels.experts={kind}" for grid, kind in _product(LABELLED_GRIDS, EXPERTS)]
    ends += [f"tp2.ep4.dp2.{dtype}+size=labels.kernel={kernel}" for dtype, kernel in _product(DTYPES, KERNELS[1:])]
    ends += [f"{grid}.tokens{tokens}" for grid, tokens in _product(("tp2", "tp4.ep4.sp4", "tp2.ep4.dp2"), TOKENS)]
    ends += [f"tp2.ep4.dp2.tokens{split}+kernel={kernel}" for split, kernel in _product(SPLITS, KERNELS)]
    return tuple(f"{model}@{end}" for model, end in itertools.product(models.names(), ends))


def _product(*values: tuple[str, ...]) -> itertools.product[tuple[str, ...]]:
    return itertools.product(*values)


def prepared(system_name: str) -> Callable[[str], tuple[str, str]]:
    """For a worker: case -> verdict and, if it is not one of RIGHT, what is told of it."""
    import torch

    from harness.check import check
    from harness.probe import probe
    from harness.systems import resolve

    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(50_000)  # as in `verb.prepared`
    system = resolve(system_name)

    def run(text: str) -> tuple[str, str]:
        try:
            case = parse(text)
        except UsageError as error:
            return "refused", str(error)
        if case.size == "labels":
            found = probe(case, system)
            return found.verdict, found.sentence
        finding = check(case, system, alone=True)  # labelled cases are pieces of their own
        return finding.verdict.value, finding.diagnosis

    return run
