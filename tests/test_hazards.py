"""Layers that are right in their first call and wrong later, or beside other rows: each is found, and no right layer is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness import models
from harness.case import parse
from harness.check import check
from harness.errors import UsageError
from harness.finding import Verdict
from harness.hazards import HazardReport, hazards
from harness.systems import resolve
from tests.bite import state_faults, state_faults_of_the_runner

RUNNER = resolve("runner")
FILE = Path(state_faults.__file__)
GRIDS = ("tp1", "tp4.ep4", "tp2.ep4.dp2+kernel=deepep_ht", "tp4.ep4.sp4", "tp2+placement=moved", "tp2.ep2+swap=reduced")


def told(report: HazardReport) -> str:
    return "; ".join(map(str, report.broken)) or "nothing"


@pytest.mark.parametrize("model", models.names())
def test_no_right_layer_has_a_hazard(model: str):
    for number, grid in enumerate(GRIDS):
        dtype = ("fp32", "bf16", "fp16")[(number + len(model)) % 3]
        head, plus, tail = grid.partition("+")
        try:
            case = parse(f"{model}@{head}.{dtype}{plus}{tail}")
        except UsageError:
            continue  # the grid does not divide the model's widths
        report = hazards(case, RUNNER)
        assert not report.broken, f"{case}: {told(report)}"
    for name in ("legacy", "transformers"):
        report = hazards(parse(f"{model}@bf16"), resolve(name))
        assert not report.broken, f"{name}: {told(report)}"


@pytest.mark.parametrize("name", state_faults.FAULTS)
def test_a_layer_with_a_memory_is_found_and_named_by_its_circumstance(name: str):
    fault = state_faults.FAULTS[name]
    report = hazards(parse(fault.case), resolve(f"{FILE}:{name}"))
    meant = [each for each in report.broken if each.name in fault.named]
    assert meant, f"{fault.says}: {told(report)}"
    for words in fault.words:
        assert any(re.search(words, each.sentence) for each in meant), f"{words!r} is not in: {told(report)}"
    assert fault.family in {each.family for each in meant} | {None}, told(report)
    for case in fault.lawful.split():
        assert not hazards(parse(case), resolve(f"{FILE}:{name}")).broken


@pytest.mark.parametrize("name", state_faults.HARMLESS)
def test_a_right_layer_of_an_outsider_has_no_hazard(name: str):
    report = hazards(parse(state_faults.HARMLESS[name].case), resolve(f"{FILE}:{name}"))
    assert not report.broken, told(report)


@pytest.mark.parametrize("name", state_faults_of_the_runner.FAULTS)
def test_a_runner_with_a_memory_is_found(name: str):
    fault = state_faults_of_the_runner.FAULTS[name]
    report = hazards(parse(fault.case), fault.system(name))
    meant = [each for each in report.broken if each.name == fault.named]
    assert meant, f"{fault.says}: {told(report)}"
    for words in fault.words:
        assert any(re.search(words, each.sentence) for each in meant), f"{words!r} is not in: {told(report)}"
    assert fault.family in {each.family for each in meant} | {None}, told(report)
