"""Reads the output of a labelled layer column by column: whose shard counts how often, times what."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.algebra import Evidence, Reading, fit_symbol, law, symbol_values
from harness.errors import ranks_text
from harness.labels.columns import Block, Labels
from harness.parts import LETTERS
from harness.recover import numbers_text


def read_coefficients(evidence: Evidence, rank: int) -> Reading | None:
    """One rank's factors by part and share. None where a share has several, or where a column should be 0 and is not."""
    given = evidence.given
    lawful, names = law(given), symbol_values(given.spec.scale, evidence.layout.sizes)
    held_M, law_MH = evidence.held_RM[rank], given.stages.output_MH
    if bool(((law_MH == 0) & (evidence.outputs[rank] != 0))[held_M].any()):
        return None
    ratio_MH = torch.where(law_MH != 0, evidence.outputs[rank] / law_MH, torch.nan)[held_M]
    read_H = (~ratio_MH.isnan()).any(0).tolist()
    least_H = ratio_MH.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(0).tolist()
    most_H = ratio_MH.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(0).tolist()
    symbol_of = functools.cache(lambda value: fit_symbol(value, 0.0, names, given.dtype))  # most sources count alike
    found: dict[str, dict[int, set[str]]] = {}
    for block, expert, row, column in _columns(_labels(evidence)):
        if block.part not in lawful or not read_H[column]:
            continue
        wanted = given.spec.scale if lawful[block.part] == "s" else 1.0
        symbols = found.setdefault(block.part, {}).setdefault(_share(evidence, block, expert, row), set())
        symbols |= {symbol_of(least_H[column] * wanted), symbol_of(most_H[column] * wanted)}
    return _joined(evidence, rank, found, lawful)


def _joined(
    evidence: Evidence, rank: int, found: dict[str, dict[int, set[str]]], lawful: dict[str, str]
) -> Reading | None:
    layout, symbols, own_only, uneven = evidence.layout, dict(lawful), set(), {}
    alike = evidence.ranks_agree
    for part, shares in found.items():
        if any(len(of) > 1 for of in shares.values()):
            return None
        by_share = {share: next(iter(of)) for share, of in shares.items()}
        mine = None if alike else layout.own(part, rank)
        if len(set(by_share.values())) == 1:
            symbols[part] = next(iter(by_share.values()))
        elif mine in by_share and {symbol for share, symbol in by_share.items() if share != mine} == {"0"}:
            symbols[part] = by_share[mine]
            own_only.add(part)
        else:
            symbols[part] = "uneven"
            uneven[part] = tuple(by_share.get(share, "?") for share in range(layout.shares(part)))
    return Reading(symbols, frozenset(own_only), uneven)


def _labels(evidence: Evidence) -> Labels:
    labels = evidence.given.labels
    assert labels is not None  # the caller's case has size=labels
    return labels


def _columns(labels: Labels) -> Iterator[tuple[Block, int, int, int]]:
    """(block, expert, row, column) of every source; of copies the first, where all are added up."""
    for block in labels.blocks:
        for expert in range(block.count):
            for row in range(1 if block.copied else block.each):
                yield block, expert, row, block.first + expert * block.each + row


def _share(evidence: Evidence, block: Block, expert: int, row: int) -> int:
    """Which of a part's shares a column belongs to: the rank that holds it, of the shared experts the tp rank."""
    grid, owners = evidence.layout.grid, evidence.layout.owners
    if block.copied:
        return 0
    if block.part == "shared":
        return row * grid.tp // block.each
    first = 0 if owners is None or grid.ep == 1 else owners[expert] * grid.moe_tp
    return first + row * grid.moe_tp // block.each


@dataclass(slots=True)
class _Off:
    """Sources of one kind that are off. rows: (share, row) of the intermediate dimension that they stand for.

    factors: by symbol, the plainest first; "" where the source should not be there at all.
    """

    block: Block
    factors: dict[str, float] = field(default_factory=dict)
    experts: set[int] = field(default_factory=set)
    rows: set[tuple[int, int]] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)
    tokens: set[int] = field(default_factory=set)

    def take(self, other: _Off) -> None:
        """Tell both as one kind, whose factors differ."""
        self.factors |= other.factors
        for mine, others in (
            (self.experts, other.experts), (self.ranks, other.ranks), (self.tokens, other.tokens),
        ):  # fmt: skip
            mine |= others
        self.rows |= other.rows


_KINDS = 4


def sources(evidence: Evidence, beyond_RMH: Tensor) -> str:
    """Every kind of source that is off, with its factor, experts, shares, ranks and tokens, in one sentence.

    beyond_RMH: bool, the coefficients that are wrong. Where there are many kinds, those of one part are told as one.
    """
    kinds = list(_kinds(evidence, beyond_RMH).values())
    if len(kinds) > _KINDS:
        parts: dict[tuple[str, bool], _Off] = {}
        for off in kinds:
            parts.setdefault((_who(off.block), "" in off.factors), _Off(off.block)).take(off)
        kinds = list(parts.values())
    sentences = [_told(evidence, off) for off in kinds]
    known_H = torch.zeros(beyond_RMH.shape[2], dtype=torch.bool)
    for _, _, _, column in _columns(_labels(evidence)):
        known_H[column] = True
    if bool(beyond_RMH[:, :, ~known_H].any()):
        sentences.append("columns that no expert writes are not 0: the layer adds its input or another buffer")
    return "; ".join(sentences)


def _kinds(evidence: Evidence, beyond_RMH: Tensor) -> dict[tuple[str, str], _Off]:
    """By part and factor."""
    given, kinds = evidence.given, dict[tuple[str, str], _Off]()
    lawful, names = law(given), symbol_values(given.spec.scale, evidence.layout.sizes)
    symbol_of = functools.cache(lambda value: fit_symbol(value, 0.0, names, given.dtype))
    outputs, law_MH = [output.tolist() for output in evidence.outputs], given.stages.output_MH.tolist()
    off_H: dict[int, list[tuple[int, int]]] = {}
    for rank, token, column in beyond_RMH.nonzero().tolist():
        off_H.setdefault(column, []).append((rank, token))
    for block, expert, row, column in _columns(_labels(evidence)):
        wanted = lawful.get(block.part, "1")
        for rank, token in off_H.get(column, ()):
            found, right = outputs[rank][token][column], law_MH[token][column]
            factor = 0.0 if right == 0 else found / right * (given.spec.scale if wanted == "s" else 1.0)
            symbol = "" if right == 0 else symbol_of(factor)
            symbol = f"{factor:.5g}" if symbol == wanted else symbol
            off = kinds.setdefault((_who(block), symbol), _Off(block, {symbol: factor}))
            off.experts.add(expert)
            off.rows.add((_share(evidence, block, expert, row), row))
            off.ranks.add(rank)
            off.tokens.add(token)
    return kinds


def _told(evidence: Evidence, off: _Off) -> str:
    """'R of experts 0 to 3, in the share of rank 1, counts 0 instead of s on rank 2 in tokens 0 to 9'."""
    who = _who(off.block)
    if off.block.count > 1:
        who += f" of expert{'s' if len(off.experts) > 1 else ''} {numbers_text(sorted(off.experts))}"
    if "" in off.factors:
        counted = "comes in uncalled"
    else:
        lawful = law(evidence.given).get(off.block.part, "1")
        low, high = (pick(off.factors, key=lambda name: off.factors[name]) for pick in (min, max))
        counted = f"counts {low if low == high else f'{low} to {high}'} instead of {lawful}"
    where = "" if len(off.ranks) == len(evidence.outputs) else f" on {ranks_text(sorted(off.ranks))}"
    return f"{who}{_rows_text(evidence, off)} {counted}{where} in tokens {numbers_text(sorted(off.tokens))}"


def _rows_text(evidence: Evidence, off: _Off) -> str:
    """Which part of the experts' intermediate rows is meant: nothing for all of them, whole shares by their rank."""
    block = off.block
    rows = sorted({row for _, row in off.rows})
    if block.copied or len(rows) == block.each:
        return ""
    shares = sorted({share for share, _ in off.rows})
    every = {
        (_share(evidence, block, expert, row), row) for expert in off.experts for row in range(block.each)
    }  # fmt: skip
    whole = {place for place in every if place[0] in shares} == off.rows
    which = f"the share{'s' if len(shares) > 1 else ''} of {ranks_text(shares)}"
    if whole:
        return f", {which},"
    return f", intermediate row{'s' if len(rows) > 1 else ''} {numbers_text(rows)} of {block.each} ({which}),"


def _who(block: Block) -> str:
    return f"{LETTERS[block.part]}{' (vision)' if block.tensor.startswith('vision_') else ''}"
