"""Faults of routing, shared experts, experts and shape: each one's own case is rejected, with its words and its family."""

from __future__ import annotations

import pytest

from harness.case import parse
from harness.check import check
from harness.faults import expert, routing, shape, shared
from harness.faults.fault import FaultyRunner
from harness.finding import Verdict
from harness.systems.runner import RunnerSystem

BY_STAGE = {"D": routing.FAULTS, "E": shared.FAULTS, "F": expert.FAULTS, "G": shape.FAULTS}
FAULTS = {fault.name: fault for faults in BY_STAGE.values() for fault in faults}

# What stays without a family on its own case, and why; everything else has to be named.
NAMELESS = {
    # numbers from outside the call
    "copies_never_loaded", "bias_for_nobody",
    # the call fails, which needs no arithmetic
    "a_row_for_no_rows", "no_rows_refused",
}  # fmt: skip
ROWS = {
    "D": {*range(1, 13), 13, 15},  # 13: how many are chosen; no page routes by hash or to identity experts
    "E": set(range(1, 7)),
    "F": set(range(1, 10)),
    "G": set(range(1, 10)),  # 8 by integers shorter than those of 32 bits
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_rejected_on_its_own_case_and_told_in_its_words(name: str):
    fault = FAULTS[name]
    finding = check(parse(fault.case), FaultyRunner(fault))
    assert finding.verdict is Verdict.MISMATCH, finding.diagnosis
    assert fault.words in finding.diagnosis, finding.diagnosis
    allowed = {None} if name in NAMELESS else {fault.family, *fault.also}
    assert finding.family in allowed, finding.diagnosis


@pytest.mark.parametrize("name", FAULTS)
def test_a_case_that_shows_a_fault_has_what_it_breaks_and_is_ok_without_it(name: str):
    fault, case = FAULTS[name], parse(FAULTS[name].case)
    assert fault.applies(case)
    assert RunnerSystem().supports(case) is None
    assert check(case, RunnerSystem()).verdict is Verdict.OK


@pytest.mark.parametrize("stage", BY_STAGE)
def test_every_family_that_one_layer_can_show_has_a_fault(stage: str):
    families = {fault.family for fault in BY_STAGE[stage]}
    assert {f"{stage}{row}" for row in ROWS[stage]} <= families


def test_names_are_unique_and_every_fault_cites_a_public_thread():
    everything = [fault for faults in BY_STAGE.values() for fault in faults]
    assert len(FAULTS) == len(everything)
    for fault in everything:
        assert fault.references, fault.name
        assert all("#" in thread and "/" in thread for thread in fault.references), fault.name
        assert fault.words, fault.name
