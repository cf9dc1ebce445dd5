"""Outputs in which tokens of several ranks are mixed: added where they do not belong together, or brought to others.

Ranks of different data-parallel groups, and under sequence parallelism those of one group too, have different tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence, fit_symbol, law, symbol_values
from harness.layout import ROUTED
from harness.parts import LETTERS, parts, rank_shares, shares
from harness.recover import Story, numbers_text, rows_by_set, span_text


def mixture_story(evidence: Evidence) -> Story | None:
    """What one sum over ranks with other tokens, or a wrong table of rows in the combine, would explain."""
    return (
        _added(evidence)
        or _cut_over_all(evidence)
        or _constant(evidence)
        or _misrouted(evidence)
        or _scattered(evidence)
    )


def _added(evidence: Evidence) -> Story | None:
    """Each token's output is lawful, or R or S of it, and the same parts of the tokens of other ranks stand on top."""
    held = rows_by_set(evidence)
    tp, sp = evidence.layout.grid.tp, evidence.layout.grid.sp
    meets: dict[str, Callable[[int, int], bool]] = {"": lambda rank, other: True}
    if evidence.layout.grid.dp > 1 and sp > 1:  # ranks then differ in tokens in both directions
        meets["sequence-parallel"] = lambda rank, other: rank // tp == other // tp
        meets["data-parallel"] = lambda rank, other: rank % tp == other % tp
    for name, meet in meets.items():
        told: dict[tuple[int, ...], str] = {}
        for ranks, rows in held.items():
            others = [other for peers, other in held.items() if peers != ranks and meet(ranks[0], peers[0])]
            if not bool(evidence.wrong_RM[ranks[0]][rows].any()):
                continue
            reading = _cross_fit(evidence, ranks[0], rows, others) if others else None
            if reading is None:
                break
            told[ranks] = reading
        else:
            first = next(iter(told), None)
            if first is not None and told[first]:
                where = "" if len(told) == len(held) else f" on {evidence.layout.where(first)}"
                groups = name or ("data-parallel" if sp == 1 else "sequence-parallel")
                return Story(
                    "B15", "output",
                    f"tokens of other ranks are added to those of each rank{where}, {told[first]}: a sum over {groups} ranks, "
                    "whose tokens are different",
                )  # fmt: skip
    return None


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
    if not used or target[decided].numel() < 2 * len(used):
        return None
    matrix = torch.stack([[*own, *cross][i][decided].flatten() for i in used], 1)
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


def _cut_over_all(evidence: Evidence) -> Story | None:
    """The shared experts in pieces for all ranks, as the routed ones are, and summed over tp alone."""
    given, grid = evidence.given, evidence.layout.grid
    if grid.dp == 1 or given.spec.shared is None or given.spec.shared.intermediate_size % grid.ranks:
        return None
    rest_MH = given.stages.output_MH - given.spec.output.share * given.stages.shared_MH
    pieces = [part for part in shares(given, grid.ranks) if part.name in ("shared", "shared bias")]
    for rank, output in enumerate(evidence.outputs):
        mine = {rank - rank % grid.tp + t for t in range(grid.tp)}
        kept = [part.value_MH for part in pieces if part.shard is None or part.shard in mine]
        foretold_MH = rest_MH + given.spec.output.share * torch.stack(kept).sum(0)
        held_M = evidence.held_RM[rank]
        miss_M = (output - foretold_MH).norm(dim=-1)[held_M]
        if not bool((miss_M <= RESIDUAL_LIMIT * (evidence.naive_M + evidence.naive_M.mean())[held_M]).all()):
            return None
    told = "the shared experts are cut over all ranks, as the routed ones are, but summed over tp alone: S lacks the pieces "
    return Story("B5", "shared", told + "that ranks of other dp ranks hold")


# The part of the squared miss that one number for each row may leave: rounding alone passes for a small constant.
_LEFT_BY_CONSTANT = 0.1


def _constant(evidence: Evidence) -> Story | None:
    """All columns of a row are off by the same number."""
    given, wrong_M = evidence.given, evidence.wrong_RM.any(0)
    miss_MH = (evidence.assembled_MH - given.stages.output_MH)[wrong_M]
    if miss_MH.shape[1] < 2 or not evidence.ranks_agree:
        return None
    level_M1, root = miss_MH.mean(-1, keepdim=True), miss_MH.shape[1] ** 0.5
    size_M = given.stages.output_MH[wrong_M].norm(dim=-1).clamp(min=1e-30)
    growth_M = 1.0 + level_M1[:, 0].abs() * root / size_M
    limit_M = RESIDUAL_LIMIT * growth_M * (evidence.naive_M[wrong_M] + evidence.naive_M.mean())
    left_MH = miss_MH - level_M1
    if not bool((left_MH.norm(dim=-1) <= limit_M).all()):
        return None
    if float(left_MH.square().sum()) > _LEFT_BY_CONSTANT * float(miss_MH.square().sum()):
        return None
    same = f"off by the same number, {span_text(level_M1)}"
    slots_M = _slots_elsewhere(evidence)
    used_M = slots_M[wrong_M]
    value = float((level_M1[:, 0] * used_M).sum() / used_M.square().sum().clamp(min=1.0))
    fits = bool(((level_M1[:, 0] - value * used_M).abs() <= limit_M / root).all())
    if value and fits and bool((used_M > 0).all()) and not bool((slots_M[~wrong_M] > 0).any()) and _varied(slots_M):
        told = f"slots that nobody wrote hold {value:.3g} and are added"
        return Story("G2", "routed", f"all columns of a row are {same}: {told}")
    level = float(level_M1.mean())
    if bool(((level_M1[:, 0] - level).abs() <= limit_M / root).all()):
        told = "every number" if bool(wrong_M.all()) else f"every number of tokens {_told_rows(wrong_M)}"
        return Story(None, "output", f"{told} is off by {level:.3g}: a constant is added")
    return Story(None, "output", f"all columns of a row are {same}: no cause of such numbers is known")


def _varied(counts_M: Tensor) -> bool:
    """Whether two numbers or more stand there twice or more: one row alone can be anything."""
    return int((counts_M.unique(return_counts=True)[1] > 1).sum()) > 1


def _told_rows(rows_M: Tensor) -> str:
    return numbers_text(rows_M.nonzero()[:, 0].tolist())


def _slots_elsewhere(evidence: Evidence) -> Tensor:
    """float64 [M]: slots of a token on the ranks that it is sent to, less those of the experts that they hold."""
    layout, ids_MK = evidence.layout, evidence.given.stages.topk_ids_MK
    if layout.owners is None or int(ids_MK.max()) >= len(layout.owners):
        return torch.zeros(len(ids_MK), dtype=torch.float64)
    owner_MK = torch.tensor(layout.owners)[ids_MK]
    visited_M = torch.zeros(len(ids_MK), layout.grid.ep).scatter(1, owner_MK, 1.0).sum(-1).double()
    return (visited_M - 1) * ids_MK.shape[1] * layout.grid.moe_tp


def _misrouted(evidence: Evidence) -> Story | None:
    """Each row is a sum of what ranks computed, but for other tokens: the combine reads a wrong table of rows."""
    given, layout = evidence.given, evidence.layout
    held = [part for part in rank_shares(given, layout) if part.name in ROUTED]
    if not any(part.shard for part in held) or not evidence.ranks_agree or given.spec.experts.latent_bias:
        return None
    results: dict[int, Tensor] = {}
    for part in held:
        rank = part.shard or 0  # where every rank has a piece of all experts, the first adds their biases
        value_MH = given.spec.output.share * given.spec.scale * part.value_MH
        results[rank] = results[rank] + value_MH if rank in results else value_MH
    ranks, tokens = list(results), given.stages.output_MH.shape[0]
    words_JH = torch.cat([results[rank] for rank in ranks])
    used_J = words_JH.norm(dim=-1) > 0
    rest_MH = evidence.assembled_MH - (
        given.stages.output_MH - given.spec.output.share * given.spec.scale * given.stages.routed_MH
    )
    wrong = evidence.wrong_RM.any(0).nonzero()[:, 0].tolist()
    limit_M = RESIDUAL_LIMIT * (evidence.naive_M + evidence.naive_M.mean())
    told: list[str] = []
    solved, whole = 0, []
    for row in wrong:
        picked = _sum_of_words(rest_MH[row], words_JH, used_J, float(limit_M[row]), len(ranks) + 1)
        if picked is None:
            continue
        solved += 1
        whole.append((row, {j % tokens for j in picked}))
        strangers = [(ranks[j // tokens], j % tokens) for j in picked if j % tokens != row]
        if strangers and len(told) < 2:
            told.append(
                f"token {row} gets " + ", ".join(f"rank {rank}'s result for token {m}" for rank, m in strangers[:2])
            )
    if not told or solved < max(2, (3 * len(wrong) + 3) // 4):
        return None
    if all(len(sources) <= 1 for _, sources in whole):
        return _whole_rows(whole, evidence)
    return Story(
        "B11", "output",
        f"the combine adds results to the wrong tokens: {'; '.join(told)} ({solved} of {len(wrong)} wrong rows are such sums)",
    )  # fmt: skip


def _whole_rows(found: list[tuple[int, set[int]]], evidence: Evidence) -> Story:
    """found: rows, and the token whose R each of them holds, if it holds any."""
    rank_of = evidence.held_RM.int().argmax(0)
    moves = [(row, next(iter(sources))) for row, sources in found if sources]
    abroad = all(bool(rank_of[row] != rank_of[m]) for row, m in moves)
    told = ", ".join(f"token {row} gets that of token {m}" for row, m in moves[:3])
    empty = [row for row, sources in found if not sources]
    told += f"; {len(empty)} token{'s get' if len(empty) > 1 else ' gets'} nothing" if empty else ""
    why = "gather and scatter do not cut the rows by the same sizes"
    return Story("B12" if abroad or empty else "H2", "output", f"rows of R stand at the wrong tokens: {told}: {why}")


def _sum_of_words(target_H: Tensor, words_JH: Tensor, used_J: Tensor, limit: float, most: int) -> list[int] | None:
    """The few words whose plain sum is the target, found greedily; None if there are none. [] for a target of 0."""
    picked: list[int] = []
    left_H, norms_J = target_H, words_JH.norm(dim=-1).clamp(min=1e-30)
    while float(left_H.norm()) > limit:
        if len(picked) == most:
            return None
        likeness_J = (words_JH @ left_H / norms_J).masked_fill(~used_J, -1.0)
        likeness_J[picked] = -1.0
        picked.append(int(likeness_J.argmax()))
        chosen_JH = words_JH[picked]
        factors = torch.linalg.lstsq(chosen_JH.T, target_H[:, None], driver="gelsd").solution[:, 0]
        left_H = target_H - factors @ chosen_JH
        if float(left_H.norm()) <= limit:
            right = bool(((factors - 1).abs() <= 0.02).all())
            return picked if right and float((target_H - chosen_JH.sum(0)).norm()) <= 4 * limit else None
    return picked


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
