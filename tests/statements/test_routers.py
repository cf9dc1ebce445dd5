"""Statements 28 to 32: what every router does with scores at the edge: negative, zero, tied, not a number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness import models
from harness.runner.router import FusedMoERouter, make_router
from harness.weights import make_weights
from reference.spec import Routing
from tests.drawn_layers import ZERO_EXPERTS

ROUTINGS = {name: models.load(name).twin.routing for name in models.names()} | {"zero experts": ZERO_EXPERTS.routing}
SPECS = {name: models.load(name).twin for name in models.names()} | {"zero experts": ZERO_EXPERTS}
BIASED = [name for name, routing in ROUTINGS.items() if routing.correction_bias]
GROUPED = [name for name in BIASED if ROUTINGS[name].n_group > 1]


def logits_of(routing: Routing, rows: int = 6, seed: int = 2) -> Tensor:
    return torch.randn(rows, routing.num_logits, generator=torch.Generator().manual_seed(seed))


def router_of(name: str, bias: Tensor | None = None, scale: float = 1.0) -> FusedMoERouter:
    weights = make_weights(SPECS[name], 1, torch.float32)
    if bias is None:
        bias = weights.get("e_score_correction_bias")
    return make_router(ROUTINGS[name], bias, weights.get("per_expert_scale"), scale)


def are_legal(ids_MK: Tensor, routing: Routing) -> bool:
    """In range and distinct."""
    rows = ids_MK.tolist()
    return all(len(set(row)) == routing.top_k and 0 <= min(row) <= max(row) < routing.num_logits for row in rows)


@pytest.mark.parametrize("shift", [-0.999, -1.0, -1.5, -3.0, -1000.0])
@pytest.mark.parametrize("name", BIASED)
def test_28_negative_biased_scores_choose_the_same_experts_as_positive_ones(name: str, shift: float):
    """A bias that all experts share cannot change the choice, however far below 0 or -1 it takes the scores."""
    routing = ROUTINGS[name]
    # multiples of 1/8: adding the shift then rounds nothing away
    step = torch.arange(routing.num_logits, dtype=torch.float32).flip(0) * 8
    logits = logits_of(routing)
    weights, ids = router_of(name, step).select_experts(logits)
    lower, same = router_of(name, step + (shift - 1) * step.max() * 2).select_experts(logits)
    assert torch.equal(ids.sort(-1).values, same.sort(-1).values)
    assert torch.equal(weights.sum(-1), lower.sum(-1))
    assert are_legal(router_of(name, torch.full((routing.num_logits,), shift)).select_experts(logits)[1], routing)


@pytest.mark.parametrize("shift", [-0.999, -1.5, -3.0, -1000.0])
@pytest.mark.parametrize("name", GROUPED)
def test_28_experts_of_dropped_groups_are_never_chosen_however_negative_the_others(name: str, shift: float):
    routing = ROUTINGS[name]
    logits, bias = logits_of(routing, rows=64), torch.full((routing.num_logits,), shift)
    _, ids = router_of(name, bias).select_experts(logits)
    assert are_legal(ids, routing)
    size = routing.num_logits // routing.n_group
    scores = logits.softmax(-1) if routing.scoring_func == "softmax" else logits.sigmoid()
    ranked = (scores + bias).unflatten(1, (routing.n_group, size))
    best = ranked.topk(2 if routing.group_score == "top2" else 1).values.sum(-1).topk(routing.topk_group).indices
    assert ((ids // size)[:, :, None] == best[:, None, :]).any(-1).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("name", [name for name, routing in ROUTINGS.items() if routing.renormalize])
def test_29_renormalising_a_sum_of_zero_stays_finite(name: str, scoring: str):
    """Sigmoid and softplus of -200 are 0 in fp32; a biased softmax may choose experts whose scores are all 0."""
    if ROUTINGS[name].score_after_topk and scoring != "softmax":
        return  # no page scores after choosing and renormalises scores that can all be 0
    routing = replace(ROUTINGS[name], scoring_func=scoring)
    logits, bias = torch.full((2, routing.num_logits), -200.0), None
    if routing.correction_bias:
        logits[:, 0] = 200.0  # softmax: all weight on an expert that the bias keeps out
        bias = torch.ones(routing.num_logits)
        bias[: routing.num_logits // routing.n_group] = -1.0
    scale_of = torch.ones(routing.num_experts) if routing.per_expert_scale else None
    weights, ids = make_router(routing, bias, scale_of, 2.5).select_experts(logits)
    assert weights.isfinite().all()
    assert are_legal(ids, routing)


@pytest.mark.parametrize("name", ROUTINGS)
@given(data=st.data())
def test_30_ties_give_distinct_experts_of_the_tied_set(name: str, data: st.DataObject):
    """Every expert with more than the lowest chosen logit is chosen, and nobody with less."""
    routing = replace(ROUTINGS[name], n_group=1, topk_group=1)
    values = data.draw(
        st.lists(st.sampled_from((-1.0, 0.0, 2.0)), min_size=routing.num_logits, max_size=routing.num_logits)
    )
    scale_of = torch.ones(routing.num_experts) if routing.per_expert_scale else None
    bias = torch.zeros(routing.num_logits) if routing.correction_bias else None
    weights, ids = make_router(routing, bias, scale_of, 1.0).select_experts(torch.tensor([values]))
    assert are_legal(ids, routing)
    assert sorted(values[e] for e in ids[0].tolist()) == sorted(values)[-routing.top_k :]
    if routing.scoring_func != "sparsemixer":  # whose second weight leaves out the first pick
        by_value: dict[float, set[float]] = {}
        for e, weight in zip(ids[0].tolist(), weights[0].tolist(), strict=True):
            by_value.setdefault(values[e], set()).add(weight)
        assert all(len(found) == 1 for found in by_value.values())


@pytest.mark.parametrize("name", GROUPED)
def test_30_tied_groups_give_experts_of_as_many_groups_as_are_kept(name: str):
    routing = ROUTINGS[name]
    _, ids = router_of(name, torch.zeros(routing.num_logits)).select_experts(torch.zeros(3, routing.num_logits))
    assert are_legal(ids, routing)
    for row in (ids // (routing.num_logits // routing.n_group)).tolist():
        assert len(set(row)) <= routing.topk_group


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, "one nan", "one inf", "half -inf"], ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
def test_31_logits_that_are_no_numbers_give_legal_ids_and_leave_other_rows_bit_equal(name: str, junk):
    routing, router = ROUTINGS[name], router_of(name)
    clean = logits_of(routing)
    spoiled = clean.clone()
    match junk:
        case "one nan" | "one inf":
            spoiled[2, 1] = torch.nan if junk == "one nan" else torch.inf
        case "half -inf":
            spoiled[2, ::2] = -torch.inf
        case _:
            spoiled[2] = junk
    right, found = router.select_experts(clean), router.select_experts(spoiled)
    rows = [0, 1, 3, 4, 5]
    for before, after in zip(right, found, strict=True):
        assert torch.equal(before[rows], after[rows])
    assert are_legal(found[1], routing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
def test_32_router_weights_are_fp32_whatever_the_logits_are(name: str, dtype: torch.dtype):
    weights, ids = router_of(name, scale=2.5).select_experts(logits_of(ROUTINGS[name]).to(dtype))
    assert weights.dtype is torch.float32
    assert ids.dtype is torch.int64
    assert weights.shape == ids.shape == (6, ROUTINGS[name].top_k)
