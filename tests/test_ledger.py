"""The ledger of whole runs: which collectives every rank makes, held against a table written by hand and against the plan.

A right output does not say who summed what: one all-reduce too many on a group of one rank, or over a group that happens
to hold the same ranks, changes no number here and every number elsewhere. M tokens, m of them on this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.case import KERNELS, OPTIONS, Case, parse, parse_grid
from harness.check import check, judge
from harness.comm import Communicator, Entry
from harness.errors import UsageError
from harness.execution import Run, run_system
from harness.finding import Verdict
from harness.problem import problem
from harness.runner.moe_runner import MoERunner
from harness.systems import resolve
from harness.systems.runner import Block, RunnerSystem

Collectives = list[tuple[str, str]]

RUNNER = resolve("runner")
GATHER_DP, GATHER_EP, GATHER_TP = ("all_gather", "dp"), ("all_gather", "ep"), ("all_gather", "tp")
SCATTER_DP, SCATTER_EP = ("reduce_scatter", "dp"), ("reduce_scatter", "ep")
SEND = ("all_to_all_single", "ep")
REDUCE = ("all_reduce", "tp")  # the only group over which a runner ever reduces

# ------------------------------------------------------------------------------------------------------- the table

# kernel, kind of grid -> what the kernel does: rows, weights and ids go out after the number of rows; results come home
OWN: dict[tuple[str, str], Collectives] = {
    ("partial", "one"): [],
    ("partial", "tp"): [],
    ("partial", "dp"): [GATHER_DP, GATHER_DP, GATHER_DP, GATHER_DP, SCATTER_DP],
    ("partial", "sp"): [GATHER_EP, GATHER_EP, GATHER_EP, GATHER_EP, SCATTER_EP],
    ("reduced", "one"): [REDUCE],
    ("reduced", "tp"): [REDUCE],
    ("reduced", "dp"): [GATHER_DP, GATHER_DP, GATHER_DP, GATHER_DP, SCATTER_DP, REDUCE],
    ("reduced", "sp"): [GATHER_EP, GATHER_EP, GATHER_EP, GATHER_EP, SCATTER_EP],  # its rows are complete
    ("deepep_ht", "tp"): [SEND, SEND, SEND, SEND],
    ("deepep_ht", "dp"): [SEND, SEND, SEND, SEND],
    ("deepep_ht", "sp"): [SEND, SEND, SEND, SEND],
    ("deepep_ll", "tp"): [SEND, SEND, SEND],  # the weights stay at home
    ("deepep_ll", "dp"): [SEND, SEND, SEND],
    ("deepep_ll", "sp"): [SEND, SEND, SEND],
    ("nvlink_one_sided", "tp"): [GATHER_EP, SEND, SEND, SEND, SEND],
    ("nvlink_one_sided", "dp"): [GATHER_EP, SEND, SEND, SEND, SEND],
    ("nvlink_one_sided", "sp"): [GATHER_EP, SEND, SEND, SEND, SEND],
    ("nvlink_two_sided", "tp"): [GATHER_EP, GATHER_EP, GATHER_EP, SEND, SEND],
    ("nvlink_two_sided", "dp"): [GATHER_EP, GATHER_EP, GATHER_EP, SEND, SEND],
    ("nvlink_two_sided", "sp"): [GATHER_EP, GATHER_EP, GATHER_EP, SEND, SEND],
}
# monolithic experts route where the rows have arrived: logits travel in the place of weights and ids
OWN_MONOLITHIC: dict[tuple[str, str], Collectives] = {
    ("partial", "one"): [],
    ("partial", "tp"): [],
    ("partial", "dp"): [GATHER_DP, GATHER_DP, GATHER_DP, SCATTER_DP],
    ("partial", "sp"): [GATHER_EP, GATHER_EP, GATHER_EP, SCATTER_EP],
    ("reduced", "one"): [REDUCE],
    ("reduced", "tp"): [REDUCE],
    ("reduced", "dp"): [GATHER_DP, GATHER_DP, GATHER_DP, SCATTER_DP, REDUCE],
    ("reduced", "sp"): [GATHER_EP, GATHER_EP, GATHER_EP, SCATTER_EP],
}
# what the runner adds: R complete, parts of the layer -> without SP. Ordered: a transform that needs the complete R
AFTER: dict[tuple[bool, str], Collectives] = {
    (False, "plain"): [REDUCE],
    (False, "shared"): [REDUCE],  # R + S
    (False, "shared, ordered"): [REDUCE, REDUCE],  # R, then S
    (True, "plain"): [],
    (True, "shared"): [REDUCE],  # S
    (True, "shared, ordered"): [REDUCE],
}
PARTS = {
    "mixtral": "plain",
    "gpt_oss": "plain",
    "deepseek_v3": "shared",
    "qwen2_moe": "shared",  # behind a sigmoid gate, which every rank has
    "nemotron_h": "shared, ordered",
    "ernie4_5_vl_moe": "shared",
}
# grid -> its kind, and the global ranks of each group
GRIDS: dict[str, tuple[str, dict[str, list[tuple[int, ...]]]]] = {
    "tp2": ("tp", {"tp": [(0, 1)], "ep": [(0,), (1,)], "dp": [(0,), (1,)]}),
    "tp4.ep2": ("tp", {"tp": [(0, 1, 2, 3)], "ep": [(0, 2), (1, 3)], "dp": [(0,), (1,), (2,), (3,)]}),
    "tp4.ep4": ("tp", {"tp": [(0, 1, 2, 3)], "ep": [(0, 1, 2, 3)], "dp": [(0,), (1,), (2,), (3,)]}),
    "dp2": ("dp", {"tp": [(0,), (1,)], "ep": [(0,), (1,)], "dp": [(0, 1)]}),
    "tp2.dp2": ("dp", {"tp": [(0, 1), (2, 3)], "ep": [(0,), (1,), (2,), (3,)], "dp": [(0, 2), (1, 3)]}),
    "tp2.ep4.dp2": ("dp", {"tp": [(0, 1), (2, 3)], "ep": [(0, 1, 2, 3)], "dp": [(0, 2), (1, 3)]}),
    "tp4.ep4.sp4": ("sp", {"tp": [(0, 1, 2, 3)], "ep": [(0, 1, 2, 3)], "dp": [(0,), (1,), (2,), (3,)]}),
    "tp2.ep4.dp2.sp2": ("sp", {"tp": [(0, 1), (2, 3)], "ep": [(0, 1, 2, 3)], "dp": [(0, 2), (1, 3)]}),
}
WHOLE_EXPERTS = ("tp4.ep4", "tp2.ep4.dp2", "tp4.ep4.sp4", "tp2.ep4.dp2.sp2")  # what all-to-all needs
CELLS = [
    (grid, kernel, model)
    for grid in GRIDS
    for kernel in KERNELS
    if kernel in ("partial", "reduced") or grid in WHOLE_EXPERTS
    for model in ("mixtral", "deepseek_v3", "qwen2_moe", "nemotron_h")
]


def one_call(kernel: str, kind: str, parts: str, *, monolithic: bool = False) -> tuple[Collectives, Collectives]:
    """What the kernel does in a call, and what comes after it."""
    own = (OWN_MONOLITHIC if monolithic else OWN)[kernel, kind]
    if kind == "sp":
        return own, [GATHER_TP]
    return own, [] if kind == "one" else AFTER[kernel != "partial", parts]


def made(entries: Sequence[Entry]) -> Collectives:
    return [(entry.op, entry.group) for entry in entries]


def run(case: Case) -> Run:
    """A run whose outputs are right."""
    refusal = RUNNER.supports(case)
    assert refusal is None, refusal
    done = run_system(case, RUNNER, problem(case))
    assert done.broken is None, done.broken
    finding = judge(case, RUNNER, problem(case), done)
    assert finding.verdict is Verdict.OK, finding.diagnosis
    return done


def hold(done: Run, expected: Collectives) -> None:
    """Every rank made what the table says and what its plan announced."""
    for out, entries in zip(done.ranks, done.ledger, strict=True):
        assert made(entries) == expected
        assert out.layer.announced == expected


def agree(done: Run) -> None:
    """All ranks of a group tell the same of each collective: op, dtype, and shape beside the dim that is gathered or sent."""
    groups: dict[tuple[str, tuple[int, ...]], list[list[object]]] = {}
    for rank, entries in enumerate(done.ledger):
        told: dict[tuple[str, tuple[int, ...]], list[object]] = {}
        for entry in entries:
            assert rank in entry.ranks
            beside = entry.shape[1:] if entry.op in ("all_gather", "all_to_all_single") else entry.shape
            told.setdefault((entry.group, entry.ranks), []).append((entry.op, entry.dtype, beside))
        for group, calls in told.items():
            groups.setdefault(group, []).append(calls)
    for (name, ranks), calls in groups.items():
        assert len(calls) == len(ranks), (name, ranks)
        assert all(each == calls[0] for each in calls), (name, ranks)


# -------------------------------------------------------------------------------------------------------- the cells


@pytest.mark.parametrize(("grid", "kernel", "model"), CELLS)
def test_every_rank_makes_the_collectives_of_the_table_and_no_other(grid, kernel, model):
    kind, groups = GRIDS[grid]
    done = run(parse(f"{model}@{grid}+kernel={kernel}"))
    own, after = one_call(kernel, kind, PARTS[model])
    hold(done, own + after)
    agree(done)
    for rank, entries in enumerate(done.ledger):
        for entry in entries:
            assert entry.ranks == next(ranks for ranks in groups[entry.group] if rank in ranks)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid not in WHOLE_EXPERTS])
@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel not in ("partial", "reduced")])
def test_the_cells_that_the_table_lacks_are_refused(grid, kernel):
    assert "all-to-all sends a token to whole experts" in RUNNER.supports(parse(f"mixtral@{grid}+kernel={kernel}"))


@pytest.mark.parametrize("kernel", ["partial", "reduced"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_monolithic_kernel_gathers_logits_in_the_place_of_weights_and_ids(grid, kernel):
    done = run(parse(f"deepseek_v3@{grid}+kernel={kernel}.experts=monolithic"))
    own, after = one_call(kernel, GRIDS[grid][0], "shared", monolithic=True)
    hold(done, own + after)
    agree(done)


@pytest.mark.parametrize("experts", ["slots", "batched"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_kind_of_modular_experts_changes_no_collective(grid, experts):
    own, after = one_call("partial", GRIDS[grid][0], "shared")
    hold(run(parse(f"deepseek_v3@{grid}+experts={experts}")), own + after)


@pytest.mark.parametrize("order", ["1", "2", "3"])
@pytest.mark.parametrize(("grid", "kernel"), [(g, k) for g, k, model in CELLS if model == "mixtral"])
def test_the_moment_of_the_shared_experts_changes_no_collective(grid, kernel, order):
    own, after = one_call(kernel, GRIDS[grid][0], "shared, ordered")
    hold(run(parse(f"nemotron_h@{grid}+kernel={kernel}.order={order}")), own + after)


@pytest.mark.parametrize("tokens", ["tokens0", "tokens1", "tokens0_5", "tokens5_0", "tokens9_2"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grid", ["tp2.ep4.dp2", "tp2.ep4.dp2.sp2"])
def test_a_rank_without_tokens_takes_part_in_every_collective(grid, kernel, tokens):
    done = run(parse(f"deepseek_v3@{grid}.{tokens}+kernel={kernel}"))
    own, after = one_call(kernel, GRIDS[grid][0], "shared")
    hold(done, own + after)
    agree(done)


def test_a_layer_alone_on_its_rank_makes_none():
    for model in PARTS:
        hold(run(parse(model)), [])


# --------------------------------------------------------------------------------------------------------- options

DP_PARTIAL = OWN["partial", "dp"]
DP_REDUCED = OWN["reduced", "dp"]
HT, LL = OWN["deepep_ht", "dp"], OWN["deepep_ll", "dp"]
ONE_SIDED, TWO_SIDED = OWN["nvlink_one_sided", "dp"], OWN["nvlink_two_sided", "dp"]
ON_OPTIONS: dict[str, Collectives] = {
    # the kernel is asked at each call: what the first one does is no longer true for the second
    "deepseek_v3@tp2+swap=reduced": [REDUCE, REDUCE, REDUCE],
    "deepseek_v3@tp2+kernel=reduced.swap=partial": [REDUCE, REDUCE, REDUCE],
    "mixtral@tp2+swap=reduced": [REDUCE, REDUCE],
    "nemotron_h@tp2+swap=reduced": [REDUCE, REDUCE, REDUCE, REDUCE],
    "mixtral@tp2.ep4.dp2+kernel=deepep_ht.swap=partial": [*DP_PARTIAL, REDUCE, *HT],
    "mixtral@tp2.ep4.dp2+swap=deepep_ht": [*HT, *DP_PARTIAL, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.swap=partial": [*DP_PARTIAL, REDUCE, *HT, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+swap=deepep_ll": [*LL, REDUCE, *DP_PARTIAL, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+kernel=nvlink_one_sided.swap=reduced": [*DP_REDUCED, REDUCE, *ONE_SIDED, REDUCE],
    "nemotron_h@tp2.ep4.dp2+swap=nvlink_two_sided": [*TWO_SIDED, REDUCE, *DP_PARTIAL, REDUCE, REDUCE],
    "nemotron_h@tp2.ep4.dp2+kernel=nvlink_two_sided.swap=deepep_ll": [*LL, REDUCE, *TWO_SIDED, REDUCE],
    "deepseek_v3@tp4.ep4.sp4+kernel=deepep_ht.swap=partial": [
        *(GATHER_EP, GATHER_EP, GATHER_EP, GATHER_EP, SCATTER_EP, GATHER_TP),
        *(SEND, SEND, SEND, SEND, GATHER_TP),
    ],
    # micro-batches all pass the kernel before the first is reduced
    "mixtral@tp2+batches=2": [REDUCE, REDUCE],
    "deepseek_v3@tp2+batches=2": [REDUCE, REDUCE],
    "nemotron_h@tp2+batches=2": [REDUCE, REDUCE, REDUCE, REDUCE],
    "deepseek_v3@tp2+kernel=reduced.batches=2": [REDUCE, REDUCE, REDUCE, REDUCE],
    "deepseek_v3@dp2+batches=2": [*DP_PARTIAL, *DP_PARTIAL, REDUCE, REDUCE],
    "nemotron_h@tp2.dp2+batches=2": [*DP_PARTIAL, *DP_PARTIAL, REDUCE, REDUCE, REDUCE, REDUCE],
    "mixtral@tp2.ep4.dp2+kernel=deepep_ht.batches=2": [*HT, *HT],
    "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ll.batches=2": [*LL, *LL, REDUCE, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.batches=2.swap=partial": [
        *(*DP_PARTIAL, *DP_PARTIAL, REDUCE, REDUCE),
        *(*HT, *HT, REDUCE, REDUCE),
    ],
    # the caller reduces once, what the layer would have
    "mixtral@tp2+reduce=caller": [REDUCE],
    "deepseek_v3@tp4.ep2+reduce=caller": [REDUCE],
    "deepseek_v3@tp4.ep4+reduce=caller": [REDUCE],
    "deepseek_v3@dp2+reduce=caller": [*DP_PARTIAL, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+reduce=caller": [*DP_PARTIAL, REDUCE],
    "nemotron_h@tp2+size=wide.reduce=caller": [REDUCE],  # without a bias its transform may run on partial sums
    "deepseek_v3@tp2.dp2+reduce=caller.batches=2": [*DP_PARTIAL, *DP_PARTIAL, REDUCE],
    "deepseek_v3@tp1+reduce=caller": [],
    # rows of padding travel with the others
    "mixtral@tp2+junk=3": [REDUCE],
    "deepseek_v3@tp4.ep2+junk=3": [REDUCE],
    "nemotron_h@dp2+junk=3": [*DP_PARTIAL, REDUCE, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.junk=3": [*HT, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+kernel=nvlink_one_sided.junk=3": [*ONE_SIDED, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+kernel=nvlink_two_sided.junk=3": [*TWO_SIDED, REDUCE],
    # placing experts anew takes no collective of its own
    "mixtral@tp4.ep2+placement=moved": [REDUCE, REDUCE],
    "deepseek_v3@tp4.ep4+placement=moved": [REDUCE, REDUCE],
    "mixtral@tp2.ep4.dp2+kernel=deepep_ht.placement=moved": [*HT, *HT],
    "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ll.placement=moved": [*LL, REDUCE, *LL, REDUCE],
    "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.placement=moved.swap=partial": [
        *(*DP_PARTIAL, REDUCE),
        *(*HT, REDUCE),
        *(*HT, REDUCE),
    ],
    "deepseek_v3@tp4.ep4.sp4+kernel=deepep_ll.placement=moved": [*LL, GATHER_TP, *LL, GATHER_TP],
    # experts of the kernel like the others: no S is left to be reduced
    "deepseek_v3@tp2+shared=fused": [REDUCE],
    "deepseek_v3@tp2+shared=fused.kernel=reduced": [REDUCE],
    "deepseek_v3@tp2+shared=fused.swap=reduced": [REDUCE, REDUCE],
    "deepseek_v3@tp2.dp2+shared=fused.kernel=reduced": DP_REDUCED,
    # a linear transform without a bias commutes with the sum
    "nemotron_h@tp2+size=wide": [REDUCE],
    "nemotron_h@tp2+size=wide.kernel=reduced": [REDUCE, REDUCE],
    "nemotron_h@tp2.ep4.dp2+size=wide": [*DP_PARTIAL, REDUCE],
    # two branches: each makes its own, on ranks without an image too
    "ernie4_5_vl_moe@tp2": [REDUCE, REDUCE],
    "ernie4_5_vl_moe@dp2.tokens0_5": [*DP_PARTIAL, REDUCE, *DP_PARTIAL, REDUCE],
    "ernie4_5_vl_moe@tp2+kernel=reduced": [REDUCE, REDUCE, REDUCE, REDUCE],
    "ernie4_5_vl_moe@tp2.ep4.dp2+kernel=deepep_ht": [*HT, REDUCE, *HT, REDUCE],
    "ernie4_5_vl_moe@tp2.ep4.dp2.sp2+kernel=deepep_ht": [*HT, *HT, GATHER_TP],
    "ernie4_5_vl_moe@tp2+reduce=caller": [REDUCE],
}


@pytest.mark.parametrize(("text", "expected"), ON_OPTIONS.items(), ids=list(ON_OPTIONS))
def test_every_option_leaves_the_ledger_that_is_written_here(text, expected):
    done = run(parse(text))
    hold(done, expected)
    agree(done)


# what rank 0 gives, of 7 tokens, H = 64
SHAPES: dict[str, list[tuple[str, str, str, tuple[int, ...]]]] = {
    # R and S in one tensor, in the layer's dtype
    "deepseek_v3@tp2": [("all_reduce", "tp", "fp32", (7, 64))],
    "deepseek_v3@tp2.bf16": [("all_reduce", "tp", "bf16", (7, 64))],
    "deepseek_v3@tp2.fp16": [("all_reduce", "tp", "fp16", (7, 64))],
    # cut to H before S + R; without S the width of the kernel stays to the end
    "deepseek_v3@tp2+pad=8": [("all_reduce", "tp", "fp32", (7, 64))],
    "mixtral@tp2+pad=8": [("all_reduce", "tp", "fp32", (7, 72))],
    "deepseek_v3@tp2+shared=fused.pad=8": [("all_reduce", "tp", "fp32", (7, 72))],
    # a kernel that reduces knows nothing of the cut
    "deepseek_v3@tp2+kernel=reduced.pad=8": [
        ("all_reduce", "tp", "fp32", (7, 72)),
        ("all_reduce", "tp", "fp32", (7, 64)),
    ],
    # R in the latent width L = 32, then S
    "nemotron_h@tp2": [("all_reduce", "tp", "fp32", (7, 32)), ("all_reduce", "tp", "fp32", (7, 64))],
    "nemotron_h@tp2+pad=8": [("all_reduce", "tp", "fp32", (7, 32)), ("all_reduce", "tp", "fp32", (7, 64))],
    "nemotron_h@tp2+kernel=reduced.pad=8": [
        ("all_reduce", "tp", "fp32", (7, 40)),
        ("all_reduce", "tp", "fp32", (7, 64)),
    ],
    "nemotron_h@tp2+size=wide": [("all_reduce", "tp", "fp32", (7, 64))],  # the transform came before the sum
    "nemotron_h@tp2+batches=2": [
        ("all_reduce", "tp", "fp32", (4, 32)),
        ("all_reduce", "tp", "fp32", (4, 64)),
        ("all_reduce", "tp", "fp32", (3, 32)),
        ("all_reduce", "tp", "fp32", (3, 64)),
    ],
    "deepseek_v3@tp2+batches=2.reduce=caller": [("all_reduce", "tp", "fp32", (7, 64))],
    "deepseek_v3@tp2+junk=3": [("all_reduce", "tp", "fp32", (10, 64))],
    "deepseek_v3@tp2+junk=3.reduce=caller": [("all_reduce", "tp", "fp32", (7, 64))],
    # numbers of rows, rows, weights, ids; 4 of 7 tokens are those of dp rank 0
    "deepseek_v3@dp2.bf16": [
        ("all_gather", "dp", "int64", (1,)),
        ("all_gather", "dp", "bf16", (4, 64)),
        ("all_gather", "dp", "fp32", (4, 4)),
        ("all_gather", "dp", "int32", (4, 4)),
        ("reduce_scatter", "dp", "bf16", (7, 64)),
        ("all_reduce", "tp", "bf16", (4, 64)),
    ],
    "deepseek_v3@dp2+experts=monolithic": [
        ("all_gather", "dp", "int64", (1,)),
        ("all_gather", "dp", "fp32", (4, 64)),
        ("all_gather", "dp", "fp32", (4, 16)),
        ("reduce_scatter", "dp", "fp32", (7, 64)),
        ("all_reduce", "tp", "fp32", (4, 64)),
    ],
    "mixtral@tp2.dp2.tokens1_6": [
        ("all_gather", "dp", "int64", (1,)),
        ("all_gather", "dp", "fp32", (1, 64)),
        ("all_gather", "dp", "fp32", (1, 2)),
        ("all_gather", "dp", "int32", (1, 2)),
        ("reduce_scatter", "dp", "fp32", (7, 64)),
        ("all_reduce", "tp", "fp32", (1, 64)),
    ],
    "deepseek_v3@dp2+shared=fused": [  # four routed slots and one shared
        ("all_gather", "dp", "int64", (1,)),
        ("all_gather", "dp", "fp32", (4, 64)),
        ("all_gather", "dp", "fp32", (4, 5)),
        ("all_gather", "dp", "int32", (4, 5)),
        ("reduce_scatter", "dp", "fp32", (7, 64)),
        ("all_reduce", "tp", "fp32", (4, 64)),
    ],
    # ceil(7 / 4) rows on each rank, 8 in all; the last of them is no token
    "deepseek_v3@tp4.ep4.sp4": [
        ("all_gather", "ep", "int64", (1,)),
        ("all_gather", "ep", "fp32", (2, 64)),
        ("all_gather", "ep", "fp32", (2, 4)),
        ("all_gather", "ep", "int32", (2, 4)),
        ("reduce_scatter", "ep", "fp32", (8, 64)),
        ("all_gather", "tp", "fp32", (2, 64)),
    ],
    # windows as large as the largest number of rows, one for each of 4 ranks
    "mixtral@tp2.ep4.dp2+kernel=nvlink_one_sided": [
        ("all_gather", "ep", "int64", (1,)),
        ("all_to_all_single", "ep", "fp32", (16, 64)),
        ("all_to_all_single", "ep", "fp32", (16, 2)),
        ("all_to_all_single", "ep", "int32", (16, 2)),
        ("all_to_all_single", "ep", "fp32", (16, 64)),
    ],
    # each of 4 rows once for each of its 2 slots, and its local id; the weights stay
    "mixtral@tp2.ep4.dp2+kernel=deepep_ll.placement=replicas": [
        ("all_to_all_single", "ep", "fp32", (8, 64)),
        ("all_to_all_single", "ep", "int64", (8,)),
        ("all_to_all_single", "ep", "fp32", None),
    ],
}


@pytest.mark.parametrize(("text", "expected"), SHAPES.items(), ids=list(SHAPES))
def test_each_collective_takes_the_tensor_that_the_tables_name(text, expected):
    done = run(parse(text))
    told = [
        (e.op, e.group, e.dtype, None if want[3] is None else e.shape)
        for e, want in zip(done.ledger[0], expected, strict=True)
    ]
    assert told == expected
    agree(done)


# -------------------------------------------------------------------------------------------------- beyond the table


def expected_of(case: Case) -> Collectives:
    """The ledger of a case, put together from the tables."""
    grid = case.grid
    kind = "sp" if grid.sp > 1 else "dp" if grid.dp > 1 else "tp" if grid.tp > 1 else "one"
    parts = "plain" if case.shared == "fused" else "shared" if case.size == "wide" else PARTS[case.model]
    branches = 2 if case.model == "ernie4_5_vl_moe" else 1

    def call(kernel: str) -> Collectives:
        own, after = one_call(kernel, kind, parts, monolithic=case.experts == "monolithic")
        if kind == "sp":
            return own * branches + after
        if case.reduce == "caller":
            return own * branches * int(case.batches) + after[:1]
        return (own * int(case.batches) + after * int(case.batches)) * branches

    first = [] if case.swap == "none" else call(case.swap)
    return first + call(case.kernel) * (2 if case.placement == "moved" else 1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A case that the runner has, on a grid of up to 8 ranks; an option that it lacks there stays at its default."""
    model, kernel = draw(st.sampled_from(sorted(PARTS))), draw(st.sampled_from(KERNELS))
    whole = kernel not in ("partial", "reduced")  # experts, on more than one rank
    sizes = [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 3), (1, 4), (2, 4)] + ([] if whole else [(1, 1)])
    tp, dp = draw(st.sampled_from(sizes))
    ep = draw(st.sampled_from([n for n in range(1, tp * dp + 1) if tp * dp % n == 0 and (n == tp * dp or not whole)]))
    sp = draw(st.sampled_from([1, tp] if ep == tp * dp else [1]))
    split = tuple(draw(st.lists(st.integers(0, 6), min_size=dp, max_size=dp)))
    text = f"tp{tp}.ep{ep}.dp{dp}.sp{sp}"
    try:
        case = Case(model=model, grid=parse_grid(text), tokens=sum(split), split=split)
    except UsageError:  # the widths of the twin are not cut into that many pieces
        case = Case(model=model, grid=parse_grid(f"tp2.ep{2 * dp}.dp{dp}"), tokens=sum(split), split=split)
    others = draw(st.permutations([name for name in OPTIONS if name not in ("size", "s", "kernel", "backend")]))
    for name in ("kernel", *others):
        changed = replace(case, **{name: kernel if name == "kernel" else draw(st.sampled_from(OPTIONS[name][0]))})
        case = changed if RUNNER.supports(changed) is None else case
    return case


@given(case=cases())
def test_the_ledger_of_any_case_is_the_sum_of_its_calls(case):
    done = run_system(case, RUNNER, problem(case))
    assert done.broken is None, done.broken
    hold(done, expected_of(case))
    agree(done)


@given(case=cases())
def test_no_collective_over_ep_or_dp_reduces_anything_but_the_kernel_s_own_combine(case):
    done = run_system(case, RUNNER, problem(case))
    for entries in done.ledger:
        for entry in entries:
            assert entry.op != "all_reduce" or entry.group == "tp"
            assert entry.op != "reduce_scatter" or entry.group == ("ep" if case.grid.sp > 1 else "dp")


# --------------------------------------------------------------------------------------- runners with a right output
# and other collectives than they announced


class Planted(RunnerSystem):
    """The runner with one thing changed on each rank after it was built."""

    name = "runner"

    def __init__(self, plant: Callable[[MoERunner, Communicator], None]) -> None:
        self._plant = plant

    def build(self, case, weights, comm) -> Block:
        block = super().build(case, weights, comm)
        self._plant(block._layer.runner, comm)
        return block


def with_final(runner: Any, final: Callable[..., torch.Tensor]) -> None:
    """Another final all-reduce and cut. final: of (states, width, plan) and of the right one."""
    right = runner.reduce_and_trunc
    runner.reduce_and_trunc = lambda states, width, plan: final(states, width, plan, right)


def one_more(runner: Any, comm: Communicator) -> None:
    """All-reduces the result a second time, and drops that."""

    def final(states, width, plan, right):
        comm.tp.all_reduce(states)
        return right(states, width, plan)

    with_final(runner, final)


def one_more_on_rank_1(runner: Any, comm: Communicator) -> None:
    if comm.rank == 1:
        one_more(runner, comm)


def one_more_before_the_kernel(runner: Any, comm: Communicator) -> None:
    right = runner._maybe_pad_hidden_states

    def pad(x):
        comm.dp.broadcast(x)
        return right(x)

    runner._maybe_pad_hidden_states = pad


def no_final(runner: Any, comm: Communicator) -> None:
    """Right only where a rank has all of it: on tp groups of one rank."""
    with_final(runner, lambda states, width, plan, right: states[:, :width])


def both_at_the_end(runner: Any, comm: Communicator) -> None:
    """R does not leave the kernel complete, S is not reduced early: one all-reduce of R + S does for both."""
    runner.kernel.prepare_finalize._tp = None
    runner._maybe_reduce_shared_out = lambda shared, plan: shared
    with_final(runner, lambda states, width, plan, right: comm.tp.all_reduce(states)[:, :width])


def each_apart(runner: Any, comm: Communicator) -> None:
    """R and S are reduced one by one where one all-reduce of their sum was announced."""
    runner._maybe_reduce_routed_out = lambda routed, plan: comm.tp.all_reduce(routed)
    runner._maybe_reduce_shared_out = lambda shared, plan: comm.tp.all_reduce(shared)
    no_final(runner, comm)


def final_over_ep(runner: Any, comm: Communicator) -> None:
    """Right where ep and tp are the same ranks."""
    with_final(runner, lambda states, width, plan, right: comm.ep.all_reduce(states)[:, :width])


def final_over_dp(runner: Any, comm: Communicator) -> None:
    """Right where both are groups of one rank, or where nothing is left to sum."""
    with_final(runner, lambda states, width, plan, right: comm.dp.all_reduce(states)[:, :width])


def final_by_gather(runner: Any, comm: Communicator) -> None:
    with_final(runner, lambda states, width, plan, right: comm.tp.all_gather(states[None]).sum(0)[:, :width])


def dispatch_over_ep(runner: Any, comm: Communicator) -> None:
    """Right where ep and dp are the same ranks."""
    runner.kernel.prepare_finalize._group = comm.ep


def one_after_the_other(runner: Any, comm: Communicator) -> None:
    """The second micro-batch starts when the first has ended."""
    runner.forward_micro_batches = lambda batches: [runner.forward(x, logits) for x, logits in batches]


def announces_nothing(runner: Any, comm: Communicator) -> None:
    """The plan leaves out what the kernel does."""
    right = runner.plan
    runner.plan = lambda dtype, width: replace(right(dtype, width), announced=())


def one_more_in_the_first_call(runner: Any, comm: Communicator) -> None:
    calls = []

    def final(states, width, plan, right):
        calls.append(None)
        if len(calls) == 1:
            comm.tp.all_reduce(states)
        return right(states, width, plan)

    with_final(runner, final)


TP, DP, EP = "all_reduce over tp", "all_gather over dp", "all_gather over ep"
# plant, case -> rank, number, announced, shown
PLANTED = [
    (one_more, "mixtral@tp2", 0, 1, "nothing", TP),
    (one_more, "deepseek_v3@tp4.ep2", 0, 1, "nothing", TP),
    (one_more, "mixtral@dp2", 0, 6, "nothing", TP),
    (one_more, "mixtral@tp2.ep4.dp2+kernel=deepep_ht", 0, 4, "nothing", TP),
    (one_more, "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ll", 0, 4, "nothing", TP),
    (one_more, "deepseek_v3@tp4.ep4.sp4", 0, 5, "all_gather over tp", TP),
    (one_more, "deepseek_v3@tp2+reduce=caller", 0, 1, "nothing", TP),
    (one_more_on_rank_1, "mixtral@dp2", 1, 6, "nothing", TP),
    (one_more_on_rank_1, "deepseek_v3@dp2.ep2+kernel=deepep_ht", 1, 5, "nothing", TP),
    (one_more_before_the_kernel, "mixtral@tp2", 0, 0, TP, "broadcast over dp"),
    (one_more_before_the_kernel, "mixtral@dp2.tokens6", 0, 0, DP, "broadcast over dp"),
    (one_more_in_the_first_call, "mixtral@tp2+swap=reduced", 0, 2, "nothing", TP),
    (one_more_in_the_first_call, "mixtral@tp2.ep4.dp2+swap=deepep_ht", 0, 4, DP, TP),
    (one_more_in_the_first_call, "deepseek_v3@tp4.ep4+placement=moved", 0, 2, "nothing", TP),
    (no_final, "mixtral@dp2", 0, 5, TP, "nothing"),
    (no_final, "deepseek_v3@dp2", 0, 5, TP, "nothing"),
    (no_final, "deepseek_v3@dp2+batches=2", 0, 10, TP, "nothing"),
    (both_at_the_end, "deepseek_v3@tp2+kernel=reduced", 0, 1, TP, "nothing"),
    (both_at_the_end, "deepseek_v3@tp2.dp2+kernel=reduced", 0, 6, TP, "nothing"),
    (each_apart, "deepseek_v3@tp2", 0, 1, "nothing", TP),
    (each_apart, "deepseek_v3@tp2.ep4.dp2", 0, 6, "nothing", TP),
    (final_over_ep, "mixtral@tp2.ep2", 0, 0, TP, "all_reduce over ep"),
    (final_over_ep, "deepseek_v3@tp4.ep4", 0, 0, TP, "all_reduce over ep"),
    (final_over_dp, "mixtral@dp1.tp1.ep1+kernel=reduced", 0, 1, "nothing", "all_reduce over dp"),
    (final_over_dp, "mixtral@tp4.ep4+kernel=deepep_ht", 0, 4, "nothing", "all_reduce over dp"),
    (final_by_gather, "mixtral@tp2", 0, 0, TP, "all_gather over tp"),
    (dispatch_over_ep, "mixtral@dp2.ep2", 0, 0, DP, EP),
    (one_after_the_other, "deepseek_v3@dp2+batches=2", 0, 5, DP, TP),
    (announces_nothing, "mixtral@dp2", 0, 0, TP, DP),
    (announces_nothing, "mixtral@tp2+kernel=reduced", 0, 0, "nothing", TP),
]


@pytest.mark.parametrize(("plant", "text", "rank", "number", "announced", "shown"), PLANTED)
def test_other_collectives_than_announced_are_found_behind_a_right_output(plant, text, rank, number, announced, shown):
    finding = check(parse(text), Planted(plant))
    sentence = f"collective {number} of rank {rank}: the plan announced {announced}, the ledger shows {shown}"
    assert (finding.verdict, finding.stage, finding.diagnosis) == (Verdict.MISMATCH, "collectives", sentence)


@pytest.mark.parametrize("text", sorted({row[1] for row in PLANTED}))
def test_the_same_cases_pass_with_nothing_planted(text):
    assert check(parse(text), Planted(lambda runner, comm: None)).verdict is Verdict.OK


def test_a_layer_that_announces_nothing_is_judged_by_its_output_alone():
    class Silent(Planted):
        def build(self, case, weights, comm):
            block = super().build(case, weights, comm)
            return lambda x, **inputs: block(x, **inputs)

    assert check(parse("mixtral@tp2"), Silent(one_more)).verdict is Verdict.OK


@pytest.mark.parametrize("text", ["deepseek_v3@tp2", "deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.swap=partial"])
def test_a_layer_that_is_called_twice_announces_both_calls(text):
    class Twice(RunnerSystem):
        def build(self, case, weights, comm):
            block = super().build(case, weights, comm)

            def forward(x, **inputs):
                block(x, **inputs)
                y = block(x, **inputs)
                forward.announced = block.announced
                return y

            return forward

    assert check(parse(text), Twice()).verdict is Verdict.OK


def test_a_wrong_output_is_told_before_what_the_ledger_shows():
    def twice(runner, comm):
        with_final(runner, lambda states, width, plan, right: comm.tp.all_reduce(right(states, width, plan)))

    finding = check(parse("deepseek_v3@tp2"), Planted(twice))
    assert finding.verdict is Verdict.MISMATCH
    assert finding.stage != "collectives"


def test_a_rank_that_makes_one_more_than_its_group_ends_the_run():
    finding = check(parse("deepseek_v3@tp2"), Planted(one_more_on_rank_1))
    assert (finding.verdict, finding.stage) == (Verdict.MISMATCH, "collectives")
    assert "collective 1 of group tp differs: rank 0: returned, rank 1: all_reduce(fp32[7, 64])" in finding.diagnosis
