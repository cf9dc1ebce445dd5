"""What a request means: parts of the main job exactly, and nothing at all refused. The main job itself: test_main_job.py."""

from __future__ import annotations

import contextlib
from itertools import product

import pytest

from harness import models
from harness.case import Case, Grid, parse
from harness.errors import UsageError
from harness.selection import SYSTEMS, Batch, Request, main_job, of_cases, select

WIDE = [name for name in models.names() if models.load(name).wide is not None]


def flat(batches: list[Batch]) -> list[tuple[str, Case]]:
    return [(batch.system, case) for batch in batches for case in batch.cases]


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
        ({"tp": (2,), "ep": (3,)}, "ep=3: expected a divisor of tp*dp=2, the ranks that hold experts. Type one of ep 1, 2"),
        ({"tp": (4,), "ep": (4,), "sp": (2,)}, "sp=2: sequence parallelism splits the rows over the tp ranks, so sp is 1 or tp=4. "
         "Type sp1 or sp4"),
        ({"tokens": ((3, 4),)}, "tokens3_4: expected one number for each of the dp=1 data-parallel ranks. Type tokens7"),
        ({"grids": (Grid(dp=2), Grid(dp=3)), "tokens": ((3, 4),)}, "tokens3_4: expected one number for each of the dp=3 "
         "data-parallel ranks. Type tokens7_7_7"),
        ({"grids": (Grid(dp=2),), "tokens": ((3, 4), (1, 1, 1))}, "tokens1_1_1: expected one number for each of the dp=2 "
         "data-parallel ranks. Type tokens7_7"),
        ({"options": (("pad", ("3",)),)}, "pad=3: expected one of 0, 8"),
        ({"options": (("s", ("real",)),)}, "s=real: mixtral has no routed_scaling_factor. Leave s out"),
    ],
    ids=str,
)  # fmt: skip
def test_a_combination_that_cannot_exist_is_refused_before_anything_runs(change, sentence):
    with pytest.raises(UsageError) as caught:
        select(Request(**{"models": ("mixtral",)} | change))
    assert str(caught.value) == sentence


def test_grids_are_run_as_they_were_named():
    grids = (Grid(tp=2, ep=4, dp=2), Grid(tp=4, ep=2))
    found = flat(select(Request(systems=("runner",), models=("mixtral",), grids=grids, dtypes=("fp32",), tokens=(7,))))
    assert [case.grid for _, case in found] == list(grids)


def test_combinations_of_sizes_that_cannot_exist_are_left_out_where_others_can():
    found = flat(select(Request(systems=("runner",), models=("mixtral",), tp=(1, 2, 4), ep=(1, 4), dp=(1, 2))))
    assert {str(case.grid) for _, case in found} == {
        "tp1", "tp2", "tp4", "dp2", "tp2.dp2", "tp4.dp2", "tp4.ep4", "tp2.ep4.dp2", "tp4.ep4.dp2",
    }  # fmt: skip


def test_sizes_that_sequence_parallelism_needs_are_filled_in_where_nobody_named_them():
    found = flat(select(Request(systems=("runner",), models=("mixtral",), sp=(2,), dp=(1, 2))))
    assert {str(case.grid) for _, case in found} == {"tp2.ep2.sp2", "tp2.ep4.dp2.sp2"}


def test_shares_of_tokens_go_to_the_grids_that_have_as_many_ranks():
    request = Request(
        systems=("runner",), models=("mixtral",), grids=(Grid(dp=2), Grid(dp=3), Grid(tp=2)), dtypes=("fp32",),
        tokens=(5, (0, 7), (1, 1, 1)),
    )  # fmt: skip
    found = {(str(case.grid), case.split, case.tokens) for _, case in flat(select(request))}
    assert found == {
        ("dp2", None, 5), ("dp3", None, 5), ("tp2", None, 5), ("dp2", (0, 7), 7), ("dp3", parse("mixtral@dp3.tokens1_1_1").split, 3),
    }  # fmt: skip


def test_transformers_runs_the_part_of_a_request_that_has_one_rank():
    found = flat(select(Request(models=("mixtral",), grids=(Grid(), Grid(dp=2)), tokens=(7,))))
    assert {str(case.grid) for system, case in found if system == "transformers"} == {"tp1"}
    assert {str(case.grid) for system, case in found if system == "runner"} == {"tp1", "dp2"}


def test_a_list_that_repeats_itself_selects_each_case_once():
    found = flat(select(Request(systems=("runner", "runner"), models=("mixtral", "mixtral"), tp=(1, 1))))
    assert len(found) == len(set(found)) == 12


def test_cases_named_one_by_one_run_on_each_system_once():
    cases = [parse("mixtral"), parse("mixtral@tp2"), parse("mixtral@fp32")]
    found = flat(of_cases(cases, None))
    assert len(found) == len(set(found)) == 6
    assert flat(of_cases(cases[:1], ("x.py:build",))) == [("x.py:build", cases[0])]
