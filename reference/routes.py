"""Route certificates: which choices of experts are legal for a token whose scores lie closer than rounding can tell.

Every ranking score of the router may be off by its delta (rounding.router_error). A choice is legal if some scores
within these intervals lead to it, ties included. The lists are exact: nothing reachable is missing, nothing else in.

Names end in their shape: M tokens, E experts, K top-k, G groups. low and high are the ends of the scores' intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reference.moe import Choice, renormalize, score
from reference.spec import Routing

_MOST_TRIED = 10_000  # combinations looked at for one token; beyond that nothing is decided


class _TooManyError(Exception):
    """More legal choices than the caller wants, or too many candidates to find out."""


def undecided_rows(routing: Routing, logits_ME: Tensor, bias_E: Tensor | None, delta_ME: Tensor) -> Tensor:
    """Bool [M]: rows for which more than one choice may be legal. `legal_routes` lists them, and may find just one.

    logits_ME, delta_ME: float64 [M, E]; bias_E: float [E] or None, the correction bias.
    """
    if routing.scoring_func == "sparsemixer":
        return _undecided_sparsemixer(logits_ME, delta_ME, 2 * (routing.sparsemixer_epsilon or 0.0))
    ranked_ME = _ranked(routing, logits_ME, bias_E)
    low_ME, high_ME = ranked_ME - delta_ME, ranked_ME + delta_ME
    undecided_M = torch.zeros(ranked_ME.shape[0], dtype=torch.bool, device=ranked_ME.device)
    if routing.n_group > 1:
        low_MG, group_MG, high_MG = (_group_scores(r_ME, routing) for r_ME in (low_ME, ranked_ME, high_ME))
        undecided_M = _overlap(group_MG, low_MG, high_MG, routing.topk_group)
        kept_MG = torch.zeros_like(group_MG, dtype=torch.bool)
        kept_MG.scatter_(1, _descending(group_MG)[:, : routing.topk_group], True)
        dropped_ME = ~kept_MG.repeat_interleave(routing.num_logits // routing.n_group, 1)
        ranked_ME, low_ME, high_ME = (
            t.masked_fill(dropped_ME, routing.group_fill) for t in (ranked_ME, low_ME, high_ME)
        )
    return undecided_M | _overlap(ranked_ME, low_ME, high_ME, routing.top_k)


def legal_routes(
    routing: Routing,
    logits_E: Tensor,
    bias_E: Tensor | None,
    delta_E: Tensor,
    per_expert_scale_E: Tensor | None = None,
    limit: int = 64,
) -> list[Choice] | None:
    """Every legal choice for one token, as `forward(..., choice=...)` takes it; None if there are more than limit.

    logits_E, delta_E: float64 [E], a row of stages.logits_ME and of `router_error`; delta 0 leaves exact ties alone.
    bias_E, per_expert_scale_E: float [E], needed where the routing has them.
    Each Choice has M = 1, the ids best first by the exact scores, the weights of exactly this choice, computed in
    float64 from the exact scores and multiplied by per_expert_scale, and a margin of 0. The list is in no order.
    """
    logits_1E = logits_E.double()[None]
    try:
        if routing.scoring_func == "sparsemixer":
            picks = _sparsemixer_routes(logits_E.double(), delta_E, 2 * (routing.sparsemixer_epsilon or 0.0), limit)
            found = [(list(ids), torch.tensor([chances], dtype=torch.float64)) for ids, chances in picks]
        else:
            ranked_E = _ranked(routing, logits_1E, bias_E)[0]
            best_first = _descending(ranked_E).tolist()
            sets = _expert_sets(routing, ranked_E - delta_E, ranked_E + delta_E, limit)
            orders = [[e for e in best_first if e in chosen] for chosen in sets]
            found = [(ids, _weights(routing, logits_1E, ids)) for ids in orders]
    except _TooManyError:
        return None
    choices = []
    for ids, weights_1K in found:
        ids_1K = torch.tensor([ids])
        scaled_1K = weights_1K if per_expert_scale_E is None else weights_1K * per_expert_scale_E.double()[ids_1K]
        choices.append(Choice(ids_1K, scaled_1K, torch.zeros(1, dtype=torch.float64)))
    return choices


def _ranked(routing: Routing, logits_ME: Tensor, bias_E: Tensor | None) -> Tensor:
    ranked_ME = logits_ME if routing.score_after_topk else score(logits_ME, routing)
    return ranked_ME if bias_E is None else ranked_ME + bias_E


def _weights(routing: Routing, logits_1E: Tensor, ids: list[int]) -> Tensor:
    if routing.score_after_topk:
        return renormalize(score(logits_1E[:, ids], routing), routing)
    return renormalize(score(logits_1E, routing)[:, ids], routing)


def _group_scores(ranked: Tensor, routing: Routing) -> Tensor:
    """Scores of the groups over the last dimension; they grow with each expert's score, so ends give ends."""
    grouped = ranked.reshape(*ranked.shape[:-1], routing.n_group, routing.num_logits // routing.n_group)
    return grouped.topk(1 if routing.group_score == "max" else 2, -1).values.sum(-1)


def _descending(ranked: Tensor) -> Tensor:
    return torch.argsort(ranked, dim=-1, descending=True, stable=True)


def _overlap(ranked: Tensor, low: Tensor, high: Tensor, kept: int) -> Tensor:
    """Whether one of the rest can reach one of the kept best."""
    if kept == ranked.shape[1]:
        return torch.zeros(ranked.shape[0], dtype=torch.bool, device=ranked.device)
    order = _descending(ranked)
    return high.gather(1, order[:, kept:]).amax(1) >= low.gather(1, order[:, :kept]).amin(1)


def _top_sets(low: Sequence[float], high: Sequence[float], size: int) -> Iterator[frozenset[int]]:
    """All sets of the given size that can be the largest: no low end outside exceeds a high end inside.

    Take the outsider with the greatest low end: all before it, by low end, are inside, and whoever reaches it may be.
    So each set comes once, and no other set is tried.
    """
    by_low = sorted(range(len(low)), key=lambda e: (-low[e], e))
    for inside in range(min(size, len(low) - 1) + 1):
        outsider = by_low[inside]
        free = [e for e in by_low[inside + 1 :] if high[e] >= low[outsider]]
        for more in itertools.combinations(free, size - inside):
            yield frozenset(by_low[:inside]).union(more)
    if size == len(low):
        yield frozenset(by_low)


def _expert_sets(routing: Routing, low_E: Tensor, high_E: Tensor, limit: int) -> list[frozenset[int]]:
    found: dict[frozenset[int], None] = {}
    low, high = low_E.tolist(), high_E.tolist()
    width = routing.num_logits // routing.n_group
    group_low, group_high = [0.0], [0.0]
    if routing.n_group > 1:
        group_low, group_high = (_group_scores(end_E, routing).tolist() for end_E in (low_E, high_E))
    tried = 0
    for groups in _top_sets(group_low, group_high, routing.topk_group):
        dropped = {e for e in range(routing.num_logits) if e // width not in groups}
        ranked_low, ranked_high = (
            [routing.group_fill if e in dropped else end[e] for e in range(routing.num_logits)] for end in (low, high)
        )
        for chosen in _top_sets(ranked_low, ranked_high, routing.top_k):
            tried += 1
            if tried > _MOST_TRIED:
                raise _TooManyError
            if routing.n_group > 1 and not _groups_win(routing, groups, chosen, low, high, ranked_high):
                continue
            found[chosen] = None
            if len(found) > limit:
                raise _TooManyError
    return list(found)


def _groups_win(
    routing: Routing,
    groups: frozenset[int],
    chosen: frozenset[int],
    low: Sequence[float],
    high: Sequence[float],
    ranked_high: Sequence[float],
) -> bool:
    """Whether the groups can be the best while the chosen experts are: the scores most in favour of both decide.

    The chosen stand at their high ends, others of the kept groups as high as the chosen let them, the dropped low.
    """
    ceiling = min(ranked_high[e] for e in chosen)
    width = routing.num_logits // routing.n_group
    best = []
    for e in range(routing.num_logits):
        if e // width not in groups:
            best.append(low[e])
        else:
            best.append(high[e] if e in chosen else min(high[e], max(ceiling, low[e])))
    scores = _group_scores(torch.tensor(best, dtype=torch.float64), routing).tolist()
    kept, rest = [scores[g] for g in groups], [scores[g] for g in range(routing.n_group) if g not in groups]
    return not rest or min(kept) >= max(rest)


def _sparsemixer_routes(
    logits_E: Tensor, delta_E: Tensor, width: float, limit: int
) -> list[tuple[tuple[int, int], tuple[float, float]]]:
    """Both picks with the weights that follow from each legal membership of the two masks.

    A logit l is close to the best one b if l >= edge(b). With picks at b >= c, every other expert is close to both, to
    c alone, or to neither; each of these bounds b or c from one side: a box and one edge decide what is possible.
    """
    exact, experts = logits_E.tolist(), range(len(logits_E))
    low, high = (logits_E - delta_E).tolist(), (logits_E + delta_E).tolist()
    found = []
    tried = 0
    for p, q in itertools.permutations(experts, 2):
        others = [e for e in experts if e not in (p, q)]
        least_c = max([low[q], *(low[e] for e in others)])
        if least_c > high[q] or least_c > high[p]:
            continue
        near = [e for e in others if high[e] >= _edge(least_c, width)]
        for kinds in itertools.product(("both", "second", "none"), repeat=len(near)):
            for q_is_close in (True, False):
                tried += 1
                if tried > _MOST_TRIED:
                    raise _TooManyError
                ends = (low[p], high[p], least_c, high[q])
                if not _mask_is_possible(kinds, q_is_close, [(low[e], high[e]) for e in near], ends, width):
                    continue
                close_to_q = [e for e, kind in zip(near, kinds, strict=True) if kind != "none"]
                close_to_p = [e for e, kind in zip(near, kinds, strict=True) if kind == "both"] + [q] * q_is_close
                chances = tuple(
                    1 / (1 + sum(math.exp(exact[e] - exact[pick]) for e in close))
                    for pick, close in ((p, close_to_p), (q, close_to_q))
                )
                found.append(((p, q), (chances[0], chances[1])))
                if len(found) > limit:
                    raise _TooManyError
    return found


def _edge(best: float, width: float) -> float:
    """The least logit with (best - l) / max(|l|, best) <= width, for width < 1."""
    return best * (1 - width) if best > 0 else best / (1 - width)


def _best_at(edge: float, width: float) -> float:
    """The best logit that has this edge."""
    return edge / (1 - width) if edge > 0 else edge * (1 - width)


def _mask_is_possible(
    kinds: Sequence[str],
    q_is_close: bool,
    intervals: Sequence[tuple[float, float]],
    ends: tuple[float, float, float, float],
    width: float,
) -> bool:
    """Whether logits b and c of the picks exist that put every expert where kinds says and the second pick where told.

    above_b and above_c are strict: whoever is not close lies truly below the edge.
    """
    least_b, most_b, least_c, most_c = ends
    above_b = above_c = -math.inf
    for kind, (low, high) in zip(kinds, intervals, strict=True):
        if kind == "both":
            most_b = min(most_b, _best_at(high, width))
        elif kind == "second":
            most_c, above_b = min(most_c, _best_at(high, width)), max(above_b, _best_at(low, width))
        else:
            above_c = max(above_c, _best_at(low, width))
    if least_b > most_b or least_c > most_c or above_b >= most_b or above_c >= most_c:
        return False
    if q_is_close:  # edge(b) <= c <= b
        most = min(most_b, _best_at(most_c, width))
        return max(least_b, least_c) <= most and max(above_b, above_c) < most
    # c < edge(b): then nobody else, being no better than c, is close to b
    return "both" not in kinds and max(least_c, above_c) < _edge(most_b, width)


def _undecided_sparsemixer(logits_ME: Tensor, delta_ME: Tensor, width: float) -> Tensor:
    low_ME, high_ME, left_ME = logits_ME - delta_ME, logits_ME + delta_ME, logits_ME
    undecided_M = torch.zeros(logits_ME.shape[0], dtype=torch.bool, device=logits_ME.device)
    for _ in range(2):
        pick_M1 = left_ME.argmax(1, keepdim=True)
        lowest_M, highest_M = low_ME.gather(1, pick_M1)[:, 0], high_ME.gather(1, pick_M1)[:, 0]
        others_ME = left_ME.scatter(1, pick_M1, -math.inf).isfinite()
        rivals_ME = high_ME.masked_fill(~others_ME, -math.inf)
        edges_ME = [
            torch.where(b_M > 0, b_M * (1 - width), b_M / (1 - width))[:, None] for b_M in (lowest_M, highest_M)
        ]
        unsure_ME = others_ME & (low_ME < edges_ME[1]) & (high_ME >= edges_ME[0])
        undecided_M |= (rivals_ME.amax(1) >= lowest_M) | unsure_ME.any(1)
        left_ME = left_ME.scatter(1, pick_M1, -math.inf)
    return undecided_M
