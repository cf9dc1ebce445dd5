"""From a wrong output to one sentence: what was counted how often, times what, on which rank, and why that happens.

First the algebra of the parts (algebra.py), then the wrong laws (variants/), then single experts, then what the router
must have chosen. A simpler explanation comes before a finer one. What nothing explains is called unknown, with its figures.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.algebra import (
    RESIDUAL_LIMIT,
    Evidence,
    Reading,
    fit_symbol,
    formula,
    is_lawful,
    law,
    lawful_reading,
    other_names,
    read_shares,
    read_whole,
    read_with_input,
    symbol_values,
)  # fmt: skip
from harness.causes import Cause, find_causes, sizes_in, uneven_causes, uneven_shares, unexplained
from harness.layout import Layout
from harness.mixtures import mixture_story
from harness.one_rank import one_rank_story, piece_story
from harness.parts import LETTERS, expert_parts
from harness.problem import Problem
from harness.recover import Recovered, Story, numbers_text, recover, recoverable, routing_story, rows_story, suspects
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
    whole = _each(evidence, read_whole)
    if whole is not None and all(reading.is_symbolic for reading in whole.values()):
        return _algebra_sentence(evidence, whole)
    halves = _some_columns_cause(evidence)
    if halves is not None:
        return halves
    recovered = recover(evidence)
    recent = _variant_cause(evidence, recovered, recent=True)
    if recent is not None:
        return recent
    shares = whole or _each(evidence, lambda e, rank: read_whole(e, rank) or read_shares(e, rank))
    if shares is not None and all(reading.is_symbolic for reading in shares.values()):
        told = _algebra_sentence(evidence, shares)
        return told if told.family is not None else _placed(mixture_story(evidence)) or told
    placed = (
        _input_cause(evidence)
        or _some_rows_cause(evidence, symbolic=True)
        or _placed(rows_story(evidence))
        or _placed(mixture_story(evidence))
    )
    if placed is not None:
        return placed
    by_law = _variant_cause(evidence, recovered, recent=False)
    if by_law is not None:
        return by_law
    if shares is not None:
        return _algebra_sentence(evidence, shares)
    return (
        _placed(one_rank_story(evidence))
        or _placed(piece_story(evidence))
        or _expert_cause(evidence)
        or _router_cause(evidence, recovered)
        or _some_rows_cause(evidence, symbolic=False)
        or _unknown(evidence)
    )


def _each(evidence: Evidence, read: Callable[[Evidence, int], Reading | None]) -> dict[int, Reading] | None:
    """The reading of each rank that has decided tokens, or None if one of them has none; equal outputs are read once."""
    readings: dict[int, Reading] = {}
    for rank, output in enumerate(evidence.outputs):
        if not bool((evidence.held_RM[rank] & evidence.decided_M).any()):
            continue
        first = rank - rank % evidence.tp
        alike = first in readings and torch.equal(output, evidence.outputs[first])
        alike = alike and torch.equal(evidence.held_RM[rank], evidence.held_RM[first])
        reading = readings[first] if alike else read(evidence, rank)
        if reading is None:
            return None
        readings[rank] = reading
    return readings or None


def _plain_cause(evidence: Evidence) -> Diagnosis | None:
    """What needs no arithmetic: not-a-number, infinity, all zeros."""
    bad = [r for r, output in enumerate(evidence.outputs) if not bool(output.isfinite().all())]
    held = [output[rows] for output, rows in zip(evidence.outputs, evidence.held_RM, strict=True)]
    if bad:
        outputs_RMH = torch.stack(list(evidence.outputs))
        bad_M = ((~outputs_RMH.isfinite()).any(-1) & evidence.held_RM).any(0)
        row = int(bad_M.nonzero()[0, 0])
        kind = "NaN" if bool(outputs_RMH.isnan().any()) else "infinity"
        stage, why = _first_extreme_stage(evidence, row)
        return Diagnosis(
            f"{kind} in {int(bad_M.sum())} of {int(evidence.held_RM.any(0).sum())} rows, first in token {row}, "
            f"on {evidence.layout.where(bad)}; {why}",
            "G5" if kind == "NaN" else "D12", stage,
        )  # fmt: skip
    zero = _zero_ranks(evidence)
    if len(zero) == sum(map(bool, map(len, held))):
        return Diagnosis(
            "y = 0 on every rank: nothing was computed or nothing was written",
            "A6",
            coefficients={"routed": "0", "shared": "0"},
        )
    if zero and not bool(evidence.wrong_RM[[r for r in range(len(held)) if r not in zero]].any()):
        where = evidence.layout.where(zero)
        return Diagnosis(f"y = 0 on {where}: nothing was computed or nothing was written there", "A6")
    if evidence.given.dtype is torch.float32:
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if all(torch.equal(rows.to(dtype).double(), rows) for rows in held):
                return Diagnosis(
                    f"every number of the fp32 output is a {name} number: it was rounded to {name}, or shorter, on its way",
                    "P1",
                )
    return None


def _zero_ranks(evidence: Evidence) -> list[int]:
    """The ranks that return nothing but zeros, and should not."""
    held = zip(evidence.outputs, evidence.held_RM, strict=True)
    return [r for r, (y, rows) in enumerate(held) if not bool(y[rows].any()) and bool(evidence.wrong_RM[r].any())]


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


def _algebra_sentence(evidence: Evidence, readings: Mapping[int, Reading], rows_text: str = "") -> Diagnosis:
    """readings: by rank.    rows_text: ' in 3 of 7 tokens (0, 2, 5)' where they hold for those alone."""
    given, layout = evidence.given, evidence.layout
    lawful = lawful_reading(given)
    off = [rank for rank, reading in readings.items() if not is_lawful(reading, lawful)]
    if not off:
        return _unknown(evidence)
    first = readings[off[0]]
    alike = [rank for rank in off if readings[rank] == first]
    everywhere = len(alike) == len(readings)
    causes = find_causes(first, lawful.symbols, given.spec.scale != 1.0, layout)
    others = [] if first.uneven else _other_readings(first, given, layout)
    if others and (not causes or unexplained(first, lawful.symbols, causes)):
        causes = others[0][1]
    uneven = uneven_causes(readings, lawful.symbols, layout) if first.uneven or not causes else []
    causes = uneven if first.uneven or not causes else causes
    s_text = f"s={given.spec.scale:g}, " if given.spec.scale != 1.0 else ""
    where = "" if everywhere else f" on {layout.where(alike)}"
    why = "; and ".join(cause.sentence for cause in causes)
    why = why or uneven_shares(first, lawful.symbols, layout) or "no known cause has these factors"
    if formula(first) in ("0", "x"):
        why = (
            "nothing was computed or nothing was written there"
            if formula(first) == "0"
            else "the layer returns its input"
        )
    elif causes and not uneven:
        left = set() if others else unexplained(first, lawful.symbols, causes)
        why += f"; no known cause has the factor of {', '.join(LETTERS[name] for name in sorted(left))}" if left else ""
        sizes = {name for cause in causes for symbol in cause.symbols.values() for name in sizes_in(symbol, layout)}
        why += _same_size(given, layout, sizes)
    for other, found in others:
        same = f"y = {formula(other)} is the same at s={given.spec.scale:g}, {layout.text}"
        why += f"; {same}"
        if found[0].sentence != causes[0].sentence:
            why += f": or {'; and '.join(cause.sentence for cause in found)}"
    families = {cause.family for cause in causes[:1]} | {found[0].family for _, found in others}
    served_twice = rows_text.startswith(" in ") and "tokens" in rows_text and not first.uneven
    twice = {name for name, size in layout.sizes.items() if size == 2} | (set() if causes else {"2"})
    if served_twice and any(twice & set(symbol.split("*")) for symbol in first.symbols.values()):
        families, why = {"G9"}, "those tokens are served twice"
    even = everywhere and not first.own_only and not first.uneven and not rows_text
    sentence = f"y = {formula(first)} instead of {formula(lawful)}{where}{rows_text} ({s_text}{layout.text}): {why}"
    family = families.pop() if len(families) == 1 else None
    return Diagnosis(sentence, family, "output", dict(first.symbols) if even else {})


def _other_readings(reading: Reading, given: Problem, layout: Layout) -> list[tuple[Reading, list[Cause]]]:
    """The reading with factors that are the same numbers by accident of s, each of which known causes explain wholly."""
    scale, lawful = given.spec.scale, law(given)
    if scale == 1.0:
        return []
    names = [
        [symbol, *(other for other in other_names(symbol, scale, layout.sizes) if _has_s(other) != _has_s(symbol))]
        for symbol in reading.symbols.values()
    ]
    found = []
    for symbols in itertools.islice(itertools.product(*names), 1, 32):
        other = replace(reading, symbols=dict(zip(reading.symbols, symbols, strict=True)))
        causes = find_causes(other, lawful, True, layout)
        if causes and not unexplained(other, lawful, causes):
            found.append((other, causes))
    return found


def _has_s(symbol: str) -> bool:
    return "s" in re.split(r"[-*/^]", symbol)


def _same_size(given: Problem, layout: Layout, named: Collection[str]) -> str:
    """What else a factor of a size can be by accident."""
    if not named:
        return ""
    name = min(named, key=list(layout.sizes).index)
    size = layout.sizes[name]
    numbers = [("2", 2), ("K", given.spec.routing.top_k), *layout.sizes.items()]
    if "moe.tp" not in layout.sizes and layout.grid.ep > 1:
        numbers.append(("moe.tp", layout.grid.moe_tp))
    others = [other for other, value in numbers if value == size and other != name]
    told = f"; at {name}={size} it could also be a factor of {' or '.join(others)}, another {name} tells"
    return told if others else ""


def _input_cause(evidence: Evidence) -> Diagnosis | None:
    readings = _each(evidence, read_with_input)
    if readings is None or not all(reading.is_symbolic for reading in readings.values()):
        return None
    return _algebra_sentence(evidence, readings)


def _some_rows_cause(evidence: Evidence, *, symbolic: bool) -> Diagnosis | None:
    """The parts' factors in the wrong rows alone, where other rows of the same ranks are right."""
    rows_RM = evidence.wrong_RM & evidence.decided_M
    off = [rank for rank, wrong_M in enumerate(evidence.wrong_RM) if bool(wrong_M.any())]
    right_RM = ~evidence.wrong_RM & evidence.decided_M & evidence.held_RM
    if not bool(rows_RM[off].any(1).all()) or not bool(right_RM[off].any(1).all()):
        return None
    readings = {
        rank: read_whole(evidence, rank, rows_RM[rank]) if rank in off else lawful_reading(evidence.given)
        for rank in range(len(evidence.outputs))
    }
    told = {rank: reading for rank, reading in readings.items() if reading is not None}
    if len(told) < len(readings) or (symbolic and not all(reading.is_symbolic for reading in told.values())):
        return None
    rows = {rank: rows_RM[rank].nonzero()[:, 0].tolist() for rank in off}
    if all(rows[rank] == rows[off[0]] for rank in off):
        where = f" in {len(rows[off[0]])} of {rows_RM.shape[1]} tokens ({numbers_text(rows[off[0]])})"
    else:
        where = " in some tokens (" + "; ".join(f"rank {rank}: {numbers_text(rows[rank])}" for rank in off[:4]) + ")"
    return _algebra_sentence(evidence, told, where)


def _some_columns_cause(evidence: Evidence) -> Diagnosis | None:
    """The parts' factors in the wrong columns alone, where all rows are right in the other columns."""
    given = evidence.given
    rows_RM = evidence.wrong_RM & evidence.decided_M
    if not bool(rows_RM.any()) or rows_RM.shape[1] < 2:
        return None
    limit_M1 = RESIDUAL_LIMIT * (evidence.naive_M + evidence.naive_M.mean())[:, None] / given.spec.hidden_size**0.5
    off_RMH = torch.stack([(output - given.stages.output_MH).abs() for output in evidence.outputs]) > limit_M1
    wrong_H = off_RMH[rows_RM].double().mean(0) > 0.5
    if (
        not bool(wrong_H.any())
        or 4 * int(wrong_H.sum()) > 3 * len(wrong_H)
        or bool(off_RMH[rows_RM][:, ~wrong_H].any())
    ):
        return None
    alone = replace(evidence, columns_H=wrong_H)
    readings = _each(alone, lambda e, rank: read_whole(e, rank) or read_shares(e, rank))
    if readings is None or not all(reading.is_symbolic for reading in readings.values()):
        return None
    factors = {symbol for reading in readings.values() for symbol in reading.symbols.values()}
    if factors == {"0"} or factors <= {"2", "2*s"}:
        return None  # y itself is 0 or doubled there, whatever its parts: rows_story tells that
    numbers = numbers_text(wrong_H.nonzero()[:, 0].tolist())
    told = _algebra_sentence(alone, readings, f" in columns {numbers} of {len(wrong_H)}")
    return told if told.family is not None else None


def _placed(story: Story | None) -> Diagnosis | None:
    return None if story is None else Diagnosis(story.sentence, story.family, story.stage)


# Variants that alone explained an earlier mismatch: one fault shows in many cases, and trying all laws is dear.
_recent: list[tuple[str, str]] = []


@dataclass(frozen=True, slots=True)
class _Fit:
    """How well a variant explains an output. left: its residual in units of the naive runs' error, over the wrong rows."""

    variant: Variant
    left: float
    ranks: tuple[int, ...]


def _variant_cause(evidence: Evidence, recovered: Recovered | None, *, recent: bool) -> Diagnosis | None:
    """The wrong law that explains the output, among those that explained an earlier one, or among the others.

    Several laws may explain it, in a short dtype or with one token: then all that explain it about as well are told.
    """
    picks_MK = None if recovered is None else recovered.picks_MK
    told_by_router = recoverable(evidence.given)
    fits: list[_Fit] = []
    for variant in variants(evidence.given, picks_MK, evidence.layout.grid.moe_tp):
        if recent and (variant.family, variant.sentence) not in _recent:
            continue
        if told_by_router and (recovered is None) is variant.routes:
            continue  # experts and S are right if the output is a sum of the lawful experts' outputs, else the router may be
        fit = _explained_by(evidence, variant)
        if fit is not None:
            fits.append(fit)
    if not fits:
        return None
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
        return Diagnosis(best.variant.sentence + where, best.variant.family, best.variant.stage)
    if recent:
        return None
    families, stages = ({getattr(fit.variant, name) for fit in contenders} for name in ("family", "stage"))
    more = f", or {len(sentences) - 3} more" if len(sentences) > 3 else ""
    return Diagnosis(
        f"these tokens fit more than one cause{where}: {'; or '.join(sentences[:3])}{more}",
        families.pop() if len(families) == 1 else None,
        stages.pop() if len(stages) == 1 else "output",
    )


# A variant has to leave no more than this many times the naive runs' error (right ones left 1.6 at most in 264 planted
# faults, and those that fitted by accident 2 and more), and a third of what the law leaves.
_LEFT = 1.75
_BETTER = 3.0


def _explained_by(evidence: Evidence, variant: Variant) -> _Fit | None:
    """How a variant explains the wrong rows of all ranks, near ties aside; None if it does not."""
    given = evidence.given
    try:
        stages = variant.compute()
    except SpecError:
        return None  # this layer cannot get that rule wrong
    naive_M = evidence.naive_M
    growth_M = (stages.output_MH.norm(dim=-1) / given.stages.output_MH.norm(dim=-1).clamp(min=1e-30)).clamp(min=1.0)
    unit_M = growth_M * (naive_M + naive_M.mean()) / 2
    decided_M = evidence.decided_M
    if variant.routes:
        decided_M = torch.minimum(stages.margin_M, given.stages.margin_M) > _TIE[given.dtype]
    ranks, left, lawful = [], [], []
    for rank, output in enumerate(evidence.outputs):
        wrong_M = evidence.wrong_RM[rank]
        if not bool(wrong_M.any()):
            continue
        judged_M = decided_M & evidence.held_RM[rank] if bool((wrong_M & decided_M).any()) else wrong_M
        left_M = (output - stages.output_MH).norm(dim=-1) / unit_M
        if not bool((left_M <= 2 * RESIDUAL_LIMIT)[judged_M].all()):
            return None
        if float((left_M <= RESIDUAL_LIMIT)[wrong_M].double().mean()) < 0.5:
            return None  # near ties may fall either way, but not most rows
        ranks.append(rank)
        left.append(left_M[judged_M])
        lawful.append(((output - given.stages.output_MH).norm(dim=-1) / unit_M)[judged_M])
    left_over, law_over = (float(torch.cat(rows).square().mean().sqrt()) for rows in (left, lawful))
    return _Fit(variant, left_over, tuple(ranks)) if left_over <= _LEFT and _BETTER * left_over <= law_over else None


def _expert_cause(evidence: Evidence) -> Diagnosis | None:
    """Experts that count more or less often than their router weight says."""
    given = evidence.given
    routing = given.spec.routing
    if given.spec.vision is not None or routing.num_experts > 64 or routing.weight_on == "input":
        return None
    alone = [value for value in enumerate(expert_parts(given)) if bool(value[1].any())]
    rest = given.stages.output_MH / given.spec.output.share - given.spec.scale * given.stages.routed_MH
    matrix = torch.stack([value.flatten() for _, value in alone], 1)
    if not alone or matrix.shape[0] < 2 * matrix.shape[1]:
        return None
    naive_M = evidence.naive_M / given.spec.output.share
    names = symbol_values(given.spec.scale, {})  # an expert is spread over all ranks: tp is no factor of one
    visits_E = given.stages.topk_ids_MK.flatten().bincount(minlength=routing.num_logits).tolist()
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
    if not told or 2 * len({e for e, _ in told}) > len(alone):
        return None  # most experts are off: the fault is not theirs
    if any(symbol not in names and visits_E[e] < 2 for e, symbol in told):
        return None  # with one visit, an expert's factor and a router weight are the same number
    experts = ", ".join(f"expert {e} counted {symbol}" for e, symbol in told)
    return Diagnosis(
        f"{experts} (expected {'s' if given.spec.scale != 1.0 else '1'}), all others right", "F7", "routed"
    )


def _router_cause(evidence: Evidence, recovered: Recovered | None) -> Diagnosis | None:
    """The output is a lawful sum of experts, but not of the experts, or with the weights, that the router has to choose."""
    if recovered is None:
        return None
    story = _placed(routing_story(evidence, recovered))
    if story is not None:
        return story
    stages = evidence.given.stages
    wrong_M = evidence.wrong_RM[recovered.rank]
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
        f"{int(other_sets.sum())} of {len(wrong_M)} tokens visit other experts than the law's"
        if bool(other_sets.any())
        else "the right experts have wrong weights"
    )
    return Diagnosis(
        f"{what}, by no rule that is known here; token {row} visits {told}, the law says {lawful}", None,
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
        f"unknown: neither a sum of the parts nor a known wrong rule explains it; {wrong} of {errors.shape[1]} rows wrong, "
        f"worst token {row} on rank {rank}, off by {relative:.3g} of its length{_whereabouts(evidence, relative)}", None,
    )  # fmt: skip


def _whereabouts(evidence: Evidence, relative: float) -> str:
    """What the wrong places have in common, for an error without a name: tokens, columns, experts, ranks."""
    given, wrong_RM = evidence.given, evidence.wrong_RM
    wrong_M, clues = wrong_RM.any(0), []
    if not bool(wrong_M.all()):
        clues.append(f"only tokens {numbers_text(wrong_M.nonzero()[:, 0].tolist())}")
    error_MH = torch.stack([(output - given.stages.output_MH).abs() for output in evidence.outputs]).amax(0)[wrong_M]
    naive_M = evidence.naive_M[wrong_M]
    wrong_H = (error_MH > 6 * naive_M[:, None] / math.sqrt(error_MH.shape[1])).any(0)
    columns = wrong_H.nonzero()[:, 0].tolist()
    if columns and len(columns) <= 3 * len(wrong_H) // 4:
        clues.append(f"only columns {numbers_text(columns)} of {len(wrong_H)}")
    visited = suspects(given.stages.topk_ids_MK, wrong_M)
    if visited:
        clues.append(f"exactly the tokens that visit expert {' or '.join(map(str, visited))}")
    if zero := _zero_ranks(evidence):
        clues.append(f"y = 0 on {evidence.layout.where(zero)}")
    right = [r for r, wrong in enumerate(wrong_RM) if not bool(wrong.any()) and bool(evidence.held_RM[r].any())]
    if given.dtype is torch.float32 and bool(wrong_M.all()) and 2**-12 < relative < 2**-6:
        clues.append("as little as a rounding to bf16 or fp16 somewhere would do")
    if right:
        clues.append(f"{evidence.layout.where(right)} right")
    elif len(evidence.outputs) > 1:
        clues.append("all ranks alike" if evidence.ranks_agree else "the ranks differ")
    return f" ({'; '.join(clues)})" if clues else ""
