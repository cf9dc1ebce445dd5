"""Right layers in other styles than ours pass, on every model, grid and dtype; the styles are in clean_layers.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import models
from harness.case import Case, Grid, parse
from harness.check import check
from harness.execution import run_system
from harness.finding import Verdict
from harness.problem import problem
from harness.systems.foreign import ForeignSystem
from tests.clean_layers import STYLES

LAYERS = Path(__file__).with_name("clean_layers.py")
SPREAD = [name for name, style in STYLES.items() if style.ranks != "alone"]  # that talk to other ranks than those of tp
GRIDS = (
    "tp2.ep2", "tp4.ep2", "dp2", "tp2.ep4.dp2", "tp2.ep2.sp2", "tp4.ep8.dp2.sp4", "ep2.dp4", "tp3.ep2.dp2",
    "dp2.tokens0_7", "tp2.ep4.dp2.tokens9_2", "tp2.ep2.dp2.tokens1_0", "tp4.ep8.dp2.sp4.tokens5_1", "ep2.dp4.tokens0_3_0_4",
)  # fmt: skip
TP_SIZES = {"slots": (1, 2, 4), "everything_in_dtype": (1, 2, 4), "folded": (1, 4), "units": (2,)}


@pytest.mark.parametrize("model", models.names())
@pytest.mark.parametrize("style", STYLES)
def test_a_right_layer_written_by_others_is_never_accused(style: str, model: str) -> None:
    system = ForeignSystem(f"{LAYERS}:{style}")
    for dtype in ("fp32", "bf16", "fp16"):
        for tp in TP_SIZES.get(style, (1,)):
            tokens = 3 if style == "chain" else 7
            finding = check(Case(model=model, dtype=dtype, tokens=tokens, seed=3, grid=Grid(tp=tp)), system)
            assert finding.verdict is Verdict.OK, f"{finding.case}: {finding.diagnosis}"


@pytest.mark.parametrize("style", STYLES)
def test_a_right_layer_of_others_accepts_no_tokens(style: str) -> None:
    system = ForeignSystem(f"{LAYERS}:{style}")
    assert check(Case(model="deepseek_v3", tokens=0, grid=Grid(tp=2)), system).verdict is Verdict.OK


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("style", SPREAD)
def test_a_right_layer_of_others_is_never_accused_on_any_grid(style: str, grid: str) -> None:
    system = ForeignSystem(f"{LAYERS}:{style}")
    for model in ("deepseek_v3", "gpt_oss", "nemotron_h", "ernie4_5_vl_moe"):
        for dtype in ("fp32", "bf16", "fp16"):
            finding = check(parse(f"{model}@{grid}.{dtype}.seed3"), system)
            assert finding.verdict is Verdict.OK, f"{finding.case}: {finding.diagnosis}"


@pytest.mark.parametrize("style", [style for style in STYLES if style not in (*SPREAD, "chain")])
def test_a_right_layer_that_knows_tp_alone_is_not_accused_of_ignoring_the_grid(style: str) -> None:
    system = ForeignSystem(f"{LAYERS}:{style}")
    for grid in ("tp2.ep4.dp2.tokens9_2", "tp4.ep8.dp2.sp4"):
        finding = check(parse(f"deepseek_v3@{grid}.bf16"), system)
        assert finding.verdict is Verdict.OK, f"{finding.case}: {finding.diagnosis}"


@pytest.mark.parametrize("style", SPREAD)
def test_each_style_on_grids_talks_over_the_groups_that_it_is_there_for(style: str) -> None:
    case = parse("deepseek_v3@tp2.ep4.dp2.tokens3_2")
    run = run_system(case, ForeignSystem(f"{LAYERS}:{style}"), problem(case))
    group, ops = {
        "gathered": ("dp", {"all_gather", "reduce_scatter"}), "sent": ("ep", {"all_to_all_single"}), "rows": ("ep", {"all_to_all"}),
    }[style]  # fmt: skip
    for entries in run.ledger:
        assert ops == {entry.op for entry in entries if entry.group == group}
        assert "tp" in {entry.group for entry in entries}
