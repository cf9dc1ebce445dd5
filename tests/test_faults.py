"""The bank of faults: each is shown by its own case, the verb counts what happens, and equivalent ones are told from missed ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from harness.case import Grid, parse
from harness.check import check
from harness.errors import UsageError
from harness.faults.bank import bank, by_name, chosen, placements
from harness.faults.equivalence import equivalent
from harness.faults.fault import Fault, FaultyRunner
from harness.faults.plant import answering
from harness.faults.verb import Placed, faults, planted, summary_of
from harness.finding import Verdict
from harness.systems.runner import RunnerSystem

# rows of the families that one layer of the 26 pages can show
ROWS = (  # noqa: SIM905
    "A1 A2 A3 A4 A5 A6 B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12 C1 C2 C4 C5"
).split()


@pytest.mark.parametrize("fault", bank(), ids=str)
def test_each_fault_is_found_in_its_own_case_and_told_in_its_words(fault: Fault):
    case = parse(fault.case)
    assert RunnerSystem().supports(case) is None
    assert fault.applies(case)
    finding = check(case, FaultyRunner(fault))
    assert finding.verdict is Verdict.MISMATCH
    assert fault.words in finding.diagnosis, finding.diagnosis
    assert finding.stage in ("call", "collectives") or finding.family in (None, fault.family, *fault.also)


def test_every_row_of_scale_reduce_and_order_has_a_fault():
    assert set(ROWS) <= {fault.family for fault in bank()}


@pytest.mark.parametrize("fault", bank(), ids=str)
def test_each_fault_changes_something_and_says_where_it_was_seen(fault: Fault):
    assert any((fault.spec, fault.weights, fault.layer, fault.block))
    assert fault.references
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", reference) for reference in fault.references)


def test_a_sum_over_one_rank_may_be_left_out_and_one_over_two_may_not():
    fault = by_name()["nothing_reduced"]
    assert "one rank: nothing to reduce" in str(equivalent(parse("deepseek_v3@tp1"), fault))
    assert equivalent(parse("deepseek_v3@tp2"), fault) is None


def test_a_fault_that_shows_with_other_tokens_alone_is_not_equivalent():
    fault = replace(
        by_name()["nothing_reduced"], layer=answering(lambda y, x, layer, comm: y if len(y) < 20 else 2 * y)
    )
    assert equivalent(parse("deepseek_v3@tp1.tokens7"), fault) is None


def test_a_placement_is_named_misnamed_missed_or_equivalent():
    fault, case = by_name()["nothing_reduced"], parse("deepseek_v3@tp4")
    assert planted(fault, case).outcome == "named"
    assert planted(replace(fault, family="B3", also=()), case).outcome == "misnamed"
    assert planted(fault, parse("deepseek_v3@tp1")).outcome == "equivalent"
    tiny = replace(fault, layer=answering(lambda y, x, layer, comm: y * (1 + 1e-9)))
    assert planted(tiny, case).outcome == "missed"
    odd = replace(fault, layer=answering(lambda y, x, layer, comm: y.sin() + y.abs().sqrt()))
    assert planted(odd, case).outcome == "unknown"


def test_a_layer_that_stops_is_named_by_the_words_alone():
    fault, case = by_name()["padding_never_cut"], parse("mixtral@tp2+pad=8")
    assert planted(fault, case).outcome == "named"
    assert planted(replace(fault, words="a word that is not there"), case).outcome == "unknown"


def told(outcome: str, *, as_told: bool = True) -> Placed:
    return Placed(
        fault="nothing_reduced", case="deepseek_v3@tp4", outcome=outcome, family=None, diagnosis="", as_told=as_told
    )


@pytest.mark.parametrize(
    "placed", [[told("missed")] * 2, [told("misnamed")], [told("unknown")] * 6, [told("named", as_told=False)]]
)
def test_a_missed_a_misnamed_and_too_many_unknown_placements_break_the_limits(placed: list[Placed]):
    named = [told("named")] * 100
    assert summary_of([*named, told("equivalent"), told("unknown")], 1.0)["passed"]
    assert not summary_of([*named, *placed], 1.0)["passed"]


def test_an_equivalent_placement_counts_neither_as_found_nor_as_missed():
    summary = summary_of([told("equivalent"), told("named")], 1.0)
    assert (summary["planted"], summary["found"], summary["equivalent"], summary["missed"]) == (2, 1, 1, 0)


def test_a_name_that_no_fault_has_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="unknown fault 'nothing_reducd': nearest: nothing_reduced"):
        chosen(["nothing_reducd"])


def test_faults_without_a_place_on_the_asked_grids_are_refused():
    with pytest.raises(UsageError, match=r"none of the 1 chosen faults has a place there"):
        faults(["shared_cut_although_rows_are_apart"], models=None, grids=[Grid(tp=2)], jobs=0, as_json=True)


def test_an_asked_grid_comes_with_the_options_that_the_fault_needs():
    fault = by_name()["decision_kept_from_the_first_call"]
    cases = placements(fault, ["deepseek_v3"], [Grid(tp=4, ep=2)])
    assert "deepseek_v3@tp4.ep2+kernel=reduced.swap=partial" in map(str, cases)
    assert all(case.swap != "none" and case.grid == Grid(tp=4, ep=2) for case in cases)


def test_the_verb_prints_one_line_a_fault_and_a_summary(capsys: pytest.CaptureFixture[str]):
    names = ["fp16_form_without_shared_experts", "latent_projection_ahead_of_the_sum"]
    assert faults(names, models=["lfm2_moe", "nemotron_h"], grids=None, jobs=0, as_json=True) == 0
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["fault"] for line in lines] == names
    assert last["summary"]["faults"] == 2
    assert last["summary"]["misnamed"] == 0
    assert last["summary"]["bars"]["C4"]["moe-harness"][0] == 0
