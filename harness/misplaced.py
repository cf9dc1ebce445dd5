"""Experts on the wrong rank or in the wrong slot: what a router's weights, read off the output, say of the placement.

A token's weights go to the rank that is thought to hold its experts, and there to a slot. If map and weights disagree,
expert f computes what was meant for others; if a rank treats its own slots apart, weights change by rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from harness.layout import Layout, linear_owners


def placement_story(law_ME: Tensor, found_ME: Tensor, near_M1: Tensor, layout: Layout) -> tuple[str, str] | None:
    """Family and sentence of the one mistake that explains all weights; None if there is none, or no expert parallelism."""
    if layout.owners is None or layout.grid.ep == 1 or law_ME.shape[1] != len(layout.owners):
        return None
    for sentence, serves_EE in _disagreements(layout):
        if bool(((law_ME @ serves_EE - found_ME).abs() <= near_M1).all()):
            return "F7", f"the right weights go to wrong experts: {sentence}"
    for family, sentence, weights_ME in _weighings(law_ME, layout):
        if bool(((weights_ME - found_ME).abs() <= near_M1).all()):
            return family, sentence
    if _unweighted_afar(law_ME, found_ME, near_M1, layout):
        return "D11", "the router weights are not used for experts on other ranks than the token's own"
    return None


def _unweighted_afar(law_ME: Tensor, found_ME: Tensor, near_M1: Tensor, layout: Layout) -> bool:
    """Each token has its lawful weights on one rank, and 1 for its experts elsewhere."""
    owner_E = torch.tensor(layout.owners)
    plain_ME = (law_ME != 0).double()
    fits_RM = [
        ((torch.where(owner_E == home, law_ME, plain_ME) - found_ME).abs() <= near_M1).all(-1)
        for home in range(layout.grid.ep)
    ]
    return bool(torch.stack(fits_RM).any(0).all())


def _weighings(law_ME: Tensor, layout: Layout) -> Iterator[tuple[str, str, Tensor]]:
    """What a rank makes of the weights that reach it: family, sentence, the weights as they then count."""
    owners = layout.owners
    assert owners is not None  # placement_story asks
    owner_E = torch.tensor(owners)
    same_EE = (owner_E[:, None] == owner_E).double()
    visits_ME = (law_ME != 0).double()
    with_me_ME = visits_ME @ same_EE  # how many of the token's experts the rank of expert e holds
    yield (
        "B14",
        "a token with several experts on one rank is served there once for each of them: sent once a slot, not once a rank",
        law_ME * with_me_ME,
    )
    by_rank_ME = law_ME @ same_EE
    yield (
        "D6",
        "each ep rank renormalises the weights of its own experts, instead of all K together",
        torch.where(law_ME != 0, law_ME / by_rank_ME.clamp(min=1e-30), 0.0) * law_ME.sum(-1, keepdim=True),
    )
    away_ME = law_ME.sum(-1, keepdim=True) - by_rank_ME  # the weights of experts that e's rank does not hold
    held = _held(owners, layout.grid.ep)
    for family, which, place in (("G1", "last", -1), ("G3", "first", 0)):
        catches_E = torch.zeros(len(owners), dtype=torch.float64)
        catches_E[[experts[place] for experts in held if experts]] = 1.0
        sentence = f"the id -1 of experts that are elsewhere is taken for the {which} expert of each rank"
        yield family, sentence, law_ME + away_ME * catches_E
        yield family, f"{sentence} that the token is sent to", law_ME + away_ME * catches_E * (with_me_ME > 0)


def _disagreements(layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """A sentence, and which expert f computes what is meant for expert e: 1 at [e, f]."""
    owners = layout.owners
    assert owners is not None  # placement_story asks
    experts, ep = len(owners), layout.grid.ep
    slots = _held(owners, ep)
    local = [slots[owner].index(e) for e, owner in enumerate(owners)]
    starts = [held[0] if held else experts for held in slots]
    dealt = [[e for e in range(experts) if e % ep == rank] for rank in range(ep)]
    even = _held(linear_owners(experts, ep), ep)

    def serves(pairs: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> Tensor:
        matrix = torch.zeros(experts, experts, dtype=torch.float64)
        for e, f in pairs:
            matrix[e, f] = 1.0
        return matrix

    yield (
        "each rank takes global expert ids for its local ones: right on the first ep rank alone",
        serves([(local[f], f) for f in range(experts)]),
    )
    yield (
        "the offset of a rank's first expert is subtracted twice: right on the first ep rank alone",
        serves([(f + starts[owners[f]], f) for f in range(experts) if f + starts[owners[f]] < experts]),
    )
    yield (
        "every ep rank holds the experts of the first one: the others' weights are never used",
        serves([(e, slots[0][local[e]]) for e in range(experts) if local[e] < len(slots[0])]),
    )
    for there, placed, other in (("linearly", even, dealt), ("round-robin", dealt, even)):
        meant = {e: (r, at) for r, held in enumerate(placed) for at, e in enumerate(held)}
        pairs = [(e, other[r][at]) for e, (r, at) in meant.items() if at < len(other[r])]
        loaded = "round-robin" if there == "linearly" else "linearly"
        yield f"experts are mapped {there}, but their weights are loaded {loaded}", serves(pairs)
    for step in (1, -1):
        for which, ranks in (("every ep rank", range(ep)), ("every ep rank but the first", range(1, ep))):
            moved = [
                (e, slots[owner][(local[e] + step) % len(slots[owner])] if owner in ranks else e)
                for e, owner in enumerate(owners)
            ]
            cut = [(e, f) for e, f in moved if owners[e] not in ranks or 0 <= local[e] + step < len(slots[owners[e]])]
            yield f"local expert ids are off by {step:+d} on {which}", serves(moved)
            yield f"local expert ids are off by {step:+d} on {which}, and the last one gets lost", serves(cut)
    for step in (1, -1):
        beside = [(e, f) for e, owner in enumerate(owners) for f in _at(slots, (owner + step) % ep, local[e])]
        side = "after" if step == 1 else "before"
        yield f"tokens go to the ep rank {side} the one that holds their expert, to the same slot", serves(beside)


def _held(owners: Sequence[int], ep: int) -> list[list[int]]:
    """The experts of each ep rank."""
    return [[e for e, owner in enumerate(owners) if owner == rank] for rank in range(ep)]


def _at(slots: list[list[int]], rank: int, slot: int) -> list[int]:
    return slots[rank][slot : slot + 1]
