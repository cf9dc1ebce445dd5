"""From a wrong output to one sentence: what was counted how often, times what, on which rank, and why that happens.

First the algebra of the parts (algebra.py), then the wrong laws (variants/), then single experts, then what the router
must have chosen. A simpler explanation comes before a finer one. What nothing explains is called unknown, with its figures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from harness.algebra import (
    RESIDUAL_LIMIT,
    Evidence,
    Reading,
    formula,
    idle_ranks,
    is_lawful,
    law,
    lawful_reading,
    multiples,
    other_names,
    read_shares,
    read_whole,
    read_with_input,
    serves_nobody,
)  # fmt: skip
from harness.causes import Cause, find_causes, sizes_in, uneven_causes, uneven_shares, unexplained
from harness.coarse_scores import coarse_scores_story
from harness.layout import Layout
from harness.many_rows import many_rows_story
from harness.mixtures import mixture_story
from harness.one_rank import one_expert_story, one_rank_story, piece_story
from harness.other_rows import other_rows_story
from harness.parts import LETTERS
from harness.problem import Problem
from harness.recover import Story, numbers_text, recover, rows_story, suspects
from harness.unknown import unknown_story, zero_ranks
from harness.visits import expert_story, visits_story
from harness.wrong_law import wrong_law_story


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
        return algebra_sentence(evidence, whole)
    halves = _some_columns_cause(evidence)
    if halves is not None:
        return halves
    recovered = recover(evidence)
    recent = _placed(wrong_law_story(evidence, recovered, recent=True))
    if recent is not None:
        return recent
    shares = whole or _each(evidence, lambda e, rank: read_whole(e, rank) or read_shares(e, rank))
    if shares is not None and all(reading.is_symbolic for reading in shares.values()):
        told = algebra_sentence(evidence, shares)
        return told if told.family is not None else _placed(mixture_story(evidence)) or told
    placed = (
        _input_cause(evidence)
        or _some_rows_cause(evidence, symbolic=True)
        or _placed(rows_story(evidence))
        or _placed(mixture_story(evidence))
    )
    if placed is not None:
        return placed
    by_law = _placed(wrong_law_story(evidence, recovered, recent=False))
    if by_law is not None:
        return by_law
    if shares is not None:
        return algebra_sentence(evidence, shares)
    return (
        _placed(one_rank_story(evidence))
        or _placed(piece_story(evidence))
        or _placed(expert_story(evidence))
        or _placed(other_rows_story(evidence))
        or _placed(one_expert_story(evidence))
        or _placed(coarse_scores_story(evidence, recovered))
        or _placed(visits_story(evidence, recovered))
        or _some_rows_cause(evidence, symbolic=False)
        or _told(many_rows_story(evidence) or unknown_story(evidence))
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
    zero = zero_ranks(evidence)
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


def algebra_sentence(evidence: Evidence, readings: Mapping[int, Reading], rows_text: str = "") -> Diagnosis:
    """readings: by rank.    rows_text: ' in 3 of 7 tokens (0, 2, 5)' where they hold for those alone."""
    given, layout = evidence.given, evidence.layout
    lawful = lawful_reading(given)
    off = [rank for rank, reading in readings.items() if not is_lawful(reading, lawful)]
    if not off:
        return _told(many_rows_story(evidence) or unknown_story(evidence))
    # a rank whose own experts serve no token tells the least
    first = max((readings[rank] for rank in off), key=lambda reading: len(reading.own_only))
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
    some_tokens = rows_text.startswith(" in ") and "tokens" in rows_text and not first.uneven
    twice = {name for name, size in layout.sizes.items() if size == 2} | (set() if causes else {"2"})
    if some_tokens and any(twice & set(symbol.split("*")) for symbol in first.symbols.values()):
        families, why = {"G9"}, "those tokens are served twice"
    elif some_tokens and formula(first) != "0" and first.symbols == _without_routed(lawful.symbols):
        families, why = {"G9"}, "none of their experts serves those tokens"
    visited = suspects(given.stages.topk_ids_MK, evidence.wrong_RM.any(0)) if some_tokens and _one_choice(given) else []
    if visited:
        families, why = (
            set(),
            f"{why}; or they are exactly the tokens that visit expert {' or '.join(map(str, visited))}",
        )
    if causes and causes[0].symbols == {"routed": "0"} and all(serves_nobody(evidence, rank) for rank in alike):
        families, why = set(), f"{why}; or it is never summed over ranks: no token here has an expert of its own rank"
    even = everywhere and not first.own_only and not first.uneven and not rows_text
    sentence = f"y = {formula(first)} instead of {formula(lawful)}{where}{rows_text} ({s_text}{layout.text}): {why}"
    family = families.pop() if len(families) == 1 else None
    return Diagnosis(sentence, family, "output", dict(first.symbols) if even else {})


def _one_choice(given: Problem) -> bool:
    """Each token has one expert, so that a factor of R in some tokens may be an expert's."""
    return given.spec.routing.top_k == 1


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


def _without_routed(symbols: Mapping[str, str]) -> dict[str, str]:
    return {name: "0" if name in ("routed", "bias") else symbol for name, symbol in symbols.items()}


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
    told, idle, scale = algebra_sentence(evidence, readings), idle_ranks(evidence), evidence.given.spec.scale
    symbols = {reading.symbols.get("input", "0") for reading in readings.values()}
    times = {n for n, value in multiples(scale, evidence.layout).items() if value in (idle, idle * scale)}
    if told.family != "H1" or not idle or not symbols <= times:
        return told
    ranks = "rank that no token needs returns" if idle == 1 else f"{idle} ranks that no token needs return"
    why = f"the {ranks} what stood in the buffer, x"
    if symbols & {"1", "s", *evidence.layout.sizes, *(f"s*{name}" for name in evidence.layout.sizes)}:
        return replace(told, sentence=f"{told.sentence}; or {why}", family=None)
    return replace(told, sentence=f"{told.sentence.rpartition(': the layer')[0]}: {why}", family="G7")


def _some_rows_cause(evidence: Evidence, *, symbolic: bool) -> Diagnosis | None:
    """The parts' factors in the wrong rows alone, where other rows of the same ranks are right."""
    rows_RM = evidence.wrong_RM & evidence.decided_M
    off = [rank for rank, wrong_M in enumerate(evidence.wrong_RM) if bool(wrong_M.any())]
    right_RM = ~evidence.wrong_RM & evidence.decided_M & evidence.held_RM
    if not bool(rows_RM[off].any(1).all()) or not bool(right_RM[off].any(1).all()):
        return None
    by_share = symbolic and not evidence.ranks_agree  # else a share that some tokens lack may be an expert's
    readings = {
        rank: (
            read_whole(evidence, rank, rows_RM[rank])
            or (read_shares(evidence, rank, rows_RM[rank]) if by_share else None)
            if rank in off
            else lawful_reading(evidence.given)
        )
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
    return algebra_sentence(evidence, told, where)


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
    told = algebra_sentence(alone, readings, f" in columns {numbers} of {len(wrong_H)}")
    return told if told.family is not None else None


def _placed(story: Story | None) -> Diagnosis | None:
    return None if story is None else _told(story)


def _told(story: Story) -> Diagnosis:
    return Diagnosis(story.sentence, story.family, story.stage)
