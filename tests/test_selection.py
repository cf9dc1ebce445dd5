"""What a request means: the main job whole, parts of it exactly, and nothing at all refused."""

from __future__ import annotations

import contextlib
from collections import Counter
from itertools import product

import pytest

from harness import models
from harness.case import OPTIONS, Case, Grid, parse
from harness.errors import UsageError
from harness.selection import SYSTEMS, Batch, Request, main_job, of_cases, select

WIDE = [name for name in models.names() if models.load(name).wide is not None]


def flat(batches: list[Batch]) -> list[tuple[str, Case]]:
    return [(batch.system, case) for batch in batches for case in batch.cases]


@pytest.fixture(scope="module")
def whole() -> list[tuple[str, Case]]:
    return flat(main_job(SYSTEMS))


@pytest.mark.parametrize(
    ("system", "tp_sizes"), [("runner", (1, 2, 3, 4, 8)), ("legacy", (1, 2, 3, 4, 8)), ("transformers", (1,))]
)
def test_the_main_job_has_every_model_tp_dtype_and_number_of_tokens(whole, system, tp_sizes):
    expected = {
        Case(model=model, grid=Grid(tp=tp), dtype=dtype, tokens=tokens)
        for model, tp, dtype, tokens in product(models.names(), tp_sizes, ("fp32", "bf16", "fp16"), (0, 1, 7, 33))
    }
    assert len(expected) == 26 * len(tp_sizes) * 12
    assert expected <= {case for name, case in whole if name == system}


def test_transformers_is_asked_for_nothing_beyond_tp_one(whole):
    assert {case.grid.tp for name, case in whole if name == "transformers"} == {1}


@pytest.mark.parametrize(("system", "tp_sizes"), [("runner", {1, 2}), ("legacy", {1, 2}), ("transformers", {1})])
def test_the_main_job_has_the_wide_twins_at_two_grids(whole, system, tp_sizes):
    wide = [case for name, case in whole if name == system and case.size == "wide"]
    assert {case.model for case in wide} == set(WIDE)
    assert {case.grid.tp for case in wide} == tp_sizes
    assert len(wide) == len(WIDE) * len(tp_sizes) * 4


def test_the_main_job_tries_each_way_to_place_scale_reduction_and_shared_experts(whole):
    runner = [case for name, case in whole if name == "runner"]
    for name, (values, _) in OPTIONS.items():
        skipped = {"size": {"real"}, "backend": {"transformers"}}.get(name, set())
        assert {getattr(case, name) for case in runner} == set(values) - skipped, name
    assert "transformers" in {case.backend for name, case in whole if name == "legacy"}


def test_each_real_factor_that_a_twin_replaces_is_tried_too(whole):
    real = {case.model for name, case in whole if name == "runner" and case.s == "real"}
    pages = map(models.load, models.names())
    assert real == {page.model_type for page in pages if page.real.routing.routed_scaling_factor is not None}


def test_no_case_of_the_main_job_comes_twice(whole):
    twice = [f"{case} on {system}" for (system, case), count in Counter(whole).items() if count > 1]
    assert twice == []


def test_every_selected_case_can_be_typed_again(whole):
    for case in {case for _, case in whole}:
        assert parse(str(case)) == case


def test_nothing_asked_for_means_the_main_job_and_a_system_means_its_part():
    assert select(Request()) == main_job(SYSTEMS)
    assert select(Request(systems=("legacy",))) == main_job(("legacy",))
    assert flat(select(Request(systems=("x.py:build",)))) != []


def test_a_request_is_the_product_of_what_it_names():
    request = Request(
        systems=("runner",), models=("mixtral", "olmoe"), tp=(1, 2), dtypes=("bf16",), tokens=(0, 5), seeds=(3, 4),
        options=(("kernel", ("partial", "reduced")),),
    )  # fmt: skip
    expected = [
        ("runner", Case(model=model, grid=Grid(tp=tp), dtype="bf16", tokens=tokens, seed=seed, kernel=kernel))
        for model, tp, tokens, seed, kernel in product(
            ("mixtral", "olmoe"), (1, 2), (0, 5), (3, 4), ("partial", "reduced")
        )
    ]
    found = flat(select(request))
    assert len(found) == len(expected) == 32
    assert set(found) == set(expected)


def test_what_a_request_leaves_open_is_filled_as_in_the_main_job():
    found = flat(select(Request(models=("mixtral",))))
    assert len(found) == (5 + 5 + 1) * 12
    assert {case.dtype for _, case in found} == {"fp32", "bf16", "fp16"}
    assert {case.tokens for _, case in found} == {0, 1, 7, 33}


def test_a_size_or_factor_selects_the_models_that_have_it():
    wide = flat(select(Request(tp=(1,), options=(("size", ("wide",)),))))
    assert {case.model for _, case in wide} == set(WIDE)
    real = flat(select(Request(tp=(1,), options=(("s", ("real",)),))))
    assert {case.model for _, case in real} < set(models.names())


def test_a_size_that_some_tp_does_not_divide_is_run_at_those_that_do():
    """Nobody typed tp=3: the default must be sizes that fit, as it is for transformers."""
    found = flat(select(Request(systems=("runner",), options=(("size", ("wide",)),))))
    assert {case.grid.tp for _, case in found} == {1, 2, 4, 8}


def test_a_layer_of_real_size_is_refused_before_its_weights_are_made():
    with pytest.raises(UsageError, match=r"its 1\.4 billion weights .* Leave size out for the twin$"):
        select(Request(models=("mixtral",), tp=(1,), options=(("size", ("real",)),)))
    with pytest.raises(UsageError, match="or type size=wide"):
        of_cases([Case(model="qwen3_next", size="real")], None)


def test_a_request_that_selects_nothing_is_refused_with_what_to_type():
    with pytest.raises(UsageError) as caught:
        select(Request(systems=("transformers",), tp=(2, 4)))
    assert str(caught.value) == (
        "the request selects no case: transformers runs at tp=1 only. Add --tp 1, or another --system"
    )


@pytest.mark.parametrize(
    "change", [{"models": ()}, {"tp": ()}, {"dtypes": ()}, {"tokens": ()}, {"seeds": ()}, {"systems": ()}], ids=str
)
def test_an_empty_list_selects_all_or_is_refused_and_never_passes_empty(change):
    with contextlib.suppress(UsageError):
        assert flat(select(Request(**{"models": ("mixtral",)} | change))) != []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tp": (1, 5)}, "tp=5 does not divide mixtral's intermediate_size 48. tp up to 8 that do: 1, 2, 3, 4, 6, 8"),
        ({"dtypes": ("int8",)}, "dtype 'int8': expected one of fp32, bf16, fp16"),
        ({"tokens": (-1,)}, "tokens=-1: expected 0 to 65536"),
        ({"ep": (2,)}, "ep=2: expert parallelism is not simulated yet, only tensor parallelism is. "
         "Leave ep out, or type --tp 2"),
        ({"options": (("pad", ("3",)),)}, "pad=3: expected one of 0, 8"),
        ({"options": (("s", ("real",)),)}, "s=real: mixtral has no routed_scaling_factor. Leave s out"),
    ],
    ids=str,
)  # fmt: skip
def test_a_combination_that_cannot_exist_is_refused_before_anything_runs(change, sentence):
    with pytest.raises(UsageError) as caught:
        select(Request(**{"models": ("mixtral",)} | change))
    assert str(caught.value) == sentence


def test_a_list_that_repeats_itself_selects_each_case_once():
    found = flat(select(Request(systems=("runner", "runner"), models=("mixtral", "mixtral"), tp=(1, 1))))
    assert len(found) == len(set(found)) == 12


def test_cases_named_one_by_one_run_on_each_system_once():
    cases = [parse("mixtral"), parse("mixtral@tp2"), parse("mixtral@fp32")]
    found = flat(of_cases(cases, None))
    assert len(found) == len(set(found)) == 6
    assert flat(of_cases(cases[:1], ("x.py:build",))) == [("x.py:build", cases[0])]
