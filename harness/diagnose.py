"""From a wrong output to one sentence: what was counted how often, times what, on which rank, and why that happens.

First the algebra of the parts (algebra.py), then the wrong laws (variants.py), then single experts, then what the router
must have chosen. A simpler explanation comes before a finer one. What nothing explains is called unknown, with its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.algebra import (
    RESIDUAL_LIMIT,
    Evidence,
    Reading,
    fit_symbol,
    formula,
    is_lawful,
    lawful_reading,
    read_shares,
    read_whole,
    symbol_values,
)  # fmt: skip
from harness.causes import find_cause, uneven_shares
from harness.errors import ranks_text
from harness.parts import expert_parts
from harness.recover import Recovered, recover
from harness.variants import Variant, variants
from reference.spec import SpecError

# Choices nearer than this to a tie may fall either way in the dtype, so those rows convict no variant.
_TIE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """sentence: one line.    family: of the fault, None if unknown.    coefficients: part -> symbol ("s^2"), the same on
    all ranks, empty where the algebra does not apply.
    """

    sentence: str
    family: str | None
    stage: str = "output"
    coefficients: dict[str, str] = field(default_factory=dict)


def diagnose(evidence: Evidence) -> Diagnosis:
    """The cause of a mismatch in one sentence; never a guess: what does not fit is unknown."""
    plain = _plain_cause(evidence)
    if plain is not None:
        return plain
    ranks = range(len(evidence.outputs))
    whole = _each(evidence, read_whole)
    if whole is not None and all(reading.is_symbolic for reading in whole):
        return _algebra_sentence(evidence, whole)
    recovered = recover(evidence)
    recent = _variant_cause(evidence, recovered, recent=True)
    if recent is not None:
        return recent
    shares = [read_whole(evidence, rank) or read_shares(evidence, rank) for rank in ranks] if whole is None else whole
    told = [reading for reading in shares if reading is not None]
    explained = len(told) == len(shares) and bool(told)
    if explained and all(reading.is_symbolic for reading in told):
        return _algebra_sentence(evidence, told)
    by_law = _variant_cause(evidence, recovered, recent=False)
    if by_law is not None:
        return by_law
    if explained:
        return _algebra_sentence(evidence, told)
    return _expert_cause(evidence) or _router_cause(evidence, recovered) or _unknown(evidence)


def _each(evidence: Evidence, read: Callable[[Evidence, int], Reading | None]) -> list[Reading] | None:
    """One reading a rank, or None if a rank has none; ranks with the same bits are read once."""
    readings: list[Reading] = []
    for rank, output in enumerate(evidence.outputs):
        same = readings[0] if rank and torch.equal(output, evidence.outputs[0]) else read(evidence, rank)
        if same is None:
            return None
        readings.append(same)
    return readings


def _plain_cause(evidence: Evidence) -> Diagnosis | None:
    """What needs no arithmetic: not-a-number, infinity, all zeros."""
    bad = [r for r, output in enumerate(evidence.outputs) if not bool(output.isfinite().all())]
    if bad:
        output = evidence.outputs[bad[0]]
        rows = (~output.isfinite()).any(-1).nonzero()[:, 0]
        kind = "NaN" if bool(output.isnan().any()) else "infinity"
        stage, why = _first_extreme_stage(evidence, int(rows[0]))
        return Diagnosis(
            f"{kind} in {len(rows)} of {len(output)} rows, first in token {int(rows[0])}, on {ranks_text(bad)}; {why}",
            "G5" if kind == "NaN" else "D12", stage,
        )  # fmt: skip
    zero = [r for r, output in enumerate(evidence.outputs) if not bool(output.any())]
    if len(zero) == len(evidence.outputs):
        return Diagnosis(
            "y = 0 on every rank: nothing was computed or nothing was written",
            "A6",
            coefficients={"routed": "0", "shared": "0"},
        )
    return None


def _first_extreme_stage(evidence: Evidence, row: int) -> tuple[str, str]:
    """Where a token's numbers first leave all measure, as far as the layer tells, and how they compare with the law's."""
    stages = evidence.given.stages
    lawful = {"logits": stages.logits_ME, "topk_weights": stages.topk_weights_MK}
    for name, law_M in lawful.items():
        told = evidence.stages.get(name)
        if told is None or told.shape[0] <= row:
            continue
        worst, usual = float(told[row].double().abs().max()), float(law_M[row].abs().max())
        if not worst <= 1e3 * max(usual, 1.0) * max(evidence.given.spec.scale, 1.0):
            return name, f"at {name} its largest is {worst:.3g} where the law has {usual:.3g}"
    return "output", "the oracle is finite everywhere"


def _algebra_sentence(evidence: Evidence, readings: Sequence[Reading]) -> Diagnosis:
    given, tp = evidence.given, evidence.tp
    lawful = lawful_reading(given)
    off = [rank for rank, reading in enumerate(readings) if not is_lawful(reading, lawful)]
    if not off:
        return _unknown(evidence)
    first = readings[off[0]]
    alike = [rank for rank in off if readings[rank] == first]
    everywhere = len(alike) == len(readings)
    cause = find_cause(first, lawful.symbols, given.spec.scale != 1.0)
    s_text = f"s={given.spec.scale:g}, " if given.spec.scale != 1.0 else ""
    where = "" if everywhere else f" on {ranks_text(alike)}"
    why = cause.sentence if cause else uneven_shares(first, lawful.symbols) or "no known cause has these factors"
    coefficients = dict(first.symbols) if everywhere and not first.own_only and not first.uneven else {}
    sentence = f"y = {formula(first)} instead of {formula(lawful)}{where} ({s_text}tp={tp}): {why}"
    return Diagnosis(sentence, cause.family if cause else None, "output", coefficients)


# Variants that explained an earlier mismatch: one fault shows in many cases, and trying all laws is dear.
_recent: list[tuple[str, str]] = []


def _variant_cause(evidence: Evidence, recovered: Recovered | None, *, recent: bool) -> Diagnosis | None:
    """The wrong law that explains the output, among those that explained an earlier one, or among the others."""
    for variant in variants(evidence.given, None if recovered is None else recovered.picks_MK):
        key = (variant.family, variant.sentence)
        if (key in _recent) is not recent:
            continue
        ranks = _explained_by(evidence, variant)
        if ranks is None:
            continue
        if key not in _recent:
            _recent.append(key)
        where = "" if len(ranks) == len(evidence.outputs) else f" on {ranks_text(ranks)}"
        return Diagnosis(variant.sentence + where, variant.family, variant.stage)
    return None


def _explained_by(evidence: Evidence, variant: Variant) -> list[int] | None:
    """The ranks whose wrong rows a variant explains, if it explains every wrong row that is no near tie."""
    given = evidence.given
    try:
        stages = variant.compute()
    except SpecError:
        return None  # this layer cannot get that rule wrong
    naive_M = given.naive_error(evidence.tp, evidence.precision)
    growth_M = (stages.output_MH.norm(dim=-1) / given.stages.output_MH.norm(dim=-1).clamp(min=1e-30)).clamp(min=1.0)
    limit_M = RESIDUAL_LIMIT * growth_M * (naive_M + naive_M.mean())
    decided_M = torch.minimum(stages.margin_M, given.stages.margin_M) > _TIE[given.dtype]
    ranks = []
    for rank, output in enumerate(evidence.outputs):
        wrong_M = evidence.wrong_RM[rank]
        if not bool(wrong_M.any()):
            continue
        judged_M = decided_M if bool((wrong_M & decided_M).any()) else wrong_M
        if not bool(((output - stages.output_MH).norm(dim=-1) <= limit_M)[judged_M].all()):
            return None
        ranks.append(rank)
    return ranks


def _expert_cause(evidence: Evidence) -> Diagnosis | None:
    """Experts that count more or less often than their router weight says."""
    given, tp = evidence.given, evidence.tp
    routing = given.spec.routing
    if given.spec.vision is not None or routing.num_experts > 64 or routing.weight_on == "input":
        return None
    alone = [value for value in enumerate(expert_parts(given)) if bool(value[1].any())]
    rest = given.stages.output_MH / given.spec.output.share - given.spec.scale * given.stages.routed_MH
    matrix = torch.stack([value.flatten() for _, value in alone], 1)
    if not alone or matrix.shape[0] < 2 * matrix.shape[1]:
        return None
    naive_M = given.naive_error(tp, evidence.precision) / given.spec.output.share
    names = symbol_values(given.spec.scale, tp)
    told = []
    for output in evidence.outputs:
        target = output / given.spec.output.share - rest
        solved = torch.linalg.lstsq(matrix, target.flatten()[:, None], driver="gelsd").solution[:, 0]
        residual_M = (target - (matrix @ solved).view_as(target)).norm(dim=-1)
        if not bool((residual_M <= RESIDUAL_LIMIT * (naive_M + naive_M.mean())).all()):
            return None
        noise = float(naive_M.norm()) / math.sqrt(target.numel())
        spread = torch.linalg.pinv(matrix.T @ matrix).diagonal().clamp(min=0).sqrt() * noise
        for (e, _), value, deviation in zip(alone, solved.tolist(), spread.tolist(), strict=True):
            symbol = fit_symbol(value, deviation, names, given.dtype)
            if symbol != ("s" if given.spec.scale != 1.0 else "1") and (e, symbol) not in told:
                told.append((e, symbol))
    if not told or len(told) > max(2, routing.num_experts // 4):
        return None
    experts = ", ".join(f"expert {e} counted {symbol}" for e, symbol in told)
    return Diagnosis(
        f"{experts} (expected {'s' if given.spec.scale != 1.0 else '1'}), all others right", "F7", "routed"
    )


def _router_cause(evidence: Evidence, recovered: Recovered | None) -> Diagnosis | None:
    """The output is a lawful sum of experts, but not of the experts, or with the weights, that the router has to choose."""
    if recovered is None:
        return None
    stages = evidence.given.stages
    wrong_M = evidence.wrong_RM.any(0)
    row = int(wrong_M.nonzero()[0, 0])
    lawful_ME = torch.zeros_like(recovered.weights_ME).scatter(1, stages.topk_ids_MK, stages.topk_weights_MK)
    other_sets = (recovered.picks_MK.sort(-1).values != stages.topk_ids_MK.sort(-1).values).any(-1) & wrong_M
    if bool(other_sets.any()):
        row = int(other_sets.nonzero()[0, 0])
    told, lawful = (
        _visits(recovered.weights_ME[row], recovered.picks_MK[row]),
        _visits(lawful_ME[row], stages.topk_ids_MK[row]),
    )
    what = (
        f"chooses other experts for {int(other_sets.sum())} of {len(wrong_M)} tokens"
        if bool(other_sets.any())
        else "weighs the right experts wrongly"
    )
    return Diagnosis(
        f"the router {what}, by no rule that is known here; token {row} visits {told}, the law says {lawful}", None,
        "topk_ids" if bool(other_sets.any()) else "topk_weights",
    )  # fmt: skip


def _visits(weights_E: Tensor, ids_K: Tensor) -> str:
    """'3: 0.41, 7: 0.59', by expert."""
    return ", ".join(f"{e}: {float(weights_E[e]):.3g}" for e in sorted(ids_K.tolist()))


def _unknown(evidence: Evidence) -> Diagnosis:
    given = evidence.given
    errors = torch.stack([(output - given.stages.output_MH).norm(dim=-1) for output in evidence.outputs])
    rank, row = divmod(int(errors.argmax()), errors.shape[1])
    relative = float(errors[rank, row] / given.stages.output_MH[row].norm().clamp(min=1e-30))
    wrong = int(evidence.wrong_RM.any(0).sum())
    return Diagnosis(
        f"unknown: neither a sum of the parts nor a wrong rule explains it; {wrong} of {errors.shape[1]} rows wrong, "
        f"worst token {row} on rank {rank}, off by {relative:.3g} of its length", None,
    )  # fmt: skip
