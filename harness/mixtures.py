"""Outputs in which tokens of several ranks are mixed: added where they do not belong together, or brought to others.

Ranks of different data-parallel groups, and under sequence parallelism those of one group too, have different tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence, fit_symbol, law, symbol_values
from harness.parts import LETTERS, parts
from harness.recover import Story


def mixture_story(evidence: Evidence) -> Story | None:
    """What one sum over ranks with other tokens, or a wrong table of rows in the combine, would explain."""
    return _added(evidence) or _scattered(evidence)


def _added(evidence: Evidence) -> Story | None:
    """Each token's output is lawful, or R or S of it, and the same parts of the tokens of other ranks stand on top."""
    held = _rows_by_set(evidence)
    if len(held) < 2:
        return None
    told: dict[tuple[int, ...], str] = {}
    for ranks, rows in held.items():
        if not bool(evidence.wrong_RM[ranks[0]][rows].any()):
            continue
        reading = _cross_fit(evidence, ranks[0], rows, [other for peers, other in held.items() if peers != ranks])
        if reading is None:
            return None
        told[ranks] = reading
    first = next(iter(told), None)
    if first is None or not told[first]:
        return None
    where = "" if len(told) == len(held) else f" on {evidence.layout.where(first)}"
    groups = "data-parallel" if evidence.layout.grid.sp == 1 else "sequence-parallel"
    return Story(
        "B15", "output",
        f"tokens of other ranks are added to those of each rank{where}, {told[first]}: a sum over {groups} ranks, whose "
        "tokens are different",
    )  # fmt: skip


def _rows_by_set(evidence: Evidence) -> dict[tuple[int, ...], Tensor]:
    """The ranks that have the same tokens, and those tokens, for ranks that have any."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, held_M in enumerate(evidence.held_RM):
        rows = tuple(held_M.nonzero()[:, 0].tolist())
        if rows:
            found.setdefault(rows, []).append(rank)
    return {tuple(ranks): torch.tensor(rows) for rows, ranks in found.items()}


def _cross_fit(evidence: Evidence, rank: int, rows: Tensor, others: list[Tensor]) -> str | None:
    """'R x s and S x 1' of the other ranks' tokens at the same places, '' if none count; None if that explains nothing."""
    given, share = evidence.given, evidence.given.spec.output.share
    found = parts(given)
    target = evidence.outputs[rank][rows] / share
    own = [part.value_MH[rows] for part in found]
    cross = [torch.zeros_like(target) for _ in found]
    for column, part in zip(cross, found, strict=True):
        for other in others:
            count = min(len(other), len(rows))
            column[:count] += part.value_MH[other[:count]]
    decided = evidence.decided_M[rows].clone()
    for other in others:
        count = min(len(other), len(rows))
        decided[:count] &= evidence.decided_M[other[:count]]
    used = [i for i, column in enumerate([*own, *cross]) if bool(column[decided].any())]
    matrix = torch.stack([[*own, *cross][i][decided].flatten() for i in used], 1)
    if target[decided].numel() < 2 * len(used) or not used:
        return None
    solved = torch.linalg.lstsq(matrix, target[decided].flatten()[:, None], driver="gelsd").solution[:, 0]
    naive_M = evidence.naive_M[rows][decided] / share
    growth = max(1.0, float(solved.abs().max()) / max(1.0, given.spec.scale)) * len(others)
    residual_M = (target[decided] - (matrix @ solved).view(-1, target.shape[1])).norm(dim=-1)
    if not bool((residual_M <= RESIDUAL_LIMIT * growth * (naive_M + naive_M.mean())).all()):
        return None
    names, lawful = symbol_values(given.spec.scale, evidence.layout.sizes), law(given)
    symbols = {i: fit_symbol(float(value), 0.0, names, given.dtype) for i, value in zip(used, solved, strict=True)}
    if any(symbols.get(i, lawful[part.name]) != lawful[part.name] for i, part in enumerate(found)):
        return None
    extra = {part.name: symbols.get(len(found) + i, "0") for i, part in enumerate(found)}
    if any(symbol not in names for symbol in extra.values()):
        return None
    return " and ".join(f"{LETTERS[name]} x {symbol}" for name, symbol in extra.items() if symbol != "0")


def _scattered(evidence: Evidence) -> Story | None:
    """Every result arrives once, but at other tokens: over all tokens the error adds up to nothing."""
    given = evidence.given
    miss_MH = evidence.assembled_MH - given.stages.output_MH
    wrong_M = evidence.wrong_RM.any(0)
    if int(wrong_M.sum()) < 2 or not evidence.ranks_agree:
        return None
    limit = RESIDUAL_LIMIT * float(evidence.naive_M.sum())
    if float(miss_MH.sum(0).norm()) > limit or float(miss_MH.norm()) < 10 * limit:
        return None
    return Story(
        "B11", "output",
        f"in {int(wrong_M.sum())} of {len(wrong_M)} tokens, results of experts stand at other tokens than they belong to: over all "
        "tokens nothing is lost or counted twice. The way back of the combine does not mirror the dispatch",
    )  # fmt: skip
