"""A wrong output whose rows together say which part counts too often, where no other story knows: by a few per cent, in bf16.

`projection.py` finds the factor; it is a name only if nothing but rounding is left when it is taken out again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.algebra import Evidence
from harness.compare import compare, near_ties, project_outputs
from harness.problem import ways
from harness.projection import LIMIT, MOST_NAMED, Projected, taken
from harness.recover import Story

# What is left, squared, in units of the variance that the error analysis expects: of tokens that meet a part that was
# found, its mean may exceed that of the others by this share, or by this many of its own deviations, and never by half.
# True factors left 0.9 to 1.1 times the others' where many tokens meet the part and up to 1.4 times where a dozen do; a
# gate of 1.03 left 1.35 times and more of 109 tokens. Where all tokens meet it: 0.15 to 0.41 of the variance.
_SHARE, _DEVIATIONS, _MOST = 1.25, 3.0, 1.5
_OF_VARIANCE = 0.5
# So few other tokens say nothing of rounding.
_FEWEST = 8


def many_rows_story(evidence: Evidence) -> Story | None:
    """The parts that count wrongly; None if none is found, or if they are not all that is wrong."""
    given, precision, cut = evidence.given, evidence.precision, ways(evidence.given.spec, evidence.layout.grid)
    decided_M = ~near_ties(given, precision)
    projected = project_outputs(given, evidence.outputs, cut, precision, for_a_name=True)
    if projected is None or not 0 < len(projected.found) < MOST_NAMED:
        return None
    parts, law_MH = taken(given, projected.found, cut, precision), given.stages.output_MH
    judged_RM = evidence.held_RM & decided_M
    left = [
        torch.where(judged_M[:, None], output - parts.away_MH, law_MH)
        for output, judged_M in zip(evidence.outputs, judged_RM, strict=True)
    ]
    again = compare(given, left, cut, precision)
    if again.wrong or again.undecided or again.projection is not None:
        return None
    spread_RM = ((torch.stack(left) - law_MH) / parts.sd_MH).square().mean(-1)
    met, others = spread_RM[judged_RM & parts.met_M], spread_RM[judged_RM & ~parts.met_M]
    if not _is_rounding(met, others):
        return None
    return Story(_family(evidence, projected), projected.stage, _sentence(projected, met, others))


def _is_rounding(met: Tensor, others: Tensor) -> bool:
    if len(met) == 0:
        return False
    if len(others) < _FEWEST:
        return bool(met.mean() <= _OF_VARIANCE)
    scatter = (met.var(correction=0) / len(met) + others.var(correction=0) / len(others)).sqrt()
    allowed = torch.maximum(_SHARE * others.mean(), others.mean() + _DEVIATIONS * scatter)
    return bool(met.mean() <= torch.minimum(allowed, _MOST * others.mean()))


def _family(evidence: Evidence, projected: Projected) -> str | None:
    """None where a factor of the expert's own may be what is wrong: of its weights as stored, or of its routing."""
    own = evidence.given.is_quantised or evidence.given.spec.routing.per_expert_scale
    return None if own else projected.family


def _sentence(projected: Projected, met: Tensor, others: Tensor) -> str:
    factors = ", ".join(f"{each.name} counts {each.factor:.4f} times" for each in projected.found)
    first = projected.found[0]
    beside = f" and {float(others.mean()):.2f} in other tokens" if len(others) else ""
    return (
        f"{factors} (expected 1), all others once: over {first.tokens} tokens together "
        f"{'the first factor' if len(projected.found) > 1 else 'this factor'} is {abs(first.sigma):.1f} deviations from 1 "
        f"(limit {LIMIT:g}), and without it rounding is left ({float(met.mean()):.2f} of the expected variance{beside})"
    )
