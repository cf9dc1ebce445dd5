"""The worker's part: blocks of case numbers in, a tally out."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable

import torch

from harness.check import check
from harness.finding import Finding, Verdict
from harness.nightly.draw import Drawn, draw
from harness.nightly.numbers import Numbers
from harness.nightly.tally import Tally, again
from harness.nightly.varied import VariedRunner


def judge(drawn: Drawn) -> Finding:
    """What `check` says of a right layer, by the same limits as of any other.

    The labelled probe, which costs as much as the case itself, is not run beside each case: labelled twins are drawn.
    """
    return check(drawn.case, VariedRunner(drawn.way), alone=True)


def prepared(system_name: str) -> Callable[[str], Tally]:
    """For `harness.pool`: what is called with each block of numbers."""
    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(50_000)  # layers are freed by their counts; a collection every 700 objects takes 5 % of the time
    return lambda text: tally(Numbers.parse(text))


def tally(numbers: Numbers) -> Tally:
    """All of them judged; what raises is a defect of ours, and is told as a case that could not run."""
    found = Tally()
    for number in range(numbers.first, numbers.stop):
        drawn = draw(numbers.seed, number, numbers.names)
        try:
            finding = judge(drawn)
        except Exception:
            told = f"a defect of the harness, not of the layer: {traceback.format_exc().strip().splitlines()[-1]}"
            finding = Finding(
                case=str(drawn.case), model=drawn.case.model, system="runner", verdict=Verdict.COULD_NOT_RUN,
                diagnosis=told, repro=again(str(drawn)),
            )  # fmt: skip
        found.add(number, str(drawn), drawn.case.dtype, finding)
    return found
