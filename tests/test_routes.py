"""Route certificates against brute force: every choice that perturbed scores lead to is listed, and nothing else is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.moe import forward, renormalize, score, select_experts
from reference.routes import legal_routes, undecided_rows
from reference.spec import Activation, Experts, MoESpec, Output, RouterPrecision, Routing, weight_shapes

PLAIN = Routing(
    num_experts=8,
    top_k=3,
    scoring_func="softmax",
    score_after_topk=False,
    correction_bias=False,
    n_group=1,
    topk_group=1,
    group_score="max",
    group_fill=-math.inf,
    renormalize=True,
    renormalize_rule="add",
    renormalize_epsilon=1e-20,
    routed_scaling_factor=2.5,
    per_expert_scale=False,
    router_bias=False,
    router_norm_epsilon=None,
    sparsemixer_epsilon=None,
    weight_on="output",
    num_zero_experts=0,
    precision=RouterPrecision(logits="fp32", scores="fp32", weights="fp32"),
)
ROUTINGS = {
    "plain": PLAIN,
    "biased": replace(PLAIN, scoring_func="sigmoid", correction_bias=True),
    "chosen before scored": replace(PLAIN, score_after_topk=True, renormalize=False),
    "top1": replace(PLAIN, top_k=1, scoring_func="sqrtsoftplus"),
    "all": replace(PLAIN, top_k=8),
    "groups by their best": replace(PLAIN, n_group=4, topk_group=2, group_fill=0.0),
    "groups by their two best": replace(
        PLAIN, scoring_func="sigmoid", correction_bias=True, n_group=4, topk_group=2, group_score="top2", top_k=2
    ),
    "whole groups": replace(PLAIN, n_group=4, topk_group=2, group_score="top2", top_k=4),
    "large groups": replace(PLAIN, n_group=2, topk_group=1, group_score="top2", top_k=2),
}
SPARSEMIXER = replace(PLAIN, top_k=2, scoring_func="sparsemixer", renormalize=False, sparsemixer_epsilon=0.1)


def _drawn(routing: Routing, seed: int, spread: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits, bias and deltas of one token; the larger the spread, the more choices are legal."""
    rng = torch.Generator().manual_seed(seed)
    logits_E = torch.randn(8, generator=rng, dtype=torch.float64)
    bias_E = -2 + 0.2 * torch.randn(8, generator=rng, dtype=torch.float64) if routing.correction_bias else None
    size = 0.15 if routing.score_after_topk or routing.scoring_func in ("sparsemixer", "sqrtsoftplus") else 0.02
    return logits_E, bias_E, spread * size * torch.rand(8, generator=rng, dtype=torch.float64)


def _chosen_by(routing: Routing, ranked_ME: Tensor) -> list[frozenset[int]]:
    """The sets that `select_experts` takes when these are the ranking scores."""
    if routing.score_after_topk:
        choice = select_experts(ranked_ME, ranked_ME, None, routing)
    else:  # the scores as the ranking has them: a bias would be added to them a second time
        choice = select_experts(ranked_ME, ranked_ME, None, replace(routing, correction_bias=False))
    return [frozenset(ids) for ids in choice.topk_ids_MK.tolist()]


def _perturbed(ranked_E: Tensor, delta_E: Tensor, count: int, seed: int) -> Tensor:
    """Scores within their intervals, most of them at an end, where the rare choices are."""
    rng = torch.Generator().manual_seed(seed)
    u_ME = 2 * torch.rand(count, 8, generator=rng, dtype=torch.float64) - 1
    at_end_ME = torch.rand(count, 8, generator=rng) < 0.7
    return ranked_E + delta_E * torch.where(at_end_ME, u_ME.sign(), u_ME)


def _ranked(routing: Routing, logits_E: Tensor, bias_E: Tensor | None) -> Tensor:
    ranked_E = logits_E if routing.score_after_topk else score(logits_E, routing)
    return ranked_E if bias_E is None else ranked_E + bias_E


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])
def test_every_choice_that_perturbed_scores_lead_to_is_listed(routing: Routing, spread: float) -> None:
    for seed in range(8):
        logits_E, bias_E, delta_E = _drawn(routing, seed, spread)
        listed = legal_routes(routing, logits_E, bias_E, delta_E, limit=10_000)
        assert listed is not None
        sets = [frozenset(choice.topk_ids_MK[0].tolist()) for choice in listed]
        assert len(set(sets)) == len(sets)
        reached = set(_chosen_by(routing, _perturbed(_ranked(routing, logits_E, bias_E), delta_E, 2000, seed)))
        assert reached <= set(sets)
        if len(reached) > 1:
            assert undecided_rows(routing, logits_E[None], bias_E, delta_E[None]).all()


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_every_listed_choice_is_reached_by_some_perturbation(routing: Routing) -> None:
    listed_in_all = 0
    for seed in range(25):
        logits_E, bias_E, delta_E = _drawn(routing, seed, 1.0)
        listed = legal_routes(routing, logits_E, bias_E, delta_E, limit=10_000)
        assert listed is not None
        missing = {frozenset(choice.topk_ids_MK[0].tolist()) for choice in listed}
        listed_in_all += len(missing)
        for attempt in range(100):
            ranked_ME = _perturbed(_ranked(routing, logits_E, bias_E), delta_E, 2000, 1000 * seed + attempt)
            missing -= set(_chosen_by(routing, ranked_ME))
            if not missing:
                break
        assert not missing
    assert listed_in_all > 25 or routing.top_k == 8


def _sparsemixer_outcomes(logits_E: Tensor, moved_ME: Tensor) -> set[tuple[float, ...]]:
    """Picks and masks by the moved logits, weights by the exact ones; the code is apart from both of reference/."""
    left_ME, picks, weights = moved_ME.clone(), [], []
    for _ in range(2):
        best_M1, pick_M1 = left_ME.max(1, keepdim=True)
        close_ME = (best_M1 - moved_ME) / torch.maximum(moved_ME.abs(), best_M1) <= 0.2
        total_M1 = (logits_E.exp() * (close_ME & left_ME.isfinite())).sum(1, keepdim=True)
        picks.append(pick_M1)
        weights.append(logits_E.exp()[pick_M1] / total_M1)
        left_ME.scatter_(1, pick_M1, -math.inf)
    return {_rounded(row) for row in torch.cat([*picks, *weights], 1).tolist()}


def _rounded(row: list[float]) -> tuple[float, ...]:
    return tuple(round(number, 12) for number in row)


@pytest.mark.parametrize("shift", [3.0, 0.0, -3.0])
def test_sparsemixer_lists_picks_and_masks_that_rounding_may_change_and_no_others(shift: float) -> None:
    several = 0
    for seed in range(25):
        logits_E, _, delta_E = _drawn(SPARSEMIXER, seed, 0.5)
        logits_E = logits_E + shift
        listed = legal_routes(SPARSEMIXER, logits_E, None, delta_E, limit=1000)
        assert listed is not None
        found = {_rounded([*c.topk_ids_MK[0].tolist(), *c.topk_weights_MK[0].tolist()]) for c in listed}
        assert len(found) == len(listed)
        several += len(listed) > 1
        reached: set[tuple[float, ...]] = set()
        for attempt in range(200):
            moved_ME = _perturbed(logits_E, delta_E, 2000, 99 * seed + attempt)
            reached |= _sparsemixer_outcomes(logits_E, moved_ME)
            if found <= reached:
                break
        assert found == reached
        if len(found) > 1:
            assert undecided_rows(SPARSEMIXER, logits_E[None], None, delta_E[None]).all()
    assert several > 5


@pytest.mark.parametrize("routing", [*ROUTINGS.values(), SPARSEMIXER], ids=[*ROUTINGS, "sparsemixer"])
def test_without_error_the_only_route_is_the_oracles(routing: Routing) -> None:
    for seed in range(20):
        logits_E, bias_E, _ = _drawn(routing, seed, 1.0)
        listed = legal_routes(routing, logits_E, bias_E, torch.zeros(8, dtype=torch.float64))
        assert listed is not None
        (choice,) = listed
        scores_1E = score(logits_E, routing)[None]
        expected = select_experts(logits_E[None], scores_1E, bias_E, routing)
        assert choice.topk_ids_MK.tolist() == expected.topk_ids_MK.tolist()
        torch.testing.assert_close(choice.topk_weights_MK, expected.topk_weights_MK, rtol=1e-14, atol=0)
        assert not undecided_rows(routing, logits_E[None], bias_E, torch.zeros(1, 8, dtype=torch.float64)).any()


def test_an_exact_tie_has_two_routes_without_any_error() -> None:
    logits_E = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    routing = replace(PLAIN, top_k=2)
    listed = legal_routes(routing, logits_E, None, torch.zeros(8, dtype=torch.float64))
    assert listed is not None
    assert sorted(choice.topk_ids_MK[0].tolist() for choice in listed) == [[1, 2], [1, 3]]
    assert undecided_rows(routing, logits_E[None], None, torch.zeros(1, 8, dtype=torch.float64)).all()


def test_a_list_longer_than_the_limit_is_no_list() -> None:
    equal_E = torch.zeros(8, dtype=torch.float64)
    assert legal_routes(PLAIN, equal_E, None, equal_E, limit=math.comb(8, 3) - 1) is None
    listed = legal_routes(PLAIN, equal_E, None, equal_E, limit=math.comb(8, 3))
    assert listed is not None
    assert len(listed) == math.comb(8, 3)


def test_a_route_carries_the_experts_own_scales() -> None:
    routing = replace(PLAIN, per_expert_scale=True)
    scale_E = torch.arange(1.0, 9.0, dtype=torch.float64)
    logits_E, _, delta_E = _drawn(routing, 3, 4.0)
    listed = legal_routes(routing, logits_E, None, delta_E, scale_E, limit=1000)
    assert listed is not None
    assert len(listed) > 1
    for choice in listed:
        ids = choice.topk_ids_MK[0]
        expected = renormalize(score(logits_E, routing)[ids][None], routing)[0] * scale_E[ids]
        torch.testing.assert_close(choice.topk_weights_MK[0], expected, rtol=1e-14, atol=0)


def test_forward_takes_a_route_as_its_choice() -> None:
    spec = MoESpec(
        hidden_size=16,
        routing=replace(PLAIN, per_expert_scale=True),
        experts=Experts(
            intermediate_size=8,
            activation=Activation(kind="relu2", gated=False, clamp="none", limit=None, alpha=1.0, up_offset=0.0),
            bias=False,
            layout="halved",
            transposed=False,
            latent_size=None,
            latent_bias=False,
        ),
        shared=None,
        output=Output(combine="sum"),
        vision=None,
    )
    rng = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(shape, generator=rng, dtype=torch.float64) for n, shape in weight_shapes(spec).items()}
    x_1H = torch.randn(1, 16, generator=rng, dtype=torch.float64)
    stages = forward(spec, weights, x_1H)
    no_error_E = torch.zeros(8, dtype=torch.float64)
    listed = legal_routes(spec.routing, stages.logits_ME[0], None, no_error_E, weights["per_expert_scale"])
    assert listed is not None
    (choice,) = listed
    torch.testing.assert_close(forward(spec, weights, x_1H, choice=choice).output_MH, stages.output_MH)
