"""What no single row shows and many rows together do: an expert, or a whole part, that counts one per cent too often.

In bf16 rounding moves a row by as much as a factor of 1.01 does, but each row in another direction. So the error of
every element is divided by the deviation that the error analysis expects of it, and projected on what one expert is
known to add to all its tokens; the same for the routed sum, the shared part and the output as a whole. Rounding adds
up like a random walk there, a factor adds up straight.

M tokens, H hidden, K top-k, T = M * K slots, P parts: the experts that tokens visit, then the wholes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.problem import Problem, Ways
from reference.moe import Choice, forward
from reference.rounding import analyse
from reference.spec import RouterPrecision

# Half precision alone: in fp32 the rows see a factor of 1.001. Fewer tokens leave less than 6 deviations of 1 %.
DTYPES = (torch.bfloat16, torch.float16)
FROM_TOKENS = 128
# In deviations of the projection; a clean layer had 4.5 at most (docs/tolerance.md).
LIMIT = 6.0
# What is left beside a part's factor says that it is not the whole story; a name needs less certainty than a verdict.
_LEFT = 4.0
# A part that fewer tokens meet is not judged: the scatter of so few says little about their mean.
_FEWEST = 8
MOST_NAMED = 8
# What is kept of the elements' variance, and the least deviation of a router weight in units of the roundoff.
_CAUTION = 0.5
_WEIGHT = 0.6


@dataclass(frozen=True, slots=True)
class Projection:
    """part: "expert", "routed", "shared" or "output" (all of it).    expert: its number, where the part is one.

    vision: it is an expert of the vision branch.    factor: how often it counts; the law says once.
    sigma: how many deviations that lies from 1.    tokens: over how many tokens.
    """

    part: str
    expert: int | None
    vision: bool
    factor: float
    sigma: float
    tokens: int

    @property
    def name(self) -> str:
        if self.part != "expert":
            return {"routed": "the routed part", "shared": "the shared part", "output": "the whole output"}[self.part]
        return f"{'vision ' if self.vision else ''}expert {self.expert}"


@dataclass(frozen=True, slots=True)
class Projected:
    """What all parts' projections say.    largest: of them all, in deviations, found or not.

    found: the parts that are off, the surest first; empty where none is beyond the limit.
    """

    largest: float
    found: tuple[Projection, ...]

    @property
    def stage(self) -> str:
        """The first stage at which these parts can have gone wrong: R before S, and both before what is made of them."""
        parts = {each.part for each in self.found}
        return "routed" if parts & {"expert", "routed"} else "shared" if "shared" in parts else "output"

    @property
    def family(self) -> str | None:
        """Experts that count otherwise than their weight says are one; a part as a whole has no cause that is known."""
        return "F7" if {each.part for each in self.found} == {"expert"} else None

    @property
    def sentence(self) -> str:
        """'expert 3 counts 1.010 times (expected 1): over its 34 tokens together its factor is 24 deviations off'."""
        told = [f"{each.name} counts {each.factor:.3f} times" for each in self.found]
        first = self.found[0]
        more = " at least" if len(self.found) == MOST_NAMED else ""
        return (
            f"{', '.join(told)}{more} (expected 1), all others once: no token alone is beyond rounding, but over "
            f"{first.tokens} tokens together {'the first of these factors' if len(told) > 1 else 'this factor'} is "
            f"{abs(first.sigma):.1f} deviations from 1 (limit {LIMIT:g})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Directions:
    """parts_P: what each part is, factor and figures still empty.    sd_MH: the deviation of each element.

    slot_TH: what each slot adds to y, in units of the deviation; token_T, part_T: whose it is.
    wholes_MH: the same for the parts that are not experts, the last of parts_P.
    weight_T, weight_M: deviation of the slot's router weight and of a token's, relative, with which all of its part moves.
    """

    parts_P: tuple[Projection, ...]
    sd_MH: Tensor
    slot_TH: Tensor
    token_T: Tensor
    part_T: Tensor
    wholes_MH: tuple[Tensor, ...]
    weight_T: Tensor
    weight_M: Tensor


def project(
    given: Problem,
    error_MH: Tensor,
    rows_M: Tensor,
    ways: Ways,
    precision: RouterPrecision,
    *,
    for_a_name: bool = False,
) -> Projected | None:
    """Find parts that count too often or too seldom. None where nothing can be told: another dtype, or too few tokens.

    error_MH: float64, the output less the law's.    rows_M: bool, the rows to read, those whose choice of experts
    rounding may change being left out.    for_a_name: the output is wrong, and whoever asks holds what is found to the
    rows: then any dtype and a few tokens will do.
    """
    few = given.dtype not in DTYPES or len(error_MH) < FROM_TOKENS or int(rows_M.sum()) < FROM_TOKENS // 2
    if few and not (for_a_name and int(rows_M.sum()) >= _FEWEST):
        return None
    along = _directions(given, ways, precision)
    left_MH = torch.where(rows_M[:, None], error_MH / along.sd_MH, 0.0)
    first = _strongest(_measured(along, left_MH, rows_M))
    if first is None or not abs(first[1].sigma) > LIMIT:
        return Projected(0.0 if first is None else abs(first[1].sigma), ())
    # One whole part if nothing is left beside it; else one expert after the other, and the shared part.
    number, found = first
    rest = _strongest(_measured(along, _without(along, left_MH, rows_M, number, found), rows_M))
    if found.part == "expert" or (rest is not None and abs(rest[1].sigma) > _LEFT):
        alone = _one_by_one(along, left_MH, rows_M)
        return Projected(abs(found.sigma), alone or (found,))
    return Projected(abs(found.sigma), (found,))


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """What parts add beyond their one time, and what says whether that was all.

    away_MH: float64, (factor - 1) times each part, in units of y.    sd_MH: the deviation of each element.
    met_M: bool, the tokens that meet one of the parts.
    """

    away_MH: Tensor
    sd_MH: Tensor
    met_M: Tensor


def taken(given: Problem, found: Sequence[Projection], ways: Ways, precision: RouterPrecision) -> Taken:
    """What the parts that were found make of the output."""
    along = _directions(given, ways, precision)
    none_MH, every_M = torch.zeros_like(along.sd_MH), torch.ones(len(along.sd_MH), dtype=torch.bool)
    left_MH, met_M = none_MH, torch.zeros_like(every_M)
    for part in found:
        number = next(p for p, each in enumerate(along.parts_P) if _same(each, part))
        left_MH = _without(along, left_MH, every_M, number, part)
        slots_T = along.part_T == number
        met_M[along.token_T[slots_T]] = True
        met_M |= part.part != "expert"
    return Taken(-left_MH * along.sd_MH, along.sd_MH, met_M)


def _one_by_one(along: _Directions, left_MH: Tensor, rows_M: Tensor) -> tuple[Projection, ...]:
    """The parts that are off when each one's factor is taken out before the next is looked for."""
    found: list[Projection] = []
    while len(found) < MOST_NAMED:
        measured = [m for m in _measured(along, left_MH, rows_M) if m[1].part in ("expert", "shared")]
        best = _strongest(measured)
        limit = _LEFT if found else LIMIT
        if best is None or not abs(best[1].sigma) > limit or any(_same(best[1], each) for each in found):
            break
        left_MH = _without(along, left_MH, rows_M, *best)
        found.append(best[1])
    return tuple(found)


def _same(one: Projection, other: Projection) -> bool:
    return (one.part, one.expert, one.vision) == (other.part, other.expert, other.vision)


def _strongest(measured: Sequence[tuple[int, Projection]]) -> tuple[int, Projection] | None:
    return max(measured, key=lambda each: abs(each[1].sigma), default=None)


def _measured(along: _Directions, left_MH: Tensor, rows_M: Tensor) -> list[tuple[int, Projection]]:
    """Every part that enough tokens meet, with its number in parts_P."""
    parts, experts = len(along.parts_P), len(along.parts_P) - len(along.wholes_MH)
    slots_T = rows_M[along.token_T]
    hit = [(along.slot_TH * left_MH[along.token_T]).sum(1)[slots_T]]
    own = [along.slot_TH.square().sum(1)[slots_T]]
    part = [along.part_T[slots_T]]
    weight = [along.weight_T[slots_T]]
    for number, whole_MH in enumerate(along.wholes_MH, experts):
        hit.append((whole_MH * left_MH).sum(1)[rows_M])
        own.append(whole_MH.square().sum(1)[rows_M])
        weight.append(along.weight_M[rows_M])
        part.append(torch.full_like(own[-1], number, dtype=torch.int64))
    hit_N, own_N, part_N, weight_N = map(torch.cat, (hit, own, part, weight))

    def summed(each_N: Tensor) -> Tensor:
        return each_N.new_zeros(parts).index_add(0, part_N, each_N)

    hits_P, owns_P = summed(hit_N), summed(own_N)
    factor_P = hits_P / owns_P
    # Seen: the scatter of the tokens about their factor, which knows how the errors within a row hang together, but from
    # few tokens little. So never less than expected: what each element's deviation adds, which is cautious for a sum of
    # many, and what rounding does to each token's weight.
    expected_P = _CAUTION * owns_P + summed((weight_N * own_N).square())
    seen_P = summed((hit_N - factor_P[part_N] * own_N).square())
    sigma_P = hits_P / torch.maximum(expected_P, seen_P).sqrt()
    tokens_P = part_N.bincount(minlength=parts)
    told = zip(range(parts), factor_P.tolist(), sigma_P.tolist(), tokens_P.tolist(), strict=True)
    return [
        (p, replace(along.parts_P[p], factor=1 + factor, sigma=sigma, tokens=tokens))
        for p, factor, sigma, tokens in told
        if tokens >= _FEWEST and sigma == sigma
    ]


def _without(along: _Directions, left_MH: Tensor, rows_M: Tensor, number: int, part: Projection) -> Tensor:
    """The error that is left when this part's factor is taken out of it."""
    experts = len(along.parts_P) - len(along.wholes_MH)
    if number >= experts:
        away_MH = along.wholes_MH[number - experts]
    else:
        slots_T = along.part_T == number
        away_MH = torch.zeros_like(left_MH).index_add(0, along.token_T[slots_T], along.slot_TH[slots_T])
    return left_MH - (part.factor - 1) * away_MH * rows_M[:, None]


# One entry takes as much as the slots' results: 16 MB for 512 tokens of the widest twin.
@functools.lru_cache(maxsize=4)
def _directions(given: Problem, ways: Ways, precision: RouterPrecision) -> _Directions:
    spec, stages, tokens = given.spec, given.stages, given.tokens
    x_MH, is_vision, top_k = tokens.hidden_states, tokens.is_vision, spec.routing.top_k
    rounding = analyse(spec, given.exact, x_MH, stages, ways.routed, precision, is_vision, shared_tp=ways.shared)
    sd_MH = rounding.variance_MH.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    # each slot as a token of its own with a single expert
    ids_T1, weights_T1 = stages.topk_ids_MK.reshape(-1, 1), stages.topk_weights_MK.reshape(-1, 1)
    token_T = torch.arange(len(x_MH)).repeat_interleave(top_k)
    vision_T = torch.zeros_like(token_T, dtype=torch.bool) if is_vision is None else is_vision[token_T]
    alone = forward(
        replace(spec, shared=None),
        given.exact,
        x_MH[token_T],
        is_vision_M=None if is_vision is None else vision_T,
        choice=Choice(ids_T1, weights_T1, torch.zeros_like(weights_T1[:, 0])),
    )
    share = spec.output.share
    slot_TH = share * spec.scale * (alone.routed_MH + alone.zero_MH) / sd_MH[token_T]
    routed_MH = torch.zeros_like(sd_MH).index_add(0, token_T, slot_TH)
    wholes = {"routed": routed_MH}
    if spec.shared is not None:
        shared_MH = share * stages.shared_MH / sd_MH
        wholes |= {"shared": shared_MH, "output": routed_MH + shared_MH}
    # experts of the vision branch stand behind the others
    visited, part_T = (ids_T1[:, 0] + spec.routing.num_logits * vision_T).unique(return_inverse=True)
    experts = [
        Projection("expert", e % spec.routing.num_logits, e >= spec.routing.num_logits, 1.0, 0.0, 0)
        for e in visited.tolist()
    ]
    parts = (*experts, *(Projection(name, None, False, 1.0, 0.0, 0) for name in wholes))
    weight_MK = rounding.weights_MK.clamp(min=_WEIGHT * torch.finfo(given.dtype).eps / 2)
    weight_M = weight_MK.square().mean(1).sqrt()
    return _Directions(parts, sd_MH, slot_TH, token_T, part_T, tuple(wholes.values()), weight_MK.flatten(), weight_M)
