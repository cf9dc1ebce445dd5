"""Expert groups: which are kept, what they are made of, and what the experts of the dropped ones get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from harness.problem import Problem
from harness.variants.choice import ranked_by, ranking
from harness.variants.law import Variant, with_rule
from reference.moe import Stages


def groups(given: Problem, picks_MK: Tensor | None) -> Iterator[Variant]:
    """Nothing where the experts of a model stand in one group."""
    rule, wrong = given.spec.routing, partial(with_rule, given, picks_MK, "D5", "topk_ids")
    if rule.n_group <= 1:
        return
    for sentence, choose in _GROUPINGS.items():
        yield Variant("D5", "topk_ids", sentence, partial(_grouped, given, choose))
    for step, word in ((1, "many"), (-1, "few")):
        yield wrong(f"one group too {word} is kept", topk_group=rule.topk_group + step)
    fill = "experts of dropped groups get 0 instead of -inf, which beats a negative biased score"
    yield wrong(fill, group_fill=0.0)
    yield wrong("the expert groups are ignored", n_group=1, topk_group=1)
    other = "max" if rule.group_score == "top2" else "top2"
    yield wrong(f"groups are ranked by {other}", group_score=other)


def _grouped(given: Problem, choose: Callable[[Problem, Tensor], Tensor]) -> Stages:
    """choose: the mask [M, E] of experts whose group is kept."""
    ranked_ME = ranking(given)
    return ranked_by(given, ranked_ME.masked_fill(~choose(given, ranked_ME), -torch.inf))


def _kept(given: Problem, scores_MG: Tensor, *, largest: bool = True) -> Tensor:
    """The mask [M, E] of the experts in the topk_group groups of highest (or lowest) score."""
    routing = given.spec.routing
    best = scores_MG.topk(routing.topk_group, -1, largest=largest).indices
    kept_MG = torch.zeros_like(scores_MG, dtype=torch.bool).scatter(1, best, True)
    return kept_MG.repeat_interleave(routing.num_logits // routing.n_group, dim=1)


def _group_scores(given: Problem, ranked_ME: Tensor) -> Tensor:
    best = 1 if given.spec.routing.group_score == "max" else 2
    return ranked_ME.unflatten(1, (given.spec.routing.n_group, -1)).topk(best, -1).values.sum(-1)


def _strided_groups(given: Problem, ranked_ME: Tensor) -> Tensor:
    groups, count = given.spec.routing.n_group, ranked_ME.shape[1]
    order = torch.arange(count).view(-1, groups).T.flatten()  # group g holds experts g, g + groups, ...
    kept_ME = _kept(given, _group_scores(given, ranked_ME[:, order]))
    return torch.zeros_like(kept_ME).index_copy(1, order, kept_ME)


_GROUPINGS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "the best groups are dropped and the others kept": lambda g, r: ~_kept(g, _group_scores(g, r)),
    "the worst groups are kept, not the best": lambda g, r: _kept(g, _group_scores(g, r), largest=False),
    "the kept groups are those after the best": lambda g, r: _kept(g, _group_scores(g, r).roll(1, 1)),
    "groups are made of every n-th expert, not of neighbours": _strided_groups,
    "groups are ranked by the sum of all their scores": lambda g, r: _kept(
        g, r.unflatten(1, (g.spec.routing.n_group, -1)).sum(-1)
    ),
    "groups are ranked by their lowest score": lambda g, r: _kept(
        g, r.unflatten(1, (g.spec.routing.n_group, -1)).amin(-1)
    ),
    "groups are ranked without the correction bias": lambda g, r: _kept(g, _group_scores(g, g.stages.scores_ME)),
}
