"""Which rank holds which expert: the tables against plain loops, turns of replicas, and what a layer makes of a placement.

E experts, P physical slots, M tokens, K top-k.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import models
from harness.case import parse_grid
from harness.comm import Communicator
from harness.comm.simulated import run_ranks
from harness.runner.layer import FusedMoE, LayerSettings
from harness.runner.placement import Placement, linear, physical, replicated, round_robin
from harness.weights import make_tokens, make_weights
from reference.moe import forward

SPEC = models.load("deepseek_v3").twin
EXPERTS = SPEC.routing.num_experts
PLAIN = LayerSettings(apply_routed_scale_to_output=False)
WEIGHTS = make_weights(SPEC, 1, torch.float32)
X = make_tokens(SPEC, 9, 1, torch.float32).hidden_states
OUTPUT = forward(SPEC, WEIGHTS, X).output_MH


def on_ranks(
    grid: str, config: LayerSettings, use: Callable[[FusedMoE, Tensor], Tensor] = lambda layer, x: layer(x)
) -> list[Tensor]:
    """[M, H] of each rank in float64; every rank of the grid holds the same tokens."""

    def body(comm: Communicator) -> Tensor:
        return use(FusedMoE(SPEC, config, WEIGHTS, comm), X.clone()).double()

    with torch.inference_mode():
        return list(run_ranks(parse_grid(grid), body).unwrap())


def agrees(got: Tensor, expected: Tensor) -> bool:
    return bool(((got - expected).norm(dim=-1) <= 2e-6 * expected.norm(dim=-1)).all())


def counts(placement: Placement, ep: int) -> list[int]:
    return [len(placement.experts_of(rank)) for rank in range(ep)]


@st.composite
def tables(draw: st.DrawFn, experts: int, ep: int, multiple: int = 1) -> Placement:
    """Any replica table: each expert somewhere, the rest of the slots (a multiple in all) drawn, in any order."""
    least = -(-experts // multiple)
    slots = draw(st.integers(least, least + 12 // multiple), label="slots / multiple") * multiple
    drawn = random.Random(draw(st.integers(0, 2**32), label="seed"))
    held = [*range(experts), *(drawn.randrange(experts) for _ in range(slots - experts))]
    drawn.shuffle(held)
    return physical(held, experts, ep)


# ------------------------------------------------------------------------------------------------ who holds what


def test_ten_experts_on_four_ranks_are_dealt_three_three_two_two():
    placement = linear(10, 4)
    assert [placement.experts_of(rank) for rank in range(4)] == [(0, 1, 2), (3, 4, 5), (6, 7), (8, 9)]
    assert placement.owner_map().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, -1]
    assert placement.local_map().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, -1]
    assert placement.expert_map(1).tolist() == [-1, -1, -1, 0, 1, 2, -1, -1, -1, -1, -1]


def test_round_robin_deals_expert_e_to_rank_e_mod_n_as_its_e_div_n_th():
    placement = round_robin(10, 4)
    assert [placement.experts_of(rank) for rank in range(4)] == [(0, 4, 8), (1, 5, 9), (2, 6), (3, 7)]
    assert placement.owner_map().tolist() == [*(e % 4 for e in range(10)), -1]
    assert placement.local_map().tolist() == [*(e // 4 for e in range(10)), -1]


def test_the_first_placement_under_load_balancing_repeats_the_first_experts_behind_all_others():
    placement = replicated(6, 4, 2)
    assert placement.held == (0, 1, 2, 3, 4, 5, 0, 1)
    assert [placement.experts_of(rank) for rank in range(4)] == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert not placement.is_identity
    assert linear(6, 4).is_identity
    assert round_robin(6, 4).is_identity
    assert replicated(6, 4, 0) == linear(6, 4)


@given(experts=st.integers(1, 40), ep=st.integers(1, 12))
def test_each_expert_has_one_owner_and_no_rank_two_more_than_another(experts, ep):
    for placement in (linear(experts, ep), round_robin(experts, ep)):
        held = [placement.experts_of(rank) for rank in range(ep)]
        assert sorted(e for part in held for e in part) == list(range(experts))
        assert counts(placement, ep) == sorted(counts(placement, ep), reverse=True)
        assert max(map(len, held)) - min(map(len, held)) <= 1
    assert [e for rank in range(ep) for e in linear(experts, ep).experts_of(rank)] == list(range(experts))


@given(data=st.data(), experts=st.integers(1, 12), ep=st.integers(1, 6))
def test_the_maps_lead_each_slot_to_the_expert_that_it_holds(data, experts, ep):
    placement = data.draw(tables(experts, ep))
    owner, local = placement.owner_map().tolist(), placement.local_map().tolist()
    assert (owner[-1], local[-1]) == (-1, -1)
    for slot, expert in enumerate(placement.held):
        assert placement.experts_of(owner[slot])[local[slot]] == expert
    for rank in range(ep):
        of_rank = placement.expert_map(rank).tolist()
        assert of_rank == [place if at == rank else -1 for at, place in zip(owner, local, strict=True)]
        assert sorted(place for place in of_rank if place >= 0) == list(range(len(placement.experts_of(rank))))


# ------------------------------------------------------------------------------------------------ turns of replicas


def test_replicas_take_turns_by_row_with_the_hash_of_upstream():
    placement = physical((0, 1, 0, 0), 2, 2)  # expert 0 in the slots 0, 2 and 3
    ids = placement.to_physical(torch.zeros(6, 1, dtype=torch.int64)).flatten().tolist()
    # (row * 2654435769 mod 2**32) mod 3, worked out by hand: 0, 2654435769, 1013904242, 3668340011, 2027808484, 387276957
    assert ids == [[0, 2, 3][turn] for turn in (0, 0, 2, 2, 1, 0)]
    assert placement.to_physical(torch.ones(6, 1, dtype=torch.int64)).flatten().tolist() == [1] * 6


@given(data=st.data(), experts=st.integers(1, 12), rows=st.integers(0, 300), top_k=st.integers(1, 4))
def test_every_slot_chosen_holds_the_expert_asked_for_and_follows_the_hash(data, experts, rows, top_k):
    placement = data.draw(tables(experts, 2))
    drawn = random.Random(data.draw(st.integers(0, 2**32)))
    asked = [[drawn.randrange(experts) for _ in range(top_k)] for _ in range(rows)]
    got = placement.to_physical(torch.tensor(asked, dtype=torch.int64).view(rows, top_k))
    assert got.shape == (rows, top_k)
    for row, (want, slots) in enumerate(zip(asked, got.tolist(), strict=True)):
        for expert, slot in zip(want, slots, strict=True):
            replicas = [s for s, held in enumerate(placement.held) if held == expert]
            assert slot == replicas[row * 2654435769 % 2**32 % len(replicas)]


@given(rows=st.integers(300, 3000), replicas=st.integers(2, 4))
def test_no_replica_of_an_expert_is_left_without_its_share_of_many_rows(rows, replicas):
    placement = physical((0,) * replicas, 1, replicas)
    share = placement.to_physical(torch.zeros(rows, 1, dtype=torch.int64)).flatten().bincount(minlength=replicas) / rows
    assert ((share - 1 / replicas).abs() < 0.1 / replicas).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(data=st.data(), experts=st.integers(1, 12))
def test_ids_that_are_no_expert_become_minus_one_and_leave_the_others_alone(dtype, data, experts):
    placement = data.draw(tables(experts, 3))
    inside = torch.arange(experts, dtype=dtype)[:, None]
    outside = torch.tensor(
        [-1, -2, experts, experts + 1, len(placement.held) + experts, 2**31 - 1, -(2**31)], dtype=dtype
    )
    mixed = torch.cat([inside, outside.expand(experts, -1)], 1)
    got = placement.to_physical(mixed)
    assert (got[:, 1:] == -1).all()
    assert torch.equal(got[:, :1], placement.to_physical(inside))
    assert torch.equal(mixed, torch.cat([inside, outside.expand(experts, -1)], 1))  # the captured ids stay


# ------------------------------------------------------------------------------------------------ in a layer


@pytest.mark.parametrize("grid", ["tp2.ep2", "tp4.ep2", "tp3.ep3"])
@pytest.mark.parametrize("make", [linear, round_robin])
def test_a_placement_of_experts_that_the_ranks_do_not_divide_leaves_y_unchanged(make, grid):
    if grid == "tp3.ep3":
        assert EXPERTS % 3
    for y in on_ranks(grid, replace(PLAIN, placement=make(EXPERTS, parse_grid(grid).ep))):
        assert agrees(y, OUTPUT)


@pytest.mark.parametrize(
    "kernel", ["partial", "reduced", "deepep_ht", "deepep_ll", "nvlink_one_sided", "nvlink_two_sided"]
)
@pytest.mark.parametrize("ep", [2, 4])
@given(data=st.data())
@settings(max_examples=10)
def test_any_replica_table_leaves_y_unchanged(ep, kernel, data):
    placement = data.draw(tables(EXPERTS, ep, multiple=ep))
    for y in on_ranks(f"tp{ep}.ep{ep}", replace(PLAIN, placement=placement, kernel=kernel)):
        assert agrees(y, OUTPUT)


def test_a_table_that_names_the_wrong_expert_changes_y():
    wrong = physical([1, 0, *range(2, EXPERTS)], EXPERTS, 2)

    def use(layer: FusedMoE, x: Tensor) -> Tensor:
        layer.runner.placement = wrong  # the router's side alone: the weights stay where they were
        return layer(x)

    assert not all(agrees(y, OUTPUT) for y in on_ranks("tp2.ep2", replace(PLAIN, placement=linear(EXPERTS, 2)), use))


@pytest.mark.parametrize("kernel", ["partial", "deepep_ht", "deepep_ll"])
@given(data=st.data())
@settings(max_examples=10)
def test_experts_placed_anew_between_two_calls_change_ranks_and_not_y(kernel, data):
    first, second = data.draw(tables(EXPERTS, 2, multiple=2)), data.draw(tables(EXPERTS, 2, multiple=2))

    def use(layer: FusedMoE, x: Tensor) -> Tensor:
        assert layer.placement == first
        before = layer(x)
        layer.place(second)
        assert layer.placement == second
        assert layer.runner.kernel.experts.weights.w2_EPi.shape[0] == len(second.held) // 2
        return torch.stack([before, layer(x)])

    for before, after in on_ranks("tp2.ep2", replace(PLAIN, placement=first, kernel=kernel), use):
        assert agrees(before, OUTPUT)
        assert agrees(after, OUTPUT)


def test_a_kernel_swapped_after_a_move_keeps_the_experts_where_they_are():
    def use(layer: FusedMoE, x: Tensor) -> Tensor:
        layer.place(physical([*reversed(range(EXPERTS))], EXPERTS, 2))
        layer.swap_kernel("deepep_ht")
        return layer(x)

    for y in on_ranks("tp2.ep2", PLAIN, use):
        assert agrees(y, OUTPUT)


def test_a_move_keeps_the_kernel_that_was_swapped_in():
    def use(layer: FusedMoE, x: Tensor) -> Tensor:
        layer.swap_kernel("deepep_ht")
        before = layer.runner.kernel.announced
        layer.place(replicated(EXPERTS, 2, 2))
        assert layer.runner.kernel.announced == before
        return layer(x)

    on_ranks("tp2.ep2", PLAIN, use)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: physical((0, 1, 1), 3, 3), "has no slot for expert 2"),
        (lambda: physical((0, 3), 2, 2), "holds expert 3: expected 0 to 1"),
        (lambda: physical((0, -1, 1), 2, 2), "holds expert -1"),
        (lambda: Placement((0,), (0, 1), 2), "1 owners for 2 physical slots"),
    ],
    ids=["missing", "beyond", "negative", "owners"],
)
def test_a_table_that_would_lose_tokens_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("grid", "placement", "words"),
    [
        ("tp1", linear(EXPERTS, 1), "placement with ep=1: every rank holds a piece"),
        ("tp2", linear(EXPERTS, 2), "placement with ep=1: every rank holds a piece"),
        ("tp2.ep2", linear(EXPERTS - 1, 2), f"placement of {EXPERTS - 1} experts"),
        ("tp2.ep2", linear(EXPERTS + 1, 2), f"expected {EXPERTS} experts on ep=2"),
        ("tp2.ep2", linear(EXPERTS, 4), f"placement of {EXPERTS} experts on 4 ranks"),
        ("tp2.ep2", replicated(EXPERTS, 2, 1), r"\(1 of them redundant\).*Use 1 more redundant"),
        ("tp4.ep4", replicated(EXPERTS, 4, 1), "Use 3 more redundant"),
    ],
)
def test_a_placement_that_the_grid_cannot_hold_is_refused(grid, placement, words):
    with pytest.raises(ValueError, match=words):
        on_ranks(grid, replace(PLAIN, placement=placement))


def test_moving_experts_of_which_every_rank_has_a_piece_is_refused():
    def use(layer: FusedMoE, x: Tensor) -> Tensor:
        layer.place(linear(EXPERTS, 2))
        return x

    with pytest.raises(ValueError, match="nothing to place"):
        on_ranks("tp2", PLAIN, use)


def test_experts_that_route_by_themselves_refuse_renamed_experts():
    with pytest.raises(ValueError, match="load balancing cannot rename them"):
        on_ranks("tp2.ep2", replace(PLAIN, placement=replicated(EXPERTS, 2, 2), experts="monolithic"))


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (linear(EXPERTS - 1, 2), f"placement of {EXPERTS - 1} experts"),
        (linear(EXPERTS, 4), "on 4 ranks"),
        (replicated(EXPERTS, 2, 1), "redundant"),
    ],
)
def test_a_move_to_a_placement_that_the_layer_would_refuse_is_refused_as_well(placement, words):
    def use(layer: FusedMoE, x: Tensor) -> Tensor:
        layer.place(placement)
        return layer(x)

    with pytest.raises(ValueError, match=words):
        on_ranks("tp2.ep2", PLAIN, use)


def test_moving_experts_that_route_by_themselves_is_refused():
    def use(layer: FusedMoE, x: Tensor) -> Tensor:
        layer.place(physical([*reversed(range(EXPERTS))], EXPERTS, 2))
        return layer(x)

    with pytest.raises(ValueError, match="load balancing cannot rename them"):
        on_ranks("tp2.ep2", replace(PLAIN, experts="monolithic"), use)
