"""The routed scaling factor enters the routed part once and the shared part never: every layer with s, every grid.

Claims are made of coefficients: the output of each rank is fitted on the parts of all ranks, see attribution.py.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import models
from harness.case import OPTIONS, Case, Grid, parse, parse_grid
from harness.execution import run_system
from harness.problem import problem
from harness.systems.runner import RunnerSystem
from tests.attribution import TOLERANCE, attributions
from tests.bite import faulty
from tests.drawn_layers import NAMES, case_of, cases

RUNNER = RunnerSystem()
WITH_S = tuple(name for name in NAMES if case_of(name).spec.scale != 1.0)
S = models.load("deepseek_v3").twin.scale
SCALED = ("routed", "expert bias", "zero")  # what the law multiplies by s
# all layers share the work: each looks at two thirds of what the profile asks for
SHARE = settings(max_examples=settings().max_examples * 2 // 3)
WHO = ("router", "kernel", "output")


@pytest.mark.parametrize("name", WITH_S)
@SHARE
@given(data=st.data())
def test_s_enters_the_routed_part_once_and_the_shared_part_never(name: str, data: st.DataObject):
    case = data.draw(cases(name))
    s, tolerance = case.spec.scale, TOLERANCE[case.dtype]
    for rank, found in attributions(case, RUNNER).items():
        for (part, shard), factor in found.factors.items():
            lawful = s if part in SCALED else 1.0
            assert abs(factor - lawful) <= tolerance * lawful, (str(case), rank, part, shard, factor)


@pytest.mark.parametrize("model", [name for name in models.names() if models.load(name).twin.scale != 1.0])
@pytest.mark.parametrize("grid", ["tp2", "tp2.ep4.dp2"])
def test_the_model_s_own_factor_is_applied_like_the_twin_s(grid: str, model: str):
    case = Case(model=model, grid=parse_grid(grid), tokens=33, s="real")
    real = models.load(model).real.routing.routed_scaling_factor
    assert case.spec.scale == real
    found = attributions(case, RUNNER)
    assert len(found) == case.grid.ranks
    for each in found.values():
        assert abs(each.factors["routed", 1] - real) <= 1e-3 * real


def test_twins_use_factors_whose_products_with_tp_stay_apart():
    for name in models.names():
        s = models.load(name).twin.routing.routed_scaling_factor
        assert s in (None, 2.5, 2.4375), name


@pytest.mark.parametrize("kernel", OPTIONS["kernel"][0])
@pytest.mark.parametrize("scale", WHO)
def test_whoever_scales_the_output_is_the_same_up_to_rounding(scale: str, kernel: str):
    case = parse(f"deepseek_v3@tp2.ep4.dp2.tokens20_13+scale={scale}.kernel={kernel}")
    expected = problem(case).stages.output_MH
    for rank in run_system(case, RUNNER, problem(case)).ranks:
        error = (rank.output.double() - expected[rank.rows]).norm(dim=1) / expected[rank.rows].norm(dim=1)
        assert error.max() < 2e-6


@pytest.mark.parametrize(
    ("on_routed", "on_shared", "routed", "shared"),
    [
        (lambda s: s * s, lambda s: 1.0, S * S, 1.0),  # twice
        (lambda s: 1.0, lambda s: 1.0, 1.0, 1.0),  # never
        (lambda s: s, lambda s: s, S, S),  # (R + S) * s
    ],
    ids=["twice", "never", "on both"],
)
@pytest.mark.parametrize("grid", ["tp1", "tp3", "tp4.ep2", "tp2.ep4.dp2", "tp2.ep2.sp2"])
def test_the_fit_sees_a_factor_that_is_not_lawful(grid: str, on_routed, on_shared, routed: float, shared: float):
    case = Case(model="deepseek_v3", grid=parse_grid(grid), tokens=40, scale="router")
    found = attributions(case, faulty.Faulty(faulty.scaling(on_routed, on_shared)))
    assert len(found) == case.grid.ranks
    for each in found.values():
        for (part, _), factor in each.factors.items():
            assert abs(factor - {"routed": routed, "shared": shared}[part]) < 1e-3


def test_a_factor_of_one_stands_in_no_router_kernel_or_runner():
    for scale in WHO:
        for model in ("mixtral", "glm4_moe"):
            case = Case(model=model, scale="page" if model == "mixtral" else scale, grid=Grid(tp=2))
            (layer, _) = (rank.layer for rank in run_system(case, RUNNER, problem(case)).ranks)
            assert layer.plan.scaled_by == (() if model == "mixtral" else ({"output": "runner"}.get(scale, scale),))
