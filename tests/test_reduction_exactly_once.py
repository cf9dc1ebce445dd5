"""Every rank's part enters every rank's output exactly once: every layer, every grid, whoever moves and reduces it, and when.

Claims are made of coefficients, see attribution.py, and of the ledger: the collectives that the plan announced.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import models
from harness.case import Case, Grid, parse_grid
from harness.check import check
from harness.execution import run_system
from harness.finding import Verdict
from harness.problem import problem
from harness.systems.legacy import LegacySystem
from harness.systems.runner import RunnerSystem
from tests.attribution import FEWEST, TOLERANCE, attributions, decided
from tests.bite import faulty
from tests.drawn_layers import NAMES, cases
from tests.test_scaling_exactly_once import SCALED

RUNNER, LEGACY = RunnerSystem(), LegacySystem()
# all layers share the work: each looks at a part of what the profile asks for
SHARE = settings(max_examples=max(4, settings().max_examples // 4))
FEW = settings(max_examples=max(4, settings().max_examples // 10))


@pytest.mark.parametrize("name", NAMES)
@SHARE
@given(data=st.data())
def test_each_rank_s_part_enters_each_rank_s_output_once(name: str, data: st.DataObject):
    case = data.draw(cases(name))
    tolerance = TOLERANCE[case.dtype]
    for rank, found in attributions(case, RUNNER).items():
        for (part, shard), factor in found.factors.items():
            counted = factor / (case.spec.scale if part in SCALED else 1.0)
            assert abs(counted - 1.0) <= tolerance, (str(case), rank, part, shard, counted)


@pytest.mark.parametrize("name", NAMES)
@SHARE
@given(data=st.data())
def test_ranks_with_the_same_tokens_return_the_same_bits_and_so_does_a_second_run(name: str, data: st.DataObject):
    case = data.draw(cases(name))
    given_problem = problem(case)
    run, again = (run_system(case, RUNNER, given_problem) for _ in range(2))
    assert run.broken is None, (str(case), run.broken)
    assert run.ledger == again.ledger
    for rank, (out, twice) in enumerate(zip(run.ranks, again.ranks, strict=True)):
        first = run.ranks[rank - rank % case.grid.tp]
        assert torch.equal(out.output, first.output), (str(case), rank)
        assert torch.equal(out.output, twice.output), (str(case), rank)
        made = [(entry.op, entry.group) for entry in run.ledger[rank]]
        assert made == out.layer.announced, (str(case), rank)


@pytest.mark.parametrize("name", NAMES)
@SHARE
@given(data=st.data())
def test_whatever_is_drawn_is_right_by_the_rule_that_judges_every_layer(name: str, data: st.DataObject):
    finding = check(data.draw(cases(name)), RUNNER)
    assert finding.verdict is Verdict.OK, (finding.case, finding.diagnosis)


# every source of these layers, and how many ranks hold a share of it: R and its biases by rank, S by tp rank
SOURCES = {
    "deepseek_v3@tp4": {"routed": 4, "shared": 4},
    "deepseek_v3@tp4.ep2": {"routed": 4, "shared": 4},
    "deepseek_v3@tp2.ep4.dp2": {"routed": 4, "shared": 2},
    "deepseek_v3@tp2.dp2": {"routed": 4, "shared": 2},
    "gpt_oss@tp2.ep2.dp2": {"routed": 4, "expert bias": 2},
    "gpt_oss@tp2.ep4.dp2": {"routed": 4, "expert bias": 4},
    "nemotron_h@tp2.ep2": {"routed": 2, "shared": 2, "latent bias": 1, "shared bias": 1},
}


@pytest.mark.parametrize(("text", "sources"), SOURCES.items(), ids=list(SOURCES))
def test_the_fit_has_a_coefficient_for_every_share_of_every_source(text: str, sources: dict[str, int]):
    model, _, grid = text.partition("@")
    case = Case(model=model, grid=parse_grid(grid), tokens=66)
    found = attributions(case, RUNNER)
    assert len(found) == case.grid.ranks
    for each in found.values():
        names = [part for part, _ in each.factors]
        assert {part: names.count(part) for part in names} == sources


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_only_ranks_with_one_or_two_clear_tokens_are_left_out_of_the_fit(name: str, data: st.DataObject):
    case = data.draw(cases(name))
    found, rows = attributions(case, RUNNER), problem(case)
    for rank, out in enumerate(run_system(case, RUNNER, rows).ranks):
        assert rank in found or len(decided(rows, RUNNER, out)) < FEWEST, (str(case), rank)


@pytest.mark.parametrize("grid", ["tp2", "tp3", "tp4.ep2", "tp4.ep4"])
def test_the_fit_sees_each_part_that_is_counted_tp_times(grid: str):
    case = Case(model="deepseek_v3", grid=parse_grid(grid), tokens=40, scale="router")
    for plant, shared in ((faulty.all_reduced_twice, case.grid.tp), (faulty.shared_summed_per_rank, case.grid.tp)):
        routed = case.spec.scale * (case.grid.tp if plant is faulty.all_reduced_twice else 1)
        for each in attributions(case, faulty.Faulty(plant)).values():
            for (part, _), factor in each.factors.items():
                assert abs(factor - (routed if part == "routed" else shared)) < 1e-2


@pytest.mark.parametrize("grid", ["tp2", "tp4.ep2", "tp2.ep2.dp2"])
def test_the_fit_sees_which_shares_a_rank_alone_has(grid: str):
    case = Case(model="deepseek_v3", grid=parse_grid(grid), tokens=66)
    for rank, each in attributions(case, faulty.Faulty(faulty.NOTHING_REDUCED)).items():
        for shard in range(case.grid.tp):
            expected = 1.0 if shard == rank % case.grid.tp else 0.0
            assert abs(each.factors["shared", shard] - expected) < 1e-3, (rank, shard)


# the files whose faults the ledger of known faults lists are claimed in test_known.py
SOUND_FILES = [name for name in models.names() if name not in ("dots1", "aria", "nemotron_h")]


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("model", SOUND_FILES)
def test_the_files_before_the_refactoring_counted_each_part_once(model: str, tp: int):
    for dtype in ("fp32", "fp16"):
        case = Case(model=model, grid=Grid(tp=tp), tokens=33, dtype=dtype)
        for found in attributions(case, LEGACY).values():
            for (part, _), factor in found.factors.items():
                lawful = case.spec.scale if part in SCALED else 1.0
                assert abs(factor - lawful) <= TOLERANCE[dtype] * lawful, (str(case), part, factor)
