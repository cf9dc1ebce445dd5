"""The decision tables of the refactored runner, cell by cell: who scales, where each part is reduced, what order, what cut.

Each table is written out as upstream's 0.32 behaves, not derived from plan.py. tests/test_ledger.py holds the collectives
of whole runs against the same tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from harness import models
from harness.case import parse
from harness.comm.simulated import run_ranks
from harness.problem import problem
from harness.runner.experts import MonolithicExperts, TorchExperts
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import linear, replicated
from harness.runner.plan import CallFacts, LayerFacts, OutputPlan, Reduced, SharedExpertsOrder, plan_output
from harness.runner.prepare_finalize.all_to_all import (
    DeepEPHTPrepareAndFinalize,
    DeepEPLLPrepareAndFinalize,
    NVLinkOneSidedPrepareAndFinalize,
    NVLinkTwoSidedPrepareAndFinalize,
)
from harness.runner.prepare_finalize.local import Batched, NoDPEP
from harness.runner.prepare_finalize.naive import Naive, NaiveBatched
from harness.runner.prepare_finalize.passthrough import Passthrough
from harness.runner.router import make_router
from harness.systems.runner import RunnerSystem, settings_of

LAYER = LayerFacts(
    moe_tp=4, moe_ep=1, sequence_parallel=False, scale=2.5, apply_routed_scale_to_output=True, router_scales=True,
    has_shared_experts=True, transform="none", reduce_results=True,
)  # fmt: skip
CALL = CallFacts(
    output_is_reduced=False, kernel_scales=False, no_overlap=False, kernel_runs_shared=False, side_stream=False,
    half_precision=False, padded=False,
)  # fmt: skip
ONE_RANK = {"moe_tp": 1, "moe_ep": 1}
CUT_OVER_TP = {"moe_tp": 4, "moe_ep": 1}
WHOLE_EXPERTS = {"moe_tp": 1, "moe_ep": 4}
EP_GROUPS = {"moe_tp": 2, "moe_ep": 2}


def plan(**changes: object) -> OutputPlan:
    layer = {name: value for name, value in changes.items() if name in LayerFacts.__slots__}
    call = {name: value for name, value in changes.items() if name in CallFacts.__slots__}
    assert len(layer) + len(call) == len(changes)
    return plan_output(replace(LAYER, **layer), replace(CALL, **call))


def layers(text: str) -> tuple[FusedMoE, ...]:
    """The layer of each rank of a case."""
    case = parse(text)
    refusal = RunnerSystem().supports(case)
    assert refusal is None, refusal
    given = problem(case)
    ranks = run_ranks(case.grid, lambda comm: FusedMoE(case.spec, settings_of(case), given.weights, comm))
    return ranks.unwrap()


# ------------------------------------------------------------------------------------------- table (a): who scales

NOBODY, ROUTER, KERNEL, RUNNER = (), ("router",), ("kernel",), ("runner",)
# flag, router able, kernel scales -> who: bf16 with S, bf16 without, fp16 with S, fp16 without. The unit is 1/s where
# nobody scales: the layer returns R + S/s and says so.
WHO_SCALES = {
    (False, True, False): (ROUTER, ROUTER, ROUTER, ROUTER),  # fp16 matters only with the flag
    (False, False, False): (RUNNER, RUNNER, RUNNER, RUNNER),  # plain and custom routers hand s on, upstream loses it
    (False, True, True): (KERNEL, KERNEL, KERNEL, KERNEL),
    (False, False, True): (KERNEL, KERNEL, KERNEL, KERNEL),
    (True, True, False): (RUNNER, RUNNER, NOBODY, RUNNER),
    (True, False, False): (RUNNER, RUNNER, NOBODY, RUNNER),
    (True, True, True): (KERNEL, KERNEL, KERNEL, KERNEL),  # a layer refuses flag and kernel together: twice
    (True, False, True): (KERNEL, KERNEL, KERNEL, KERNEL),
}
TRANSFORMS = ("none", "commutative", "ordered")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("facts", "whos"), WHO_SCALES.items(), ids=str)
def test_exactly_the_actor_of_table_a_scales(facts, whos, transform):
    flag, able, kernel = facts
    for (fp16, shared), who in zip([(False, True), (False, False), (True, True), (True, False)], whos, strict=True):
        found = plan(
            apply_routed_scale_to_output=flag, router_scales=able, kernel_scales=kernel, half_precision=fp16,
            has_shared_experts=shared, transform=transform,
        )  # fmt: skip
        assert (found.scaled_by, found.output_unit) == (who, 1.0 if who else 1 / 2.5), (fp16, shared)


@pytest.mark.parametrize("changes", list(itertools.product([False, True], repeat=5)))
def test_a_factor_of_one_is_multiplied_by_nobody(changes):
    names = ("apply_routed_scale_to_output", "router_scales", "kernel_scales", "half_precision", "has_shared_experts")
    found = plan(scale=1.0, **dict(zip(names, changes, strict=True)))
    assert (found.scaled_by, found.output_unit) == ((), 1.0)


S = models.load("deepseek_v3").twin.scale
# kind of router -> a page that has it, whether it folds s into its weights
ABLE = {
    "grouped with bias": ("deepseek_v3", True),
    "biased": ("nemotron_h", True),
    "plain": ("mixtral", False),
    "sigmoid of the picked": ("llama4", False),
    "sparsemixer": ("phimoe", False),
    "scale for each expert": ("gemma4", False),
}


@pytest.mark.parametrize(("model", "able"), ABLE.values(), ids=ABLE)
def test_only_the_routers_of_table_a_fold_s_into_their_weights(model, able):
    spec = models.load(model).twin
    bias, each = torch.zeros(spec.routing.num_experts), torch.ones(spec.routing.num_experts)
    given = (bias if spec.routing.correction_bias else None, each if model == "gemma4" else None)
    logits = torch.randn(5, spec.routing.num_experts, generator=torch.Generator().manual_seed(1))
    plain, _ = make_router(spec.routing, *given, 1.0).select_experts(logits)
    router = make_router(spec.routing, *given, 1.75)
    weights, _ = router.select_experts(logits)
    assert router.scales is able
    torch.testing.assert_close(weights, plain * 1.75 if able else plain)


@pytest.mark.parametrize(
    ("option", "who"),
    [("scale=router", ROUTER), ("scale=kernel", KERNEL), ("scale=output", RUNNER),
     ("scale=router.experts=monolithic", KERNEL), ("scale=output.experts=monolithic", RUNNER)],
)  # fmt: skip
def test_a_layer_hands_s_to_one_actor_and_1_to_the_others(option, who):
    for layer in layers(f"deepseek_v3@tp2+{option}"):
        assert layer.plan.scaled_by == who
        kernel, router = layer.runner.kernel, layer.runner.router
        assert kernel.scale == (S if who == KERNEL else None)
        assert router.scale == (S if who == ROUTER else 1.0)


# the slot's own weight, times what is applied later, is 1: S counts once
SLOT_WEIGHT = {"router": 1.0, "kernel": 1 / S, "output": 1 / S}


@pytest.mark.parametrize(("scale", "weight"), SLOT_WEIGHT.items())
def test_a_shared_expert_in_a_slot_of_the_kernel_nets_to_the_weight_1(scale, weight):
    for layer in layers(f"deepseek_v3@tp2+scale={scale}.shared=fused"):
        assert layer.runner.router.weight == pytest.approx(weight)
        assert not layer.runner.facts.has_shared_experts  # else S would count twice


# ------------------------------------------------------------------------- table (b): what each prepare/finalize answers

# class -> output is reduced, dtype of the ids it takes, others may run while results are on their way
ANSWERS = {
    NoDPEP: (False, torch.int32, False),
    Batched: (False, torch.int32, False),
    Naive: (False, torch.int32, False),
    NaiveBatched: (False, torch.int32, False),
    Passthrough: (True, torch.int32, False),
    DeepEPHTPrepareAndFinalize: (True, torch.int64, True),
    DeepEPLLPrepareAndFinalize: (True, torch.int64, True),
    NVLinkOneSidedPrepareAndFinalize: (True, torch.int32, False),  # vLLM 0.20 said "not reduced" and returned T*R
    NVLinkTwoSidedPrepareAndFinalize: (True, torch.int32, False),
}
# case -> the prepare/finalize that it gets
CHOSEN = {
    "mixtral@tp2": NoDPEP,
    "mixtral@tp4.ep2": NoDPEP,
    "mixtral@tp4.ep4": NoDPEP,
    "mixtral@tp2+experts=slots": NoDPEP,
    "mixtral@tp2+experts=batched": Batched,
    "mixtral@tp4.ep4+experts=batched": Batched,
    "mixtral@dp2": Naive,
    "mixtral@tp2.ep4.dp2": Naive,
    "mixtral@tp4.ep4.sp4": Naive,
    "mixtral@tp2.ep2.dp2+experts=batched": NaiveBatched,
    "mixtral@tp2+kernel=reduced": Passthrough,
    "mixtral@tp2.dp2+kernel=reduced": Passthrough,
    "mixtral@tp4.ep4.sp4+kernel=reduced": Passthrough,
    "mixtral@tp4.ep4+kernel=deepep_ht": DeepEPHTPrepareAndFinalize,
    "mixtral@tp2.ep4.dp2+kernel=deepep_ht": DeepEPHTPrepareAndFinalize,
    "mixtral@tp2.ep4.dp2+kernel=deepep_ll": DeepEPLLPrepareAndFinalize,
    "mixtral@tp2.ep4.dp2+kernel=nvlink_one_sided": NVLinkOneSidedPrepareAndFinalize,
    "mixtral@tp2.ep4.dp2.sp2+kernel=nvlink_two_sided": NVLinkTwoSidedPrepareAndFinalize,
}

PLACED = {text: kind for text, kind in CHOSEN.items() if ".ep" in text}  # with ep=1 there is nothing to place


@pytest.mark.parametrize(("text", "kind"), CHOSEN.items(), ids=list(CHOSEN))
def test_each_prepare_finalize_answers_as_table_b_says(text, kind):
    reduced, dtype, overlaps = ANSWERS[kind]
    for layer in layers(text):
        kernel, transport = layer.runner.kernel, layer.runner.kernel.prepare_finalize
        assert type(transport) is kind
        assert (transport.output_is_reduced, kernel.output_is_reduced) == (reduced, reduced)
        assert (transport.topk_indices_dtype, kernel.topk_indices_dtype) == (dtype, dtype)
        assert (transport.supports_async, kernel.supports_async) == (overlaps, overlaps)


@pytest.mark.parametrize("option", ["", "+experts=batched", "+experts=monolithic"])
@pytest.mark.parametrize("grid", ["tp2", "dp2", "tp2.ep4.dp2.sp2"])
def test_a_passthrough_around_any_kind_of_experts_is_reduced(grid, option):
    text = f"mixtral@{grid}{option or '+experts=auto'}.kernel=reduced"
    assert all(layer.runner.kernel.output_is_reduced for layer in layers(text))


@pytest.mark.parametrize("placement", ["linear", "round_robin", "replicas"])
@pytest.mark.parametrize(("text", "kind"), PLACED.items(), ids=list(PLACED))
def test_ids_reach_the_kernel_in_the_dtype_it_asks_for(text, kind, placement):
    case = parse(f"{text}{'.' if '+' in text else '+'}placement={placement}")
    given, seen = problem(case), []

    def body(comm):
        layer = RunnerSystem().build(case, given.weights, comm)
        transport = layer._layer.runner.kernel.prepare_finalize
        right = transport.prepare

        def prepare(x, weights, ids):
            seen.append((weights.dtype, ids.dtype))
            return right(x, weights, ids)

        transport.prepare = prepare
        layer(given.tokens.hidden_states[case.rows[comm.rank]].clone())

    run_ranks(case.grid, body).unwrap()
    assert seen == [(torch.float32, ANSWERS[kind][1])] * case.grid.ranks


@pytest.mark.parametrize(
    ("before", "after", "routed", "shared"),
    [
        ("partial", "reduced", Reduced.BY_KERNEL, Reduced.EARLY),
        ("partial", "deepep_ht", Reduced.BY_KERNEL, Reduced.EARLY),
        ("nvlink_two_sided", "deepep_ll", Reduced.BY_KERNEL, Reduced.EARLY),
        ("deepep_ht", "partial", Reduced.FINAL, Reduced.FINAL),
        ("reduced", "partial", Reduced.FINAL, Reduced.FINAL),
    ],
)
def test_the_reduced_flag_is_asked_of_the_kernel_that_is_there_at_the_call(before, after, routed, shared):
    for layer in layers(f"deepseek_v3@tp2.ep4.dp2+kernel={before}"):
        layer.swap_kernel(after)
        assert (layer.plan.routed_reduced, layer.plan.shared_reduced) == (routed, shared)


# -------------------------------------------------------------------- tables (c) and (d): where each part is reduced

# table (d), its 12 cells, and ep groups of several ranks, which vLLM does not have. SP, cut over moe.tp, moe.ep or neither, R reduced by the kernel -> final all-reduce of R+S
FINAL_ALL_REDUCE = [
    (True, ONE_RANK, False, False),
    (True, ONE_RANK, True, False),
    (True, CUT_OVER_TP, False, False),
    (True, CUT_OVER_TP, True, False),
    (True, WHOLE_EXPERTS, False, False),
    (True, WHOLE_EXPERTS, True, False),
    (False, ONE_RANK, False, False),
    (False, ONE_RANK, True, False),
    (False, CUT_OVER_TP, False, True),
    (False, CUT_OVER_TP, True, False),
    (False, WHOLE_EXPERTS, False, True),  # over tp although the work was split over ep
    (False, WHOLE_EXPERTS, True, False),
    (False, EP_GROUPS, False, True),
    (False, EP_GROUPS, True, False),
]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transform", ["none", "commutative"])
@pytest.mark.parametrize(("sp", "sizes", "by_kernel", "final"), FINAL_ALL_REDUCE)
def test_the_final_all_reduce_is_made_in_the_cells_of_table_d(sp, sizes, by_kernel, final, shared, transform):
    found = plan(
        sequence_parallel=sp, **sizes, output_is_reduced=by_kernel, has_shared_experts=shared, transform=transform
    )
    assert found.final_all_reduce is final


@pytest.mark.parametrize(("sp", "sizes", "by_kernel", "final"), FINAL_ALL_REDUCE)
def test_a_caller_that_reduces_itself_takes_the_place_of_the_final_all_reduce_and_of_no_other(
    sp, sizes, by_kernel, final
):
    right = plan(sequence_parallel=sp, **sizes, output_is_reduced=by_kernel)
    found = plan(sequence_parallel=sp, **sizes, output_is_reduced=by_kernel, reduce_results=False)
    both = (found.routed_reduced, found.shared_reduced)
    if final:
        assert both == (Reduced.BY_CALLER, Reduced.BY_CALLER)
        assert found.all_reduces == 0
    else:
        assert found == right  # nothing is left for the caller, and the layer says so


# step 14: an ordered transform needs the complete R, wherever table (d) would have reduced late
EARLY_R = [
    (True, CUT_OVER_TP, False, False),
    (True, CUT_OVER_TP, True, False),
    (False, ONE_RANK, False, False),
    (False, ONE_RANK, True, False),
    (False, CUT_OVER_TP, False, True),
    (False, CUT_OVER_TP, True, False),
    (False, WHOLE_EXPERTS, False, True),
    (False, WHOLE_EXPERTS, True, False),
    (False, EP_GROUPS, False, True),
    (False, EP_GROUPS, True, False),
]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(("sp", "sizes", "by_kernel", "early"), EARLY_R)
def test_an_ordered_transform_gets_its_routed_sum_reduced_before_it(sp, sizes, by_kernel, early, shared, reduce):
    found = plan(
        sequence_parallel=sp, **sizes, output_is_reduced=by_kernel, has_shared_experts=shared, transform="ordered",
        reduce_results=reduce,
    )  # fmt: skip
    assert (found.routed_reduced is Reduced.EARLY) is early
    assert not found.final_all_reduce
    assert found.routed_reduced is not Reduced.BY_CALLER


# table (c), its 4 rows. S exists, SP, R reduced before the sum -> where S is reduced
SHARED_REDUCED = [
    (False, False, False, None),
    (False, False, True, None),
    (False, True, False, None),
    (False, True, True, None),
    (True, True, False, Reduced.BY_ROWS),  # complete, and the rows of each rank are others
    (True, True, True, Reduced.BY_ROWS),
    (True, False, True, Reduced.EARLY),
    (True, False, False, Reduced.FINAL),
]


@pytest.mark.parametrize("sizes", [CUT_OVER_TP, WHOLE_EXPERTS, EP_GROUPS], ids=["moe.tp", "moe.ep", "both"])
@pytest.mark.parametrize("by", ["kernel", "step 14"])
@pytest.mark.parametrize(("shared", "sp", "reduced", "where"), SHARED_REDUCED)
def test_shared_experts_are_reduced_in_the_rows_of_table_c(shared, sp, reduced, where, by, sizes):
    by_kernel = reduced and by == "kernel"
    transform = "ordered" if reduced and by == "step 14" else "none"
    found = plan(
        has_shared_experts=shared, sequence_parallel=sp, output_is_reduced=by_kernel, transform=transform, **sizes
    )
    assert found.shared_reduced is where


# both together: sizes, reduced by the kernel, ordered transform, shared -> R where, S where, all-reduces of the runner
WHERE_REDUCED = [
    # upstream asks S's group, of one rank here, to add it up: a no-op that the plan leaves out
    (ONE_RANK, False, False, True, Reduced.NOT_NEEDED, Reduced.NOT_NEEDED, 0),
    (ONE_RANK, True, False, True, Reduced.NOT_NEEDED, Reduced.NOT_NEEDED, 0),
    (ONE_RANK, False, True, True, Reduced.NOT_NEEDED, Reduced.NOT_NEEDED, 0),
    (ONE_RANK, False, False, False, Reduced.NOT_NEEDED, None, 0),
    (CUT_OVER_TP, False, False, True, Reduced.FINAL, Reduced.FINAL, 1),
    (CUT_OVER_TP, False, False, False, Reduced.FINAL, None, 1),
    (CUT_OVER_TP, True, False, True, Reduced.BY_KERNEL, Reduced.EARLY, 1),
    (CUT_OVER_TP, True, False, False, Reduced.BY_KERNEL, None, 0),
    (CUT_OVER_TP, False, True, True, Reduced.EARLY, Reduced.EARLY, 2),
    (CUT_OVER_TP, False, True, False, Reduced.EARLY, None, 1),
    (CUT_OVER_TP, True, True, True, Reduced.BY_KERNEL, Reduced.EARLY, 1),
    (CUT_OVER_TP, True, True, False, Reduced.BY_KERNEL, None, 0),
]


@pytest.mark.parametrize(("sizes", "by_kernel", "ordered", "shared", "routed_at", "shared_at", "count"), WHERE_REDUCED)
def test_each_part_is_reduced_where_tables_c_and_d_say(sizes, by_kernel, ordered, shared, routed_at, shared_at, count):
    transform = "ordered" if ordered else "none"
    found = plan(**sizes, output_is_reduced=by_kernel, transform=transform, has_shared_experts=shared)
    assert (found.routed_reduced, found.shared_reduced, found.all_reduces) == (routed_at, shared_at, count)


def test_a_commutative_transform_keeps_the_one_final_all_reduce():
    assert plan(transform="commutative").routed_reduced is Reduced.FINAL


def test_deferring_the_final_reduction_leaves_both_parts_to_the_caller():
    found = plan(reduce_results=False)
    assert (found.routed_reduced, found.shared_reduced, found.all_reduces) == (Reduced.BY_CALLER, Reduced.BY_CALLER, 0)


def test_nothing_is_reduced_under_sequence_parallelism():
    for by_kernel, transform, reduce in itertools.product([False, True], TRANSFORMS, [False, True]):
        found = plan(
            sequence_parallel=True, **WHOLE_EXPERTS, output_is_reduced=by_kernel, transform=transform,
            reduce_results=reduce,
        )  # fmt: skip
        assert (found.routed_reduced, found.shared_reduced, found.all_reduces) == (Reduced.BY_ROWS, Reduced.BY_ROWS, 0)


# grid -> tp, moe.tp, moe.ep, SP of the layer's facts
SIZES = {
    "tp1": (1, 1, 1, False),
    "tp2": (2, 2, 1, False),
    "dp2": (1, 2, 1, False),  # without ep the experts are cut over the dp ranks as well
    "tp2.dp2": (2, 4, 1, False),
    "tp4.ep2": (4, 2, 2, False),
    "tp4.ep4": (4, 1, 4, False),
    "tp2.ep4.dp2": (2, 1, 4, False),
    "tp2.ep2.dp2": (2, 2, 2, False),
    "tp4.ep4.sp4": (4, 1, 4, True),
    "tp2.ep4.dp2.sp2": (2, 1, 4, True),
}


@pytest.mark.parametrize(("grid", "sizes"), SIZES.items(), ids=list(SIZES))
def test_a_layer_decides_by_the_sizes_of_its_grid(grid, sizes):
    for layer in layers(f"mixtral@{grid}"):
        facts = layer.runner.facts
        tp = layer.runner.comm.tp.size
        assert (tp, facts.moe_tp, facts.moe_ep, facts.sequence_parallel) == sizes


# model -> transform, shared experts
PARTS = {
    "mixtral": ("none", False),
    "deepseek_v3": ("none", True),
    "nemotron_h": ("ordered", True),
    "nemotron_h+size=wide": ("commutative", True),
}


@pytest.mark.parametrize(("text", "parts"), PARTS.items(), ids=list(PARTS))
def test_a_latent_projection_is_ordered_exactly_if_it_has_a_bias(text, parts):
    (layer,) = layers(text)
    assert (layer.runner.facts.transform, layer.runner.facts.has_shared_experts) == parts


# ------------------------------------------------------------------------------------------------ table (e): widths

# padded, shared, transform -> cut before the sum
CUT = [
    (False, False, "none", False),
    (False, True, "none", False),
    (False, False, "commutative", False),
    (False, True, "commutative", False),
    (False, False, "ordered", False),
    (False, True, "ordered", False),
    (True, False, "none", False),  # gpt-oss kernels rely on the width being kept to the end
    (True, True, "none", True),
    (True, False, "commutative", True),
    (True, True, "commutative", True),
    (True, False, "ordered", True),
    (True, True, "ordered", True),
]


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize(("padded", "shared", "transform", "cut"), CUT)
def test_padding_is_cut_before_the_sum_only_where_table_e_says(padded, shared, transform, cut, sp, by_kernel):
    found = plan(
        padded=padded, has_shared_experts=shared, transform=transform, sequence_parallel=sp, output_is_reduced=by_kernel
    )
    assert found.cut_before_sum is cut


# case -> width of the kernel, cut before the sum: latent layers are padded from L = 32, others from H = 64
WIDTHS = {
    "mixtral@tp2": (64, False),
    "mixtral@tp2+pad=8": (72, False),
    "deepseek_v3@tp2+pad=8": (72, True),
    "deepseek_v3@tp2+shared=fused.pad=8": (72, False),
    "nemotron_h@tp2": (32, False),
    "nemotron_h@tp2+pad=8": (40, True),
    "nemotron_h@tp2+kernel=reduced.pad=8": (40, True),
}


@pytest.mark.parametrize(("text", "expected"), WIDTHS.items(), ids=list(WIDTHS))
def test_a_layer_pads_from_the_width_its_experts_work_in(text, expected):
    for layer in layers(text):
        assert (layer.runner.kernel.width, layer.plan.cut_before_sum) == expected


# --------------------------------------------------------------------------- table (f): when the shared experts run

NONE, FIRST = SharedExpertsOrder.NONE, SharedExpertsOrder.NO_OVERLAP
INSIDE, BESIDE = SharedExpertsOrder.MK_INTERNAL_OVERLAPPED, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
# shared, may not overlap, async kernel, side stream -> order, first match
ORDER = [
    (False, False, False, False, NONE),
    (False, False, False, True, NONE),
    (False, False, True, False, NONE),
    (False, False, True, True, NONE),
    (False, True, False, False, NONE),
    (False, True, False, True, NONE),
    (False, True, True, False, NONE),
    (False, True, True, True, NONE),
    (True, True, False, False, FIRST),
    (True, True, False, True, FIRST),
    (True, True, True, False, FIRST),
    (True, True, True, True, FIRST),
    (True, False, True, False, INSIDE),
    (True, False, True, True, INSIDE),
    (True, False, False, True, BESIDE),
    (True, False, False, False, FIRST),
]


@pytest.mark.parametrize(("shared", "apart", "runs_shared", "stream", "order"), ORDER)
def test_shared_experts_run_at_the_first_moment_that_fits_table_f(shared, apart, runs_shared, stream, order):
    found = plan(has_shared_experts=shared, no_overlap=apart, kernel_runs_shared=runs_shared, side_stream=stream)
    assert found.shared_order is order


# options on tp2.ep4.dp2 -> order. EPLB and an all-to-all kernel: no overlap; else inside the async ones
ORDER_OF = {
    "kernel=partial": FIRST,
    "kernel=reduced": FIRST,
    "kernel=deepep_ht": INSIDE,
    "kernel=deepep_ll": INSIDE,
    "kernel=nvlink_one_sided": FIRST,
    "kernel=nvlink_two_sided": FIRST,
    "kernel=deepep_ht.placement=permuted": FIRST,
    "kernel=deepep_ht.placement=replicas": FIRST,
    "kernel=deepep_ll.placement=replicas": FIRST,
    "kernel=nvlink_two_sided.placement=replicas": FIRST,
    "kernel=deepep_ht.placement=round_robin": INSIDE,  # another numbering, no load balancing
    "kernel=deepep_ll.placement=round_robin": INSIDE,
    "kernel=partial.placement=replicas": FIRST,
    "experts=monolithic": FIRST,
    "kernel=reduced.experts=monolithic": FIRST,
    "kernel=deepep_ht.order=1": FIRST,
    "kernel=deepep_ht.order=2": INSIDE,
    "kernel=deepep_ht.order=3": BESIDE,
    "kernel=partial.order=2": INSIDE,
    "kernel=partial.order=3": BESIDE,
    "experts=monolithic.order=3": BESIDE,
}


@pytest.mark.parametrize(("options", "order"), ORDER_OF.items(), ids=list(ORDER_OF))
def test_each_kernel_and_placement_gives_the_order_of_table_f(options, order):
    assert {layer.plan.shared_order for layer in layers(f"deepseek_v3@tp2.ep4.dp2+{options}")} == {order}
    without = f"mixtral@tp2.ep4.dp2+{options}"
    if "order" not in options:
        assert {layer.plan.shared_order for layer in layers(without)} == {NONE}


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ("kernel=partial.placement=replicas", INSIDE),  # load balancing forbids it to all-to-all kernels alone
        ("kernel=reduced.placement=replicas", INSIDE),
        ("experts=monolithic", FIRST),  # order 2 is never a monolithic kernel's, whatever its transport could do
        ("kernel=reduced.experts=monolithic", FIRST),
    ],
)
def test_a_transport_that_becomes_async_overlaps_where_table_f_lets_it(options, order):
    for layer in layers(f"deepseek_v3@tp2.ep4.dp2+{options}"):
        layer.runner.kernel.prepare_finalize.supports_async = True
        assert layer.plan.shared_order is order


def test_load_balancing_that_begins_between_two_calls_changes_the_order():
    """Facts of the call: nothing about the placement is remembered from the building of the layer."""
    for layer in layers("deepseek_v3@tp4.ep4+kernel=deepep_ht"):
        assert layer.plan.shared_order is INSIDE
        layer.place(replicated(16, 4, 4))
        assert layer.plan.shared_order is FIRST
        layer.place(linear(16, 4))
        assert layer.plan.shared_order is INSIDE


# ------------------------------------------------------------------------------- table (i): monolithic and modular


@pytest.mark.parametrize("grid", ["tp2", "dp2", "tp4.ep4", "tp2.ep4.dp2.sp2"])
@pytest.mark.parametrize("kernel", ["partial", "reduced"])
@pytest.mark.parametrize("monolithic", [False, True])
def test_routing_happens_once_in_the_runner_or_in_the_kernel(grid, kernel, monolithic):
    case = parse(f"deepseek_v3@{grid}+kernel={kernel}.experts={'monolithic' if monolithic else 'auto'}")
    given, asked = problem(case), []

    class Counting:
        """A router that tells how many rows it was asked for, and by whom."""

        def __init__(self, inner, who):
            self.inner, self.who, self.scales = inner, who, inner.scales

        def select_experts(self, logits):
            asked.append((self.who, logits.shape[0]))
            return self.inner.select_experts(logits)

    def body(comm):
        block = RunnerSystem().build(case, given.weights, comm)
        runner = block._layer.runner
        runner.router = Counting(runner.router, "runner")
        assert runner.kernel.is_monolithic is monolithic
        if monolithic:
            runner.kernel.experts._router = Counting(runner.kernel.experts._router, "kernel")
        block(given.tokens.hidden_states[case.rows[comm.rank]].clone())
        assert bool(runner.last_routing) is not monolithic

    run_ranks(case.grid, body).unwrap()
    # modular: each rank its own rows, before they travel; monolithic: all rows that have arrived
    own = {"tp2": [7, 7], "dp2": [3, 4], "tp4.ep4": [7] * 4, "tp2.ep4.dp2.sp2": [2] * 4}[grid]
    arrived = {"tp2": [7, 7], "dp2": [7, 7], "tp4.ep4": [7] * 4, "tp2.ep4.dp2.sp2": [8] * 4}[grid]
    rows = arrived if monolithic else own
    assert sorted(asked) == [("kernel" if monolithic else "runner", count) for count in rows]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("deepseek_v3@tp4.ep4+experts=monolithic.order=2", "no finalize to run them in"),
        ("deepseek_v3@tp4.ep4+experts=monolithic.placement=replicas", "load balancing cannot rename them"),
        ("deepseek_v3@tp4.ep4+experts=monolithic.placement=moved", "load balancing cannot rename them"),
        ("deepseek_v3@tp4.ep4+experts=monolithic.kernel=deepep_ht", "where a router has sent them"),
        ("deepseek_v3@tp4.ep4+experts=monolithic.kernel=deepep_ll", "rows sorted by expert"),
        ("deepseek_v3@tp4.ep4+experts=monolithic.kernel=nvlink_one_sided", "where a router has sent them"),
        ("deepseek_v3@tp4.ep4+experts=monolithic.kernel=nvlink_two_sided", "where a router has sent them"),
        ("deepseek_v3@tp4.ep4+experts=monolithic.swap=deepep_ht", "where a router has sent them"),
        ("deepseek_v3@tp2+experts=monolithic.junk=3", "pass by"),
    ],
)
def test_what_a_monolithic_kernel_has_no_place_for_is_refused(text, words):
    assert words in RunnerSystem().supports(parse(text))


def test_a_kernel_is_both_halves_modular_or_both_monolithic():
    modular = layers("mixtral@tp2.ep2+kernel=deepep_ht")[0].runner.kernel
    monolithic = layers("mixtral@tp2.ep2+experts=monolithic")[0].runner.kernel
    assert isinstance(modular.experts, TorchExperts)
    assert isinstance(monolithic.experts, MonolithicExperts)
    with pytest.raises(ValueError, match="both modular or both monolithic"):
        FusedMoEKernel(modular.prepare_finalize, monolithic.experts)
    batched = layers("mixtral@tp2.ep2+kernel=deepep_ll")[0].runner.kernel
    with pytest.raises(ValueError, match="hands over batched rows, TorchExperts takes standard ones"):
        FusedMoEKernel(batched.prepare_finalize, modular.experts)
    with pytest.raises(ValueError, match="hands over standard rows, BatchedExperts takes batched ones"):
        FusedMoEKernel(modular.prepare_finalize, batched.experts)


# ------------------------------------------------------------------------------------------- the whole decision space

# tp, moe.tp, moe.ep of grids that can be: one rank; tp; dp; both; ep over all; ep over some
GRIDS = [(1, 1, 1), (2, 2, 1), (1, 2, 1), (2, 4, 1), (4, 1, 4), (1, 1, 2), (2, 1, 4), (4, 2, 2), (8, 1, 8)]
KERNELS_OWN = (("all_gather", "dp"), ("all_to_all_single", "ep"), ("reduce_scatter", "dp"))


def every_decision() -> Iterator[tuple[LayerFacts, CallFacts]]:
    bools = [False, True]
    names = [name for name in CallFacts.__slots__ if name != "announced"]
    calls = [
        CallFacts(**dict(zip(names, facts, strict=True)), announced=KERNELS_OWN)
        for facts in itertools.product(bools, repeat=len(names))
    ]
    for (tp, moe_tp, moe_ep), s, transform in itertools.product(GRIDS, (1.0, 2.5), TRANSFORMS):
        for sp, flag, able, shared, reduce in itertools.product(bools, repeat=5):
            if sp and (tp == 1 or moe_tp > 1):
                continue  # there is no such grid
            layer = LayerFacts(
                moe_tp=moe_tp, moe_ep=moe_ep, sequence_parallel=sp, scale=s, apply_routed_scale_to_output=flag,
                router_scales=able, has_shared_experts=shared, transform=transform, reduce_results=reduce,
            )  # fmt: skip
            for call in calls:
                yield layer, call


def test_every_decision_scales_and_reduces_each_part_at_most_once():
    """A part that is partial is reduced by one hand, a complete one by none: the runner's or the caller's, not both."""
    count = 0
    for layer, call in every_decision():
        found = plan_output(layer, call)
        count += 1
        assert len(found.scaled_by) + (found.output_unit != 1.0) == (layer.scale != 1.0)
        both = (found.routed_reduced, found.shared_reduced)
        spread = not layer.sequence_parallel and layer.moe_tp * layer.moe_ep > 1
        caller = both[0] is Reduced.BY_CALLER  # who takes the sum of both
        routed = (both[0] is Reduced.EARLY) + found.final_all_reduce + caller
        assert routed == (spread and not call.output_is_reduced)
        if layer.has_shared_experts:
            assert (both[1] is Reduced.EARLY) + found.final_all_reduce + caller == spread
            assert (both[0] is Reduced.FINAL) == (both[1] is Reduced.FINAL)
            assert (both[0] is Reduced.BY_CALLER) == (both[1] is Reduced.BY_CALLER)
        else:
            assert both[1] is None
        assert not caller or not layer.reduce_results
        assert found.all_reduces <= 2
        assert not (found.final_all_reduce and Reduced.EARLY in both)  # one tensor, one all-reduce
        assert not (layer.transform == "ordered" and (found.final_all_reduce or caller))
    assert count > 100_000


def test_no_plan_names_ep_or_dp_beyond_the_kernel_s_own_collectives():
    for layer, call in every_decision():
        found = plan_output(layer, call)
        for batches in (1, 2, 3):
            told = found.collectives_of(batches)
            own = len(KERNELS_OWN) * batches
            assert told[:own] == KERNELS_OWN * batches
            assert told[own:] == (("all_reduce", "tp"),) * (found.all_reduces * batches)


def test_a_plan_with_two_scalers_is_refused():
    right = plan()
    with pytest.raises(ValueError, match="at most one actor"):
        OutputPlan(
            scaled_by=("router", "runner"), output_unit=1.0, routed_reduced=right.routed_reduced,
            shared_reduced=right.shared_reduced, shared_order=right.shared_order, cut_before_sum=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("routed", "shared"), [(Reduced.FINAL, Reduced.EARLY), (Reduced.EARLY, Reduced.FINAL),
                           (Reduced.BY_KERNEL, Reduced.FINAL), (Reduced.FINAL, Reduced.BY_CALLER),
                           (Reduced.BY_CALLER, Reduced.EARLY), (Reduced.EARLY, Reduced.BY_CALLER),
                           (Reduced.BY_KERNEL, Reduced.BY_CALLER), (Reduced.BY_ROWS, Reduced.EARLY)]
)  # fmt: skip
def test_a_plan_that_reduces_one_part_twice_or_never_is_refused(routed, shared):
    with pytest.raises(ValueError, match="one of them would be reduced twice"):
        OutputPlan(
            scaled_by=(), output_unit=1.0, routed_reduced=routed, shared_reduced=shared,
            shared_order=SharedExpertsOrder.NO_OVERLAP, cut_before_sum=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("shared", "order"), [(None, SharedExpertsOrder.NO_OVERLAP), (Reduced.FINAL, SharedExpertsOrder.NONE)]
)
def test_a_plan_that_runs_shared_experts_it_does_not_reduce_is_refused(shared, order):
    with pytest.raises(ValueError, match="contradicts shared_order"):
        OutputPlan(
            scaled_by=(), output_unit=1.0, routed_reduced=Reduced.FINAL, shared_reduced=shared, shared_order=order,
            cut_before_sum=False,
        )  # fmt: skip
