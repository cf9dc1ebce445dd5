"""What docs/precision.md says: every placement of s is right, none is much better, and only one of them stays in fp16's range."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from harness.case import DTYPES, Case, Grid, parse
from harness.check import check
from harness.compare import DEVIATION_LIMIT, RUN_LIMIT
from harness.finding import Verdict
from harness.problem import problem
from harness.systems import resolve
from tests import precision
from tests.precision import PLACEMENTS, SCALED, WITH_SHARED, Errors, loud, together

TEXT = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
DENSE = [name for name in PLACEMENTS if name != "w2"]


@functools.cache
def rows(placement: str, dtype: str, quant: str = "none") -> Errors:
    return together(placement, dtype, quant=quant)


def table(under: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = TEXT.partition(f"\n## {under}\n")[2].splitlines()
    below = itertools.dropwhile(lambda line: not line.startswith("| "), lines)
    found = itertools.takewhile(lambda line: line.startswith("| "), below)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found][2:]


@pytest.mark.parametrize(
    ("placement", "quant"), [(name, "none") for name in DENSE] + [(name, "int8") for name in PLACEMENTS]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_layer_is_within_every_limit_wherever_it_scales(placement: str, dtype: str, quant: str) -> None:
    found = rows(placement, dtype, quant)
    assert found.worst("naive") < 1.6 < RUN_LIMIT
    assert found.worst("deviation") < 1.1 < DEVIATION_LIMIT
    assert found.worst("bound") < (0.01 if dtype == "fp32" else 0.2)


@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_placement_has_a_median_error_a_tenth_above_anothers(dtype: str, quant: str) -> None:
    medians = [rows(name, dtype, quant).median("naive") for name in (DENSE if quant == "none" else PLACEMENTS)]
    assert max(medians) < 1.1 * min(medians)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_that_carry_s_save_the_rounding_of_a_scaled_output(dtype: str) -> None:
    assert rows("router", dtype).median("naive") < rows("output", dtype).median("naive")


@pytest.mark.parametrize("placement", DENSE)
def test_the_dtype_decides_about_the_error_and_not_the_placement(placement: str) -> None:
    fp32, bf16, fp16 = (rows(placement, dtype).median("relative") for dtype in ("fp32", "bf16", "fp16"))
    assert 6 < bf16 / fp16 < 10
    assert 1500 < fp16 / fp32 < 3500


def outputs(case: Case, placement: str) -> torch.Tensor:
    given = problem(case)
    return precision.misses(precision.run_placed(case, placement, given), given)


@pytest.mark.parametrize("text", ["deepseek_v2@tp4.fp16.tokens33+s=real", "deepseek_v2@bf16.tokens33+s=real"])
def test_a_factor_that_is_a_power_of_two_gives_the_same_bits_wherever_it_stands(text: str) -> None:
    first, *others = (outputs(parse(text), placement) for placement in DENSE)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_kernel_and_our_router_return_the_same_bits(dtype: str) -> None:
    case = Case(model="deepseek_v3", dtype=dtype, tokens=33, grid=Grid(tp=4))
    assert torch.equal(outputs(case, "kernel"), outputs(case, "router"))
    assert not torch.equal(outputs(case, "output"), outputs(case, "router"))


LOUD = [("deepseek_v2@fp16.tokens33+s=real", 48, "tokens"), ("deepseek_v3@fp16.tokens33", 12000, "w2")]


@pytest.mark.parametrize(("text", "by", "what"), LOUD)
def test_fp16_overflows_in_every_placement_but_the_unit_form_where_s_R_leaves_its_range(text, by, what) -> None:
    case, limit = parse(text), torch.finfo(torch.float16).max
    for placement in ("router", "kernel", "output"):
        found = loud(case, placement, by, what)
        assert found.largest["R"] < limit < found.largest["s*R"]
        assert 0 < sum(found.finite) < 33
        assert max(found.deviations) < DEVIATION_LIMIT  # the rows that stayed in range are right
    unit = loud(case, "unit", by, what)
    assert all(unit.finite)
    assert max(unit.deviations) < DEVIATION_LIMIT


@pytest.mark.parametrize(("text", "by", "what"), LOUD)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_longer_exponents_of_bf16_and_fp32_need_no_unit(dtype, text, by, what) -> None:
    for placement in DENSE:
        found = loud(parse(text.replace("fp16", dtype)), placement, by, what)
        assert all(found.finite)
        assert max(found.deviations) < DEVIATION_LIMIT


def test_no_placement_helps_where_a_product_inside_the_experts_overflows() -> None:
    for placement in DENSE:
        found = loud(parse("deepseek_v3@fp16.tokens33+s=real"), placement, 82, "tokens")
        assert found.largest["y"] < torch.finfo(torch.float16).max
        assert not all(found.finite)


@pytest.mark.parametrize("model", WITH_SHARED)
def test_the_document_says_for_each_model_which_placement_overflows_first(model: str) -> None:
    told = {cells[0]: [float(cell) for cell in cells[1:]] for cells in table("The range of fp16")}
    s, *found = told[model]
    case = Case(model=model, dtype="fp16", tokens=33, s="real")
    assert s == case.spec.scale
    columns = [(what, placement) for what in ("tokens", "w2") for placement in ("router", "output", "unit")]
    for (what, placement), by in zip(columns, found, strict=True):
        assert not all(loud(case, placement, by * 1.06, what).finite)
        assert all(loud(case, placement, by / 1.2, what).finite)


@pytest.mark.parametrize(("heading", "quant"), [("By placement and dtype", "none"), ("Quantised experts", "int8")])
def test_the_document_has_the_errors_of_each_placement_and_dtype(heading: str, quant: str) -> None:
    cells = {(name, dtype): told for name, dtype, *told in table(heading)}
    assert set(cells) == {(name, dtype) for name in (DENSE if quant == "none" else PLACEMENTS) for dtype in DTYPES}
    for (placement, dtype), told in cells.items():
        found = rows(placement, dtype, quant)
        for unit, cell in zip(("naive", "deviation", "bound", "relative"), told, strict=True):
            median, worst = map(float, cell.split(","))
            assert median == pytest.approx(found.median(unit), rel=0.1, abs=1e-3 if unit == "bound" else 0)
            assert worst == pytest.approx(found.worst(unit), rel=0.25, abs=1e-3 if unit == "bound" else 0)


def test_the_tables_are_of_every_model_with_a_factor() -> None:
    assert len(SCALED) == 12
    assert sorted(set(SCALED) - set(WITH_SHARED)) == ["lfm2_moe"]


@pytest.mark.parametrize("scale", ["router", "kernel", "output"])
def test_the_runner_declares_the_unit_in_fp16_and_is_right_with_it(scale: str) -> None:
    case = parse(f"glm4_moe@tp4.fp16.tokens33+s=real.scale={scale}")
    assert check(case, resolve("runner")).verdict is Verdict.OK
