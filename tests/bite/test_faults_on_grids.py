"""Wrong layers on grids: each is rejected where it is wrong, passes where it is not, and no sentence blames another fault."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from harness.case import parse, parse_grid
from harness.check import check
from harness.finding import Finding, Verdict
from harness.systems import resolve
from tests.bite import grid_faults
from tests.bite.grid_faults import EVERY, FAULTS, RIGHT, Layer, case_text, legal, standing

GRIDS = (  # noqa: SIM905
    "tp1 tp2 tp4 dp2 tp2.ep2 tp4.ep2 tp4.ep4 ep2.dp2 ep4.dp4 tp2.dp2 tp2.ep2.dp2 tp2.ep4.dp2 tp4.ep4.sp4 tp2.ep4.dp2.sp2"
).split()

# What may stay without a name, by fault: on "all" of its grids, or on those told. Everything else has to be named.
NAMELESS = {
    # the layer stops with an error of its own where dp ranks have different numbers of tokens
    "scatter_in_reverse": "dp2",
    "rows_of_the_next_dp_rank": "ep2.dp2",
    # with two ranks, a rank that lacks its own share returns what is the other's
    "own_answers_forgotten": "ep2.dp2",
    # the second copy of an expert is the layer's own idea: nothing in the law knows it
    "copies_are_junk": "all",
    "copies_of_another": "all",
    # numbers from outside the call: a workspace, the call before, rows of padding
    "unwritten_slots": "all",
    "unwritten_slots_sent": "tp4.ep4 tp2.ep4.dp2",  # every token visits two ranks: a constant
    "stale_window": "all",
    "pad_rows_to_expert_0": "all",
    "rows_split_one_way_joined_another": "all",
    # a rule that one rank alone breaks, beyond those that are tried for each rank
    "stale_bias_on_rank_1": "tp2.ep2 tp4.ep4 tp4.ep2",
    "weights_in_reverse_beyond_rank_0": "all",
    "half_a_shared_piece_lost": "all",
    "previous_tokens_on_rank_1": "all",
    "columns_rolled_on_one_rank": "all",
    "shared_cut_over_tp_rows": "tp2.ep2 tp4.ep4 tp2.ep4.dp2",  # whose rows are whose, without sp in the case, is the layer's own idea
    "partial_in_bf16": "all",
    # two faults at once, one of them no sum of parts
    "wraps_and_shared_per_rank": "all",
    "off_by_one_and_scaled_twice": "all",
}
# Models, grids and dtypes on which these were once blamed on another fault.
ONCE_MISNAMED = (
    ("summed_instead_of_joined", "deepseek_v3", "tp4.ep4.sp4", "fp32"),
    ("padding_left_in", "mixtral", "ep4.dp4.tokens5_1_9_3", "bf16"),
    ("padding_left_in", "gpt_oss", "ep4.dp4.tokens5_1_9_3", "fp32"),
    ("not_summed_below_tp", "mixtral", "tp4.ep8.dp2.tokens2_9", "bf16"),
    ("constant_on_each_rank", "mixtral", "tp2", "bf16"),
    ("constant_on_each_rank", "gpt_oss", "tp2.ep4.dp2", "bf16"),
    ("five_percent_on_one_rank", "mixtral", "tp2", "bf16"),
    ("scattered_without_sum", "mixtral", "tp4.ep4", "bf16"),
    ("scattered_without_sum", "gpt_oss", "tp4.ep4", "fp32"),
    ("sent_once_a_slot", "mixtral", "tp4.ep4", "fp32"),
    ("bias_on_every_piece", "gpt_oss", "tp8.ep2", "bf16"),
)


@functools.cache
def found(name: str, model: str, grid: str, dtype: str = "fp32", *, alone: bool = False) -> Finding:
    """alone: by the case's own tokens; the probe's may show what they do not."""
    case, system = parse(f"{case_text(model, grid)}.{dtype}"), resolve(f"{grid_faults.__file__}:{name}")
    return check(case, system, alone=alone)


@pytest.mark.parametrize("kind", RIGHT)
def test_the_outsiders_right_layer_is_ok_on_every_grid(kind: str):
    for number, grid in enumerate(GRIDS):
        if legal(kind, parse_grid(grid)):
            for step, (dtype, tokens) in enumerate((("fp32", 33), ("bf16", 7), ("fp32", number % 3))):
                model = EVERY[(number + step) % len(EVERY)]
                finding = found(f"right_{kind}", model, f"{grid}.tokens{tokens}", dtype)
                assert finding.verdict is Verdict.OK, f"{finding.case}: {finding.diagnosis}"


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.lawful])
def test_a_fault_changes_nothing_on_the_grids_that_cannot_show_it(name: str):
    fault = FAULTS[name]
    for grid in fault.lawful.split():
        finding = found(name, fault.models[0], grid, alone=True)
        assert finding.verdict is Verdict.OK, f"{finding.case}: {finding.diagnosis}"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_rejected_on_its_grids_and_named_or_nameless_but_never_named_as_another(name: str):
    fault, nameless = FAULTS[name], NAMELESS.get(name, "")
    for grid in fault.shows.split():
        finding = found(name, fault.models[0], grid)
        assert finding.verdict is Verdict.MISMATCH, finding.case
        stands = standing(fault, finding.family, finding.diagnosis)
        allowed = "+?" if nameless == "all" or grid in nameless.split() else "+"
        assert stands in allowed, f"{finding.case}: {fault.says}; named {finding.family}: {finding.diagnosis}"


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if "P1" not in fault.family])
def test_a_fault_on_a_grid_gets_no_wrong_name_in_bf16_and_another_model(name: str):
    fault, number = FAULTS[name], list(FAULTS).index(name)
    grids = fault.shows.split()
    model, grid = fault.models[(number + 1) % len(fault.models)], grids[number % len(grids)]
    finding = found(name, model, grid, "bf16")
    assert finding.verdict is Verdict.MISMATCH, finding.case
    stands = standing(fault, finding.family, finding.diagnosis)
    assert stands in "+?w", f"{finding.case}: {fault.says}; named {finding.family}: {finding.diagnosis}"


@pytest.mark.parametrize(("name", "model", "grid", "dtype"), ONCE_MISNAMED)
def test_a_fault_that_was_once_misnamed_is_named_or_nameless(name: str, model: str, grid: str, dtype: str):
    finding = found(name, model, grid, dtype)
    assert finding.verdict is Verdict.MISMATCH
    assert standing(FAULTS[name], finding.family, finding.diagnosis) in "+?", f"{finding.family}: {finding.diagnosis}"


def test_a_factor_that_is_another_by_accident_of_s_is_told_as_both():
    finding = found("averaged_over_tp", "deepseek_v2", "tp4.tokens33", "fp32+s=real")
    assert finding.family == "B13"
    assert finding.diagnosis.startswith(
        "y = tp*R + 1/tp*S instead of s*R + S (s=16, tp=4): the ranks' partial sums are averaged"
    )
    assert "y = s/tp*R + 1/tp*S is the same at s=16, tp=4" in finding.diagnosis


def test_every_fault_replaces_methods_that_the_right_layer_has():
    for name, fault in FAULTS.items():
        unknown = [method for method in fault.how if not hasattr(Layer, method)]
        assert not unknown, f"{name} replaces {unknown}"


def test_the_faults_cover_the_families_that_only_grids_can_show():
    families = {family for fault in FAULTS.values() for family in fault.family.split()}
    wanted = {f"B{number}" for number in range(1, 15)} - {"B9"}  # a decision that outlives its reason gives B1 or B2
    wanted |= set("F1 F5 F6 F7 F8 F9 G1 G2 G3 G4 G5 G9".split())  # noqa: SIM905
    assert wanted <= families


def test_faults_are_systems_of_the_command_line():
    file = Path(grid_faults.__file__)
    finding = check(parse("deepseek_v3@tp2.ep2"), resolve(f"{file}:shared_self_reduces"))
    assert finding.verdict is Verdict.MISMATCH
    assert f"--system {file}:shared_self_reduces" in finding.repro
