"""Which wrong law (variants/) explains an output: within rounding, and far better than the law does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence
from harness.problem import Problem
from harness.recover import Recovered, Story, recoverable, rows_by_set
from harness.variants import Variant, variants
from reference.spec import SpecError

# Choices nearer than this to a tie may fall either way in the dtype, so those rows convict no variant.
_TIE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Variants that alone explained an earlier mismatch: one fault shows in many cases, and trying all laws is dear.
_recent: list[tuple[str, str]] = []


@dataclass(frozen=True, slots=True)
class _Fit:
    """How well a variant explains an output. left: its residual in units of the naive runs' error, over the wrong rows.

    law_MH: what it says.
    """

    variant: Variant
    left: float
    ranks: tuple[int, ...]
    law_MH: Tensor

    def is_the_law_of(self, other: _Fit) -> bool:
        """Two rules, one function: a softmax over the chosen is a softmax over all, renormalised."""
        limit = 1e-9 * float(self.law_MH.nan_to_num().abs().max())
        return bool(((self.law_MH - other.law_MH).abs() <= limit).all())  # NaN is equal to nothing


class _Law(NamedTuple):
    """What is asked of a wrong law's Stages."""

    output_MH: Tensor
    margin_M: Tensor


@dataclass(frozen=True, slots=True)
class _Laws:
    """The wrong laws of a problem and layout, each computed once: one fault shows in many cases, many faults in one.

    picks: of the output at hand, which only laws of the router see.
    """

    computed: dict[tuple[int, str, bytes], _Law | None]
    picks: bytes

    @classmethod
    def of(cls, evidence: Evidence, picks_MK: Tensor | None, blocks: Sequence[Tensor]) -> _Laws:
        layout = evidence.layout
        rows = tuple(tuple(block.tolist()) for block in blocks)
        picks = b"" if picks_MK is None else picks_MK.numpy().tobytes()
        return cls(_laws_of(evidence.given, layout.grid, layout.owners, rows), picks)

    def law(self, number: int, plain: Variant, picked: Variant) -> _Law | None:
        """None if this layer cannot get that rule wrong.

        number: of the variant, among those of `variants`.    plain, picked: the same, without and with the output's picks,
        which decide between exact ties alone.
        """
        law = self._computed(plain, (number, plain.sentence, b""))
        if law is None or not picked.routes or not self.picks or bool((law.margin_M > 0).all()):
            return law
        return self._computed(picked, (number, picked.sentence, self.picks))

    def _computed(self, variant: Variant, key: tuple[int, str, bytes]) -> _Law | None:
        if key not in self.computed:
            try:
                stages = variant.compute()
                self.computed[key] = _Law(stages.output_MH, stages.margin_M)
            except SpecError:
                self.computed[key] = None
        return self.computed[key]


@functools.lru_cache(maxsize=4)
def _laws_of(*of: object) -> dict[tuple[int, str, bytes], _Law | None]:
    return {}


def wrong_law_story(evidence: Evidence, recovered: Recovered | None, *, recent: bool) -> Story | None:
    """The wrong law that explains the output, among those that explained an earlier one, or among the others.

    Several laws may explain it, in a short dtype or with one token: then all that explain it about as well are told.
    """
    picks_MK = None if recovered is None else recovered.picks_MK
    told_by_router = recoverable(evidence.given)
    fits: list[_Fit] = []
    small = _is_small(evidence)
    blocks = tuple(rows_by_set(evidence).values())
    laws, asked = _Laws.of(evidence, picks_MK, blocks), _Asked.of(evidence)
    given, layout = evidence.given, evidence.layout
    of_any, of_picks = (variants(given, picks, layout.grid.moe_tp, layout, blocks) for picks in (None, picks_MK))
    for number, (plain, variant) in enumerate(zip(of_any, of_picks, strict=True)):
        if recent and (variant.family, variant.sentence) not in _recent:
            continue
        if variant.family == "P1" and not small:
            continue
        may_be_a_factor = variant.family == "F10"  # a scale that is off in all channels alike is one
        if told_by_router and (recovered is None) is variant.routes and not may_be_a_factor:
            continue  # experts and S are right if the output is a sum of the lawful experts' outputs, else the router may be
        law = laws.law(number, plain, variant)
        fit = None if law is None else _explained_by(given, asked, variant, law)
        if fit is not None:
            fits.append(fit)
    if not fits:
        return None
    fits = [fit for number, fit in enumerate(fits) if not any(fit.is_the_law_of(first) for first in fits[:number])]
    fits.sort(key=lambda fit: fit.left)
    contenders = [fit for fit in fits if fit.left <= 2 * max(fits[0].left, 0.7)]
    sentences = list(dict.fromkeys(fit.variant.sentence for fit in contenders))
    best = fits[0]
    everywhere = len(best.ranks) == int(evidence.held_RM.any(1).sum())
    where = "" if everywhere else f" on {evidence.layout.where(best.ranks)}"
    if len(sentences) == 1:
        key = (best.variant.family, best.variant.sentence)
        if key not in _recent:
            _recent.append(key)
        return Story(best.variant.family, best.variant.stage, best.variant.sentence + where)
    if recent:
        return None
    families, stages = ({getattr(fit.variant, name) for fit in contenders} for name in ("family", "stage"))
    more = f", or {len(sentences) - 3} more" if len(sentences) > 3 else ""
    return Story(
        families.pop() if len(families) == 1 else None,
        stages.pop() if len(stages) == 1 else "output",
        f"these tokens fit more than one cause{where}: {'; or '.join(sentences[:3])}{more}",
    )


# A variant has to leave no more than this many times the naive runs' error (right ones left 1.6 at most in 264 planted
# faults, and those that fitted by accident 2 and more), and a third of what the law leaves.
_LEFT = 1.75
_BETTER = 3.0


# Of its length, what a row may be off by where numbers pass through fp8.
_SHORTEST = 0.15


def _is_small(evidence: Evidence) -> bool:
    """Whether a rounding could be all of the error."""
    law_MH = evidence.given.stages.output_MH
    off_RM = torch.stack([(output - law_MH).norm(dim=-1) for output in evidence.outputs])
    return float((off_RM / law_MH.norm(dim=-1).clamp(min=1e-30))[evidence.wrong_RM].median()) < _SHORTEST


# Numbers that lie so near the middle of two short ones that the layer's arithmetic rounds them the other way.
_FLIPPED = 0.04


def _but_for_flips(miss_MH: Tensor, unit_M: Tensor, judged_M: Tensor) -> Tensor:
    """What is left of a law that rounds, without the few numbers that fall on the other side of their tie."""
    flipped_MH = miss_MH.abs() > 2 * RESIDUAL_LIMIT * unit_M[:, None] / miss_MH.shape[1] ** 0.5
    few = float(flipped_MH[judged_M].double().mean()) <= _FLIPPED
    return miss_MH.masked_fill(flipped_MH, 0.0) if few else miss_MH


class _Asked(NamedTuple):
    """What every law is asked of an output, made once. size_M: of the law's rows.    error_M: of naive runs.

    ranks: with wrong rows, each with its output, its rows and those of them that are wrong.
    """

    size_M: Tensor
    error_M: Tensor
    decided_M: Tensor
    ranks: tuple[tuple[int, Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, evidence: Evidence) -> _Asked:
        naive_M = evidence.naive_M
        ranks = tuple(
            (rank, output, evidence.held_RM[rank], evidence.wrong_RM[rank])
            for rank, output in enumerate(evidence.outputs)
            if bool(evidence.wrong_RM[rank].any())
        )
        size_M = evidence.given.stages.output_MH.norm(dim=-1).clamp(min=1e-30)
        return cls(size_M, (naive_M + naive_M.mean()) / 2, evidence.decided_M, ranks)


def _explained_by(given: Problem, asked: _Asked, variant: Variant, law: _Law) -> _Fit | None:
    """How a variant explains the wrong rows of all ranks, near ties aside; None if it does not."""
    unit_M = (law.output_MH.norm(dim=-1) / asked.size_M).clamp(min=1.0) * asked.error_M
    told_M = ~law.output_MH.isnan().any(-1)  # NaN: the law does not say
    decided_M = asked.decided_M
    if variant.routes:
        decided_M = torch.minimum(law.margin_M, given.stages.margin_M) > _TIE[given.dtype]
    decided_M = decided_M & told_M
    ranks, left, lawful = [], [], []
    for rank, output, held_M, wrong_M in asked.ranks:
        wrong_M = wrong_M & told_M
        if not bool(wrong_M.any()):
            return None
        judged_M = decided_M & held_M if bool((wrong_M & decided_M).any()) else wrong_M
        miss_MH = output - law.output_MH
        if variant.family == "P1":
            miss_MH = _but_for_flips(miss_MH, unit_M, judged_M)
        left_M = miss_MH.norm(dim=-1) / unit_M
        if not bool((left_M <= 2 * RESIDUAL_LIMIT)[judged_M].all()):
            return None
        if float((left_M <= RESIDUAL_LIMIT)[wrong_M].double().mean()) < 0.5:
            return None  # near ties may fall either way, but not most rows
        ranks.append(rank)
        left.append(left_M[judged_M])
        lawful.append(((output - given.stages.output_MH).norm(dim=-1) / unit_M)[judged_M])
    left_over, law_over = (float(torch.cat(rows).square().mean().sqrt()) for rows in (left, lawful))
    if left_over > _LEFT or _BETTER * left_over > law_over:
        return None
    return _Fit(variant, left_over, tuple(ranks), law.output_MH)
