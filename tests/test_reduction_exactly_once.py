"""Every rank's part enters every rank's output exactly once: every model, every TP size, whoever reduces and when.

Claims are made of coefficients, see attribution.py, and of the ledger: as many collectives as the plan announced.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import models
from harness.case import Case, Grid
from harness.execution import run_system
from harness.problem import problem
from harness.systems.legacy import LegacySystem
from harness.systems.runner import RunnerSystem
from tests.attribution import TOLERANCE, attributions
from tests.test_scaling_exactly_once import FEW, TP_SIZES, settings_of

RUNNER, LEGACY = RunnerSystem(), LegacySystem()


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("model", models.names())
@FEW
@given(data=st.data())
def test_each_rank_s_part_enters_each_rank_s_output_once(model: str, tp: int, data: st.DataObject):
    case = Case(model=model, grid=Grid(tp=tp), **data.draw(settings_of(model)))
    tolerance = TOLERANCE[case.dtype]
    for rank, found in enumerate(attributions(case, RUNNER)):
        for part in {name for name, _ in found.factors}:
            shares = [factor for (name, _), factor in found.factors.items() if name == part]
            lawful = case.spec.scale if part in ("routed", "expert bias", "zero") else 1.0
            counted = [share / lawful for share in shares]
            assert max(abs(count - 1.0) for count in counted) <= tolerance, (str(case), rank, part, counted)


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("model", models.names())
@FEW
@given(data=st.data())
def test_all_ranks_return_the_same_bits_and_the_same_ledger(model: str, tp: int, data: st.DataObject):
    drawn = data.draw(settings_of(model)) | {"tokens": data.draw(st.integers(0, 9))}
    case = Case(model=model, grid=Grid(tp=tp), **drawn)
    run = run_system(case, RUNNER, problem(case))
    assert run.broken is None
    for rank in run.ranks[1:]:
        assert torch.equal(rank.output, run.ranks[0].output)
    assert len(set(run.ledger)) == 1
    again = run_system(case, RUNNER, problem(case))
    assert torch.equal(again.ranks[0].output, run.ranks[0].output)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kernel", ["partial", "reduced"])
@pytest.mark.parametrize("model", models.names())
def test_the_ledger_holds_the_all_reduces_that_the_plan_announced(model: str, kernel: str, tp: int):
    case = Case(model=model, grid=Grid(tp=tp), kernel=kernel)
    run = run_system(case, RUNNER, problem(case))
    branches = 2 if case.spec.vision else 1
    by_the_kernel = branches if kernel == "reduced" else 0
    announced = run.ranks[0].layer.plan.all_reduces * branches
    assert len(run.ledger[0]) == announced + by_the_kernel
    assert {entry.op for entry in run.ledger[0]} == {"all_reduce"}
    assert {entry.group for entry in run.ledger[0]} == {"tp"}


# the files whose faults the ledger of known faults lists are claimed in test_known.py
SOUND_FILES = [name for name in models.names() if name not in ("dots1", "aria", "nemotron_h")]


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("model", SOUND_FILES)
def test_the_files_before_the_refactoring_counted_each_part_once(model: str, tp: int):
    for dtype in ("fp32", "fp16"):
        case = Case(model=model, grid=Grid(tp=tp), tokens=33, dtype=dtype)
        for found in attributions(case, LEGACY):
            for (part, _), factor in found.factors.items():
                lawful = case.spec.scale if part in ("routed", "expert bias", "zero") else 1.0
                assert abs(factor - lawful) <= TOLERANCE[dtype] * lawful, (str(case), part, factor)
