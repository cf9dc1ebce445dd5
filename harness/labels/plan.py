"""Which experts the tokens of a labelled layer visit, and the logits that send them there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from reference.spec import Routing

# sigmoid(24) is 1 in fp32 and softmax leaves nothing to a logit 48 below, yet no exponential of it overflows
HIGH = 24.0
Kind = Literal["equal", "distinct", "level", "half"]


class Visit(NamedTuple):
    """One token. logits: one for each expert, zero experts included.

    kind: "equal" saturates the chosen experts, which then weigh the same; "distinct" gives each its own weight; "level"
    leaves the choice to the correction bias alone; "half" weighs its one expert by sigmoid(0).
    """

    kind: Kind
    logits: tuple[float, ...]


@functools.lru_cache(maxsize=64)
def visits(routing: Routing) -> tuple[Visit, ...]:
    """Tokens that exercise every expert with equal and with distinct weights, whatever the router's rules."""
    found = []
    for chosen in _choices(routing):
        found.append(Visit("equal", _logits(routing, chosen, _equal(routing), -HIGH)))
        found.append(Visit("distinct", _logits(routing, chosen, *_distinct(routing))))
        if routing.weight_on == "input":
            found.append(Visit("half", _logits(routing, chosen, [0.0], -HIGH)))
    if routing.correction_bias:
        found += [Visit("level", (0.0,) * routing.num_logits)] * 2
    return tuple(found)


def _choices(routing: Routing) -> Iterator[tuple[int, ...]]:
    """Sets of K experts that together hold all of them, each within groups that can be kept together."""
    size = routing.num_logits // routing.n_group
    for first in range(0, routing.n_group, routing.topk_group):
        groups = [(first + i) % routing.n_group for i in range(routing.topk_group)]
        inside = [group * size + i for group in groups for i in range(size)]
        for start in range(0, len(inside), routing.top_k):
            yield tuple(inside[(start + i) % len(inside)] for i in range(routing.top_k))


def _equal(routing: Routing) -> list[float]:
    if routing.scoring_func == "sparsemixer":
        return [HIGH, HIGH - 8]  # its two picks stand alone, each with all of the weight
    return [HIGH] * routing.top_k


def _distinct(routing: Routing) -> tuple[list[float], float]:
    """The logits of the chosen, best first, and that of the others."""
    if routing.scoring_func == "sparsemixer":
        return [HIGH, HIGH - 0.25], -HIGH  # close enough for the mask to hold both
    if routing.router_norm_epsilon is not None:
        step = 1 / 64  # normalised and scaled, a step becomes half a unit
    else:
        step = 0.25 if routing.top_k <= 8 else 0.125 if routing.top_k <= 16 else 0.0625
    return [2.0 - step * i for i in range(routing.top_k)], -2.0


def _logits(routing: Routing, chosen: tuple[int, ...], high: list[float], low: float) -> tuple[float, ...]:
    logits = [low] * routing.num_logits
    for expert, logit in zip(chosen, high, strict=True):
        logits[expert] = logit
    return tuple(logits)
