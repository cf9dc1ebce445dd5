"""The space of placements, junk rows and transports: a fault in one combination of its axes is found there alone, and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reference.certificate as judge
from harness.case import parse_grid
from harness.certify import states
from harness.certify.dispatch import axes, world
from harness.certify.dispatch.ranks import alone
from harness.certify.dispatch.walk import differs, walk
from harness.certify.walk import Walked
from harness.runner import layer as layers
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.moe_runner import MoERunner
from harness.runner.placement import Placement
from harness.runner.prepare_finalize.all_to_all import DeepEPHTPrepareAndFinalize, DeepEPLLPrepareAndFinalize
from harness.runner.prepare_finalize.naive import Naive
from harness.runner.weight_and_reduce import TopKWeightAndReduceNaiveBatched

SMALL = {"experts": "auto", "beside": "none"}


def wrong_states(walked: Walked) -> list[dict[str, str]]:
    """The axes of each wrong state that is told of."""
    assert walked.wrongs == len(walked.wrong), "more than are told of"
    return [dict(word.split("=") for word in each.state.split()[2:]) for each in walked.wrong]


def values(found: list[dict[str, str]], *names: str) -> set[tuple[str, ...]]:
    return {tuple(word[name] for name in names) for word in found}


# ------------------------------------------------------------------------------------------------------- the space


def test_both_rules_know_the_same_layers_and_calls_and_demand_the_same():
    count = 0
    for grid in ("tp1", "dp3", "tp2.ep2", "tp4.ep4.sp4", "tp2.ep4.dp2", "tp4.ep2.dp2"):
        mine = {axes.code_of(layer): (layer, kernels) for layer, kernels in axes.layers_of(grid)}
        his = {place: (layer, kernels) for place, layer, kernels in judge.dispatch() if layer.grid == grid}
        assert {place: (tuple(layer), kernels) for place, (layer, kernels) in mine.items()} == {
            place: (tuple(layer), kernels) for place, (layer, kernels) in his.items()
        }
        for layer, kernels in mine.values():
            lawful = judge.Routed(*layer)
            assert set(axes.calls_of(layer, kernels)) == set(judge.trips(lawful, kernels))
            for call in axes.calls_of(layer, kernels):
                assert [list(map(list, rows)) for rows in world.coefficients((layer, call))] == judge.rows_home(lawful)
                right = judge.SPACES["dispatch"].ledger(lawful, judge.Trip(*call))
                assert [list(each) for each in world.ledger((layer, call))] == right
                count += 1
    assert count > 6000


@pytest.mark.parametrize("grid", ["tp1", "ep2.dp2", "tp4.ep2", "tp3.ep3.sp3"])
def test_a_right_layer_gives_the_law_in_every_state_of_a_grid(grid: str):
    walked = walk(grid)
    assert not walked.wrong
    assert walked.apart == 0
    assert walked.runs + walked.alike == walked.states > 100


def test_every_expert_is_met_by_some_row_and_no_two_rows_products_are_alike():
    for grid in axes.LAYER_AXES["grid"]:
        rows = {row for places in world.places(grid) for row in places}
        assert {expert for row in rows for expert in world.choice(grid, row)} == set(range(axes.experts_of(grid)))
        products = [weight * 4.0**row for row in rows for weight in {*world.choice(grid, row).values()}]
        assert len(set(products)) == len(products)


def test_the_placements_hold_every_expert_and_differ_from_linear_on_every_rank():
    for grid in axes.LAYER_AXES["grid"]:
        ep, count = parse_grid(grid).ep, axes.experts_of(grid)
        if ep == 1:
            continue
        linear = [(2 * rank, 2 * rank + 1) for rank in range(ep)]
        for name in ("round_robin", "permuted", "replicas", "moved"):
            layer = axes.Layer(grid, "auto", "none", name)
            placement = axes.settings_of(layer, "partial", later=True).placement
            assert placement is not None
            held = [placement.experts_of(rank) for rank in range(ep)]
            assert {expert for each in held for expert in each} == set(range(count))
            assert held != linear
            assert (len(placement.held) > count) == (name in ("replicas", "moved"))


def test_every_slot_of_every_placement_is_visited_by_a_row():
    for grid in axes.LAYER_AXES["grid"]:
        for name in ("linear", "round_robin", "permuted", "replicas", "moved") if parse_grid(grid).ep > 1 else ():
            layer = axes.Layer(grid, "auto", "none", name)
            placement = axes.settings_of(layer, "partial", later=True).placement
            visited: set[int] = set()
            for rows in world.places(grid):
                ids_MK = torch.tensor([list(world.choice(grid, row)) for row in rows], dtype=torch.int64)
                if placement is not None and len(rows):
                    visited.update(placement.to_physical(ids_MK).flatten().tolist())
            assert placement is None or visited == set(range(len(placement.held))), (grid, name, visited)


# ------------------------------------------------------------------------------------- one wrong combination among all


def test_junk_rows_that_shift_the_others_with_data_parallelism_alone_are_found(monkeypatch):
    right = Naive.scatter

    def scatter(self, out_NP, home):
        out_MP = right(self, out_NP, home)
        return out_MP.roll(1, 0) if self._group.name == "dp" and self.seen_junk else out_MP

    def gather(self, *rows):
        self.seen_junk = bool(rows[0].isnan().any())
        return gathered(self, *rows)

    gathered = Naive.gather
    monkeypatch.setattr(Naive, "gather", gather)
    monkeypatch.setattr(Naive, "scatter", scatter)
    where = SMALL | {"placement": "linear"}
    assert not walk("tp2", **where).wrong
    assert not walk("tp2.ep2", **where).wrong
    found = wrong_states(walk("dp2", **where))
    assert values(found, "rows") == {("junk",)}
    assert values(found, "kernel", "history") == {
        ("partial", "first"), ("partial", "after_reduced"), ("reduced", "first"), ("reduced", "after_partial"),
    }  # fmt: skip


def test_a_replica_counted_twice_by_one_transport_is_found_with_that_transport_and_replicas_alone(monkeypatch):
    right = FusedMoEKernel.steps

    def steps(self, x_MP, weights_MK, ids_MK):
        transport = self.prepare_finalize
        if isinstance(transport, DeepEPLLPrepareAndFinalize) and len(transport._owner_E) == 7:
            weights_MK = weights_MK * (1 + (ids_MK >= 4))  # the second slot of an expert that has two
        return right(self, x_MP, weights_MK, ids_MK)

    monkeypatch.setattr(FusedMoEKernel, "steps", steps)
    found = wrong_states(walk("tp2.ep2", **SMALL | {"placement": "replicas"}))
    assert values(found, "kernel") == {("deepep_ll",)}
    assert len(values(found, "history")) == 12
    assert len(found) == 18
    for placement in ("linear", "round_robin", "permuted"):
        assert not walk("tp2.ep2", **SMALL | {"placement": placement}).wrong


def test_a_placement_that_a_swapped_kernel_does_not_follow_is_found_after_swaps_of_moved_experts_alone(monkeypatch):
    place, swap = FusedMoE.place, FusedMoE.swap_kernel

    def swapped(self, backend):
        swap(self, backend)
        self.was_swapped = True

    def placed(self, placement):
        kernel = self.runner.kernel
        place(self, placement)
        if getattr(self, "was_swapped", False):
            self.runner.kernel = kernel

    monkeypatch.setattr(FusedMoE, "swap_kernel", swapped)
    monkeypatch.setattr(FusedMoE, "place", placed)
    walked = walk("tp4.ep2", experts="auto", beside="zero")
    found = wrong_states(walked)
    assert values(found, "placement") == {("moved",)}
    assert values(found, "kernel", "history") == {
        (kernel, f"{batches}after_{other}")
        for kernel, other in (("partial", "reduced"), ("reduced", "partial"))
        for batches in ("", "two_batches_")
    }
    assert values(found, "rows") == {("whole",), ("junk",)}


def test_a_second_micro_batch_on_the_old_placement_is_found_there_alone(monkeypatch):
    route, physical, init = MoERunner._route, MoERunner._physical, MoERunner.__init__

    def built(self, facts, parts, comm):
        init(self, facts, parts, comm)
        self.first_placement = parts.placement

    def routed(self, router_logits_ME, num_tokens, micro_batch):
        self.turn = micro_batch
        return route(self, router_logits_ME, num_tokens, micro_batch)

    def to_physical(self, ids_MK):
        if self.turn == 0:
            return physical(self, ids_MK)
        now, self.placement = self.placement, self.first_placement
        try:
            return physical(self, ids_MK)
        finally:
            self.placement = now

    monkeypatch.setattr(MoERunner, "__init__", built)
    monkeypatch.setattr(MoERunner, "_route", routed)
    monkeypatch.setattr(MoERunner, "_physical", to_physical)
    found = wrong_states(walk("tp4.ep2", **SMALL))
    assert values(found, "placement") == {("moved",)}
    assert {history.startswith("two_batches_") for (history,) in values(found, "history")} == {True}


def test_a_transport_that_remembers_its_first_rows_is_found_in_its_second_micro_batch(monkeypatch):
    right = DeepEPHTPrepareAndFinalize.receive

    def receive(self, sent, prepared):
        out_MP = right(self, sent, prepared)
        self.most = max(getattr(self, "most", 0), out_MP.shape[0])
        return out_MP if out_MP.shape[0] == self.most else out_MP * 2

    monkeypatch.setattr(DeepEPHTPrepareAndFinalize, "receive", receive)
    found = wrong_states(walk("tp3.ep3.sp3", **SMALL | {"placement": "linear"}))
    assert values(found, "kernel") == {("deepep_ht",)}
    assert {history.startswith("two_batches_") for (history,) in values(found, "history")} == {True}


def test_something_that_outlives_a_layer_is_told_though_each_state_is_right_by_itself(monkeypatch):
    right, first = MoERunner._physical, {}

    def to_physical(self, ids_MK):
        _, runner = first.setdefault(id(self.comm), (self.comm, self))  # the first that this rank has built
        return right(self, ids_MK if runner is self else ids_MK.roll(1, -1))

    monkeypatch.setattr(MoERunner, "_physical", to_physical)
    walked = walk("tp4.ep2", **SMALL | {"placement": "permuted"})
    assert walked.wrongs > 0
    assert all("something outlives a layer" in each.text for each in walked.wrong)


def test_shards_in_the_wrong_slots_of_one_rank_are_found_and_the_rank_is_named(monkeypatch):
    right = Placement.experts_of

    def experts_of(self, ep_rank):
        held = right(self, ep_rank)
        return held[::-1] if ep_rank == 1 and self.is_identity and self.owners[1] == 1 else held  # round robin

    monkeypatch.setattr(Placement, "experts_of", experts_of)
    walked = walk("tp2.ep2", **SMALL | {"beside": "shared"})
    assert walked.wrongs > len(walked.wrong) > 0
    assert {word.split("placement=")[1].split()[0] for each in walked.wrong for word in [each.state]} == {"round_robin"}
    assert "rank 0, row 2: expert 1 1, expected 5; rank 0, row 2: expert 3 5, expected 1" in walked.wrong[0].text
    assert not walk("tp2.ep2", **SMALL | {"placement": "linear"}).wrong


def test_rows_sorted_by_expert_that_are_lost_beside_slots_without_one_are_found_with_zero_experts_alone(monkeypatch):
    right = TopKWeightAndReduceNaiveBatched.apply

    def apply(self, y_EBP, weights_NK, batch):
        out_NP = right(self, y_EBP, weights_NK, batch)
        own = (weights_NK > 0).any(1)
        return out_NP * 0 if own.all() and len(batch.n_J) < weights_NK.numel() else out_NP

    monkeypatch.setattr(TopKWeightAndReduceNaiveBatched, "apply", apply)
    found = wrong_states(walk("tp2", experts="batched"))
    assert values(found, "beside", "rows") == {("zero", "whole")}


def test_a_raise_in_one_state_is_told_with_that_state_and_spares_the_others(monkeypatch):
    right = layers.FusedMoE.place

    def place(self, placement):
        if self._settings.kernel == "reduced":
            raise RuntimeError("no room")
        right(self, placement)

    monkeypatch.setattr(layers.FusedMoE, "place", place)
    found = wrong_states(walk("tp4.ep2", **SMALL))
    assert values(found, "placement", "kernel") == {("moved", "reduced")}
    assert "RuntimeError: no room" in walk("tp4.ep2", **SMALL | {"placement": "moved"}).wrong[0].text


def test_a_state_by_itself_tells_what_is_wrong_with_coefficients_and_ledger():
    layer = axes.Layer("tp2.ep2", "auto", "zero", "replicas")
    state = (layer, axes.Call("nvlink_one_sided", "two_batches_after_deepep_ht", "whole"))
    right: Any = alone(state)
    assert right[0] == world.coefficients(state)
    assert set(right[1]) == {world.ledger(state)}
    assert differs(state, (world.coefficients(state), world.ledger(state))) == ""
    assert "ledger" in differs(state, (world.coefficients(state), (("broadcast", "tp"),)))
    plain = layer._replace(beside="none")
    assert "token 5, expected 0" in differs(state, (world.coefficients((plain, state[1])), world.ledger(state)))
    assert states.before(state[1].history) == "deepep_ht"
