"""What runs when nothing is asked for: every model on every grid, and every pair of options that a layer can have together."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from harness import main_job, models
from harness.case import OPTIONS, Case, Grid, parse, parse_grid
from harness.selection import SYSTEMS
from harness.selection import main_job as batches_of
from harness.systems import resolve
from tests.combinations import FACTORS, MODELS, Row, legal_pairs, pairs_of

WIDE = [name for name in models.names() if models.load(name).wide is not None]


@pytest.fixture(scope="module")
def whole() -> list[tuple[str, Case]]:
    return [(batch.system, case) for batch in batches_of(SYSTEMS) for case in batch.cases]


@pytest.fixture(scope="module")
def runner(whole) -> list[Case]:
    return [case for name, case in whole if name == "runner"]


@pytest.mark.parametrize(
    ("system", "tp_sizes"), [("runner", (1, 2, 3, 4, 8)), ("legacy", (1, 2, 3, 4, 8)), ("transformers", (1,))]
)
def test_it_has_every_model_tp_dtype_and_number_of_tokens(whole, system, tp_sizes):
    expected = {
        Case(model=model, grid=Grid(tp=tp), dtype=dtype, tokens=tokens)
        for model, tp, dtype, tokens in product(models.names(), tp_sizes, ("fp32", "bf16", "fp16"), (0, 1, 7, 33))
    }
    assert len(expected) == 26 * len(tp_sizes) * 12
    assert expected <= {case for name, case in whole if name == system}


def test_transformers_is_asked_for_nothing_beyond_one_rank(whole):
    assert {case.grid for name, case in whole if name == "transformers"} == {Grid()}


@pytest.mark.parametrize(("system", "tp_sizes"), [("runner", {1, 2}), ("legacy", {1, 2}), ("transformers", {1})])
def test_the_wide_twins_run_on_two_grids(whole, system, tp_sizes):
    wide = [case for name, case in whole if name == system and case.size == "wide"]
    assert {case.model for case in wide} == set(WIDE)
    assert {case.grid.tp for case in wide} == tp_sizes
    assert len(wide) == len(WIDE) * len(tp_sizes) * 4


def test_every_model_runs_on_every_grid_in_every_dtype(runner):
    expected = set(product(models.names(), map(parse_grid, main_job.GRIDS), main_job.DTYPES))
    assert expected <= {(case.model, case.grid, case.dtype) for case in runner}


def test_the_grids_have_both_ends_of_expert_parallelism_and_the_middle_on_one_and_on_two_data_parallel_ranks():
    grids = list(map(parse_grid, main_job.GRIDS))
    for dp in (1, 2):
        kinds = {
            "none" if g.ep == 1 else "all" if g.ep == g.ranks else "between" for g in grids if (g.dp > 1) == (dp > 1)
        }
        assert kinds >= {"all", "between"}
    assert any(grid.sp > 1 and grid.dp > 1 for grid in grids)
    assert any(models.load(name).twin.routing.num_experts % grid.ep for name in models.names() for grid in grids)
    assert max(grid.ranks for grid in grids) == 8


@pytest.mark.parametrize("model", models.names())
def test_every_model_has_ranks_without_tokens_fewer_rows_than_ranks_and_rows_that_do_not_divide(runner, model):
    mine = [case for case in runner if case.model == model and case.grid.ranks > 1]
    held = [{rows.stop - rows.start for rows in case.rows} for case in mine]
    assert any(0 in counts and max(counts) > 0 for counts in held)
    assert any(case.tokens == 0 and case.grid.dp > 1 for case in mine)
    assert any(case.grid.sp > 1 and 0 < min(counts) < case.grid.sp for case, counts in zip(mine, held, strict=True))
    assert any(
        case.grid.sp > 1 and any(n % case.grid.sp for n in counts) for case, counts in zip(mine, held, strict=True)
    )
    assert any(max(counts) - min(counts) > 1 for counts in held)


@pytest.mark.parametrize("model", MODELS)
def test_every_pair_of_options_that_can_meet_does_in_some_layer_of_the_kind(runner, model):
    """One kind has a scale and shared experts, the other neither; a model that has one of them counts for the second."""
    takers = main_job.COMBINED if model == MODELS[0] else main_job.PLAIN_COMBINED
    assert model in takers
    met = {pair for case in runner if case.model in takers for pair in pairs_of(_row(case))}
    missing = sorted(legal_pairs(model) - met)
    assert missing == [], f"{len(missing)} pairs; write the table again: python -m tests.combinations"


def _row(case: Case) -> Row:
    return {name: str(case.grid) if name == "grid" else getattr(case, name) for name in FACTORS}


def test_each_kind_of_layer_takes_turns_at_the_combinations(runner):
    texts = {*main_job.COMBINATIONS, *main_job.PLAIN_COMBINATIONS}
    turns = Counter(case.model for case in runner if str(case).partition("@")[2].replace(f".{case.dtype}", "") in texts)
    assert set(turns) >= {*main_job.COMBINED, *main_job.PLAIN_COMBINED} == set(models.names())


def test_it_tries_each_value_of_each_option(whole, runner):
    for name, (values, _) in OPTIONS.items():
        skipped = {"size": {"real", "labels"}, "calls": {"every"}, "backend": {"transformers"}}.get(name, set())
        assert {getattr(case, name) for case in runner} == set(values) - skipped, name
    assert "transformers" in {case.backend for name, case in whole if name == "legacy"}


def test_each_real_factor_that_a_twin_replaces_is_tried_too(runner):
    pages = map(models.load, models.names())
    expected = {page.model_type for page in pages if page.real.routing.routed_scaling_factor is not None}
    assert {case.model for case in runner if case.s == "real"} == expected


def test_no_case_comes_twice(whole):
    assert [f"{case} on {system}" for (system, case), count in Counter(whole).items() if count > 1] == []


def test_no_case_is_asked_of_a_system_that_does_not_have_it(whole):
    systems = {name: resolve(name) for name in SYSTEMS}
    refused = [f"{case} on {name}: {why}" for name, case in whole if (why := systems[name].supports(case)) is not None]
    assert refused == []


def test_a_layer_from_outside_is_asked_on_every_grid_and_for_no_option_of_ours():
    system = "my_layer.py:build"
    cases = [case for batch in batches_of([system]) for case in batch.cases]
    assert {str(case.grid) for case in cases} >= set(main_job.GRIDS)
    asked = {name for case in cases for name, (values, _) in OPTIONS.items() if getattr(case, name) != values[0]}
    assert asked == {"size", "s", "calls"}


def test_every_case_can_be_typed_again(whole):
    for case in {case for _, case in whole}:
        assert parse(str(case)) == case
