"""The routed scaling factor enters the routed part once and the shared part never: every model, every TP size.

Claims are made of coefficients: the output of each rank is fitted on the parts of all ranks, see attribution.py.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import models
from harness.case import Case, Grid
from harness.execution import run_system
from harness.problem import problem
from harness.systems.runner import RunnerSystem
from tests.attribution import TOLERANCE, attributions

RUNNER = RunnerSystem()
TP_SIZES = (1, 2, 3, 4, 8)
# 130 items share the work: each looks at a sixth of what the profile asks for
FEW = settings(max_examples=max(4, settings().max_examples // 6))


def settings_of(model: str) -> st.SearchStrategy[dict[str, object]]:
    """Everything that may change who scales, and must not change how often."""
    page = models.load(model)
    scaled = page.twin.routing.routed_scaling_factor is not None
    return st.fixed_dictionaries(
        {
            "tokens": st.integers(8, 40),
            "seed": st.integers(0, 2),
            "dtype": st.sampled_from(("fp32", "bf16", "fp16")),
            "scale": st.sampled_from(("page", "router", "kernel", "output") if scaled else ("page",)),
            "kernel": st.sampled_from(("partial", "reduced")),
            "order": st.sampled_from(("1", "2", "3") if page.twin.shared else ("1",)),
            "pad": st.sampled_from(("0", "8")),
        }
    )


@pytest.mark.parametrize("tp", TP_SIZES)
@pytest.mark.parametrize("model", models.names())
@FEW
@given(data=st.data())
def test_s_enters_the_routed_part_once_and_the_shared_part_never(model: str, tp: int, data: st.DataObject):
    case = Case(model=model, grid=Grid(tp=tp), **data.draw(settings_of(model)))
    s, tolerance = case.spec.scale, TOLERANCE[case.dtype]
    for rank, found in enumerate(attributions(case, RUNNER)):
        for (part, shard), factor in found.factors.items():
            lawful = s if part in ("routed", "expert bias", "zero") else 1.0
            assert abs(factor - lawful) <= tolerance * max(1.0, lawful), (str(case), rank, part, shard, factor)


@pytest.mark.parametrize("model", [name for name in models.names() if models.load(name).twin.scale != 1.0])
def test_the_model_s_own_factor_is_applied_like_the_twin_s(model: str):
    case = Case(model=model, grid=Grid(tp=2), tokens=33, s="real")
    real = models.load(model).real.routing.routed_scaling_factor
    assert case.spec.scale == real
    for found in attributions(case, RUNNER):
        assert abs(found.factors["routed", 1] - real) <= 1e-3 * real


def test_twins_use_factors_whose_products_with_tp_stay_apart():
    for name in models.names():
        s = models.load(name).twin.routing.routed_scaling_factor
        assert s in (None, 2.5, 2.4375), name


@pytest.mark.parametrize("scale", ["router", "kernel", "output"])
def test_whoever_scales_the_output_is_the_same_up_to_rounding(scale: str):
    case = Case(model="deepseek_v3", grid=Grid(tp=3), tokens=33, scale=scale)
    expected = problem(case).stages.output_MH
    for rank in run_system(case, RUNNER, problem(case)).ranks:
        error = (rank.output.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 2e-6
