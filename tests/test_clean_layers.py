"""Right layers in other styles than ours pass, on every model in every dtype; the styles are in clean_layers.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import models
from harness.case import Case, Grid
from harness.check import check
from harness.finding import Verdict
from harness.systems.foreign import ForeignSystem
from tests.clean_layers import STYLES

LAYERS = Path(__file__).with_name("clean_layers.py")
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
