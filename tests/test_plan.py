"""The decision tables of the refactored runner, cell by cell: who scales, where each part is reduced, what order, what cut.

Each table is written out as upstream's 0.32 behaves, not derived from plan.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from harness.runner.plan import CallFacts, LayerFacts, OutputPlan, Reduced, SharedExpertsOrder, plan_output

LAYER = LayerFacts(
    tp=4, scale=2.5, apply_routed_scale_to_output=True, router_scales=True, has_shared_experts=True, transform="none",
    reduce_results=True,
)  # fmt: skip
CALL = CallFacts(
    output_is_reduced=False, kernel_scales=False, kernel_runs_shared=False, side_stream=False, half_precision=False, padded=False
)  # fmt: skip


def plan(**changes: object) -> OutputPlan:
    layer = {name: value for name, value in changes.items() if name in LayerFacts.__slots__}
    call = {name: value for name, value in changes.items() if name in CallFacts.__slots__}
    assert len(layer) + len(call) == len(changes)
    return plan_output(replace(LAYER, **layer), replace(CALL, **call))


# table (a): flag, router able, kernel scales, fp16, shared -> who, unit
WHO_SCALES = [
    (False, True, False, False, True, ("router",), 1.0),
    (False, True, False, True, True, ("router",), 1.0),  # fp16 matters only with the flag
    (False, False, False, False, True, ("runner",), 1.0),  # plain and custom routers hand s on, upstream loses it
    (False, False, False, True, True, ("runner",), 1.0),
    (False, True, True, False, True, ("kernel",), 1.0),
    (False, True, True, True, False, ("kernel",), 1.0),
    (True, True, False, False, True, ("runner",), 1.0),
    (True, True, False, False, False, ("runner",), 1.0),
    (True, True, False, True, False, ("runner",), 1.0),  # fp16 without shared experts: s * R
    (True, True, False, True, True, (), 1 / 2.5),  # R + S/s, declared
    (True, False, False, True, True, (), 1 / 2.5),
]


@pytest.mark.parametrize(("flag", "able", "kernel", "fp16", "shared", "who", "unit"), WHO_SCALES)
def test_exactly_the_actor_of_table_a_scales(flag, able, kernel, fp16, shared, who, unit):
    found = plan(
        apply_routed_scale_to_output=flag, router_scales=able, kernel_scales=kernel, half_precision=fp16, has_shared_experts=shared
    )  # fmt: skip
    assert (found.scaled_by, found.output_unit) == (who, unit)


@pytest.mark.parametrize("changes", list(itertools.product([False, True], repeat=5)))
def test_a_factor_of_one_is_multiplied_by_nobody(changes):
    names = ("apply_routed_scale_to_output", "router_scales", "kernel_scales", "half_precision", "has_shared_experts")
    found = plan(scale=1.0, **dict(zip(names, changes, strict=True)))
    assert (found.scaled_by, found.output_unit) == ((), 1.0)


# tables (c) and (d): tp > 1, reduced by the kernel, ordered transform, shared -> R where, S where, final all-reduce
WHERE_REDUCED = [
    (1, False, False, True, Reduced.NOT_NEEDED, Reduced.NOT_NEEDED, 0),
    (1, True, False, True, Reduced.NOT_NEEDED, Reduced.NOT_NEEDED, 0),
    (1, False, True, True, Reduced.NOT_NEEDED, Reduced.NOT_NEEDED, 0),
    (1, False, False, False, Reduced.NOT_NEEDED, None, 0),
    (4, False, False, True, Reduced.FINAL, Reduced.FINAL, 1),
    (4, False, False, False, Reduced.FINAL, None, 1),
    (4, True, False, True, Reduced.BY_KERNEL, Reduced.EARLY, 1),
    (4, True, False, False, Reduced.BY_KERNEL, None, 0),
    (4, False, True, True, Reduced.EARLY, Reduced.EARLY, 2),
    (4, False, True, False, Reduced.EARLY, None, 1),
    (4, True, True, True, Reduced.BY_KERNEL, Reduced.EARLY, 1),
    (4, True, True, False, Reduced.BY_KERNEL, None, 0),
]


@pytest.mark.parametrize(("tp", "by_kernel", "ordered", "shared", "routed_at", "shared_at", "count"), WHERE_REDUCED)
def test_each_part_is_reduced_where_tables_c_and_d_say(tp, by_kernel, ordered, shared, routed_at, shared_at, count):
    transform = "ordered" if ordered else "none"
    found = plan(tp=tp, output_is_reduced=by_kernel, transform=transform, has_shared_experts=shared)
    assert (found.routed_reduced, found.shared_reduced, found.all_reduces) == (routed_at, shared_at, count)


def test_a_commutative_transform_keeps_the_one_final_all_reduce():
    assert plan(transform="commutative").routed_reduced is Reduced.FINAL


def test_deferring_the_final_reduction_leaves_both_parts_to_the_caller():
    found = plan(reduce_results=False)
    assert (found.routed_reduced, found.shared_reduced, found.all_reduces) == (Reduced.BY_CALLER, Reduced.BY_CALLER, 0)


# table (e): padded, shared, transform -> cut before the sum
CUT = [
    (False, True, "none", False),
    (False, False, "commutative", False),
    (True, True, "none", True),
    (True, False, "commutative", True),
    (True, False, "none", False),  # gpt-oss kernels rely on the width being kept to the end
    (True, True, "ordered", True),
]


@pytest.mark.parametrize(("padded", "shared", "transform", "cut"), CUT)
def test_padding_is_cut_before_the_sum_only_where_table_e_says(padded, shared, transform, cut):
    assert plan(padded=padded, has_shared_experts=shared, transform=transform).cut_before_sum is cut


# table (f), first match: shared, async kernel, side stream -> order
ORDER = [
    (False, True, True, SharedExpertsOrder.NONE),
    (True, True, False, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED),
    (True, True, True, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED),
    (True, False, True, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED),
    (True, False, False, SharedExpertsOrder.NO_OVERLAP),
]


@pytest.mark.parametrize(("shared", "runs_shared", "stream", "order"), ORDER)
def test_shared_experts_run_at_the_first_moment_that_fits_table_f(shared, runs_shared, stream, order):
    found = plan(has_shared_experts=shared, kernel_runs_shared=runs_shared, side_stream=stream)
    assert found.shared_order is order


def every_decision():
    bools = [False, True]
    for tp, s, transform in itertools.product((1, 2, 8), (1.0, 2.5), ("none", "commutative", "ordered")):
        for flag, able, shared, reduce in itertools.product(bools, repeat=4):
            layer = LayerFacts(
                tp=tp, scale=s, apply_routed_scale_to_output=flag, router_scales=able, has_shared_experts=shared,
                transform=transform, reduce_results=reduce,
            )  # fmt: skip
            for facts in itertools.product(bools, repeat=6):
                yield layer, CallFacts(**dict(zip(CallFacts.__slots__, facts, strict=True)))


def test_every_decision_scales_and_reduces_each_part_at_most_once():
    for layer, call in every_decision():
        found = plan_output(layer, call)
        assert len(found.scaled_by) + (found.output_unit != 1.0) == (layer.scale != 1.0)
        both = (found.routed_reduced, found.shared_reduced)
        assert (both[0] is Reduced.FINAL) == found.final_all_reduce
        if layer.has_shared_experts:
            assert (both[0] is Reduced.FINAL) == (both[1] is Reduced.FINAL)
        assert found.all_reduces <= 2


def test_a_plan_with_two_scalers_is_refused():
    right = plan()
    with pytest.raises(ValueError, match="at most one actor"):
        OutputPlan(
            scaled_by=("router", "runner"), output_unit=1.0, routed_reduced=right.routed_reduced,
            shared_reduced=right.shared_reduced, shared_order=right.shared_order, cut_before_sum=False,
        )  # fmt: skip


def test_a_plan_that_reduces_one_part_twice_is_refused():
    with pytest.raises(ValueError, match="one of them would be reduced twice"):
        OutputPlan(
            scaled_by=(), output_unit=1.0, routed_reduced=Reduced.FINAL, shared_reduced=Reduced.EARLY,
            shared_order=SharedExpertsOrder.NO_OVERLAP, cut_before_sum=False,
        )  # fmt: skip
