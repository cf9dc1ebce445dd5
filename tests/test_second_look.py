"""What nothing explains is asked again: whether the layer repeats itself, needs its neighbours, keeps its weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from harness.case import parse
from harness.check import check
from harness.finding import Verdict
from harness.systems.runner import RunnerSystem


class _Spoilt(RunnerSystem):
    """A right layer whose output is changed; each build has a number of its own."""

    name, foreign = "spoilt", True

    def __init__(self, change):
        self._change, self._builds = change, itertools.count()

    def build(self, case, weights, comm):
        layer, number, rank = super().build(case, weights, comm), next(self._builds), comm.rank

        def forward(x_MH, **inputs):
            return self._change(layer(x_MH, **inputs), x_MH, weights, number, rank)

        return forward


def _noisy(y, x, weights, number, rank):
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(number))
    return y + 0.2 * noise.to(y.dtype)


def _mixed(y, x, weights, number, rank):
    return y + 0.2 * (y - y.mean(0, keepdim=True)).sin() if len(y) > 1 else y


def _written(y, x, weights, number, rank):
    weights["w2"].mul_(1.01)
    return y + 0.2 * y.cos()


def _raising_later(y, x, weights, number, rank):
    if number >= 4:
        raise RuntimeError("out of slots")
    return y + 0.2 * y.cos()


def _same_each_time(y, x, weights, number, rank):
    return y + 0.2 * y.cos()


SEEN = {
    "another output each time": (_noisy, "it does not repeat itself: the same call on a new layer gives other rows (token"),
    "mixes its rows": (_mixed, "a row depends on what else its call holds: token"),
    "writes into its weights": (_written, "it writes into the weights that it was given: w2"),
    "fails the second time": (_raising_later, "asked again, it fails: RuntimeError: out of slots"),
    "wrong alike each time": (_same_each_time, "unknown: neither a sum of the parts"),
}  # fmt: skip


@pytest.mark.parametrize("case", ["deepseek_v3@tp2", "mixtral@tp2.bf16.tokens5", "qwen3_next@dp2.tokens3_4"])
@pytest.mark.parametrize("name", SEEN)
def test_what_nothing_explains_is_asked_again(name: str, case: str):
    change, words = SEEN[name]
    finding = check(parse(case), _Spoilt(change), alone=True)
    assert finding.verdict is Verdict.MISMATCH
    ranks = parse(case).grid.ranks
    if name == "fails the second time" and ranks < 4:  # two builds of two ranks come before the third
        words = "unknown: neither a sum of the parts"
    assert finding.diagnosis.startswith(words), finding.diagnosis
    assert "rows wrong, worst token" in finding.diagnosis
