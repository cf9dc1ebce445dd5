"""Scaling and reduction exactly once on every grid: who was counted how often, read off the outputs alone.

Hypothesis draws grid, kernel, experts, placement, tokens of each data-parallel rank, order, swap, micro-batches, junk and
who makes the final reduction; each source has its lawful factor in every rank's output, and the ledger shows what the
plan announced.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness import models
from harness.case import OPTIONS, Case, Grid
from harness.check import check
from harness.errors import UsageError
from harness.finding import Verdict
from harness.systems import resolve
from tests.attribution import TOLERANCE, attributions

RUNNER = resolve("runner")
DRAWN = tuple(name for name in OPTIONS if name not in ("size", "s", "backend"))
SIZES = st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (2, 3), (4, 2), (8, 1), (3, 1), (1, 3)])


@st.composite
def cases(draw: st.DrawFn, model: str) -> Case:
    """A case on more than one rank that the runner has; few options differ from their default at a time."""
    tp, dp = draw(SIZES)
    whole = draw(st.booleans())
    divisors = [n for n in range(1, tp * dp + 1) if tp * dp % n == 0]
    ep = tp * dp if whole else draw(st.sampled_from(divisors))
    sp = tp if whole and draw(st.booleans()) else 1
    rows = tuple(draw(st.integers(0, 9)) for _ in range(dp))
    names = draw(st.lists(st.sampled_from(DRAWN), max_size=3, unique=True))
    options = {name: draw(st.sampled_from(OPTIONS[name][0])) for name in names}
    try:
        case = Case(
            model=model, grid=Grid(tp=tp, ep=ep, dp=dp, sp=sp), dtype=draw(st.sampled_from(["fp32", "fp32", "bf16"])),
            tokens=sum(rows), split=rows, seed=draw(st.integers(0, 99)), **options,  # type: ignore[arg-type]
        )  # fmt: skip
    except UsageError:
        assume(False)
        raise
    assume(RUNNER.supports(case) is None)
    return case


@pytest.mark.parametrize("model", models.names())
@settings(max_examples=8)
@given(data=st.data())
def test_each_source_enters_each_rank_s_output_once_with_its_lawful_factor(model: str, data: st.DataObject):
    case = data.draw(cases(model))
    s, tolerance = case.spec.scale, TOLERANCE[case.dtype]
    for rank, found in attributions(case, RUNNER).items():
        for (part, shard), factor in found.factors.items():
            lawful = s if part in ("routed", "expert bias", "zero") else 1.0
            assert abs(factor - lawful) <= tolerance * max(1.0, lawful), (str(case), rank, part, shard, factor)


@pytest.mark.parametrize("model", models.names())
@settings(max_examples=12)
@given(data=st.data())
def test_output_and_ledger_are_right_whatever_is_drawn(model: str, data: st.DataObject):
    finding = check(data.draw(cases(model)), RUNNER)
    assert finding.verdict is Verdict.OK, (finding.case, finding.diagnosis)
