"""What a router must have chosen, read off the output alone: the weight of every expert in every row.

Each row of the output, less the lawful rest, is solved for the experts' own outputs on that token. It needs no stages
from the system, only fewer experts than half the width, experts that are linear in their weight, and right experts.
`routing_story` then says in which simple way those weights differ from the law's; `rows_story` knows outputs whose rows
are right but stand at other tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence
from harness.layout import Layout
from harness.misplaced import placement_story
from harness.parts import rank_shares
from harness.problem import Problem
from reference.moe import Choice, forward


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """weights_ME: float64, in units of the router's weights before s.    picks_MK: the K experts of largest weight.

    rank: whose output it is.
    """

    weights_ME: Tensor
    picks_MK: Tensor
    rank: int


def recoverable(given: Problem) -> bool:
    """Whether outputs of this layer tell the router's weights."""
    spec, routing = given.spec, given.spec.routing
    inner = spec.experts.latent_size or spec.hidden_size
    inputs = routing.weight_on == "input" or routing.num_zero_experts > 0
    return spec.vision is None and not inputs and routing.num_experts <= inner // 2


def recover(evidence: Evidence) -> Recovered | None:
    """The router weights that explain the first wrong rank's output; None if none do, or if the layer is not recoverable."""
    given = evidence.given
    if not recoverable(given):
        return None
    spec = given.spec
    rank = int(evidence.wrong_RM.any(1).nonzero()[0, 0])
    columns_EMH = each_expert(given)
    rest_MH = given.stages.offset_H + given.stages.shared_MH
    output_MH = evidence.assembled_MH if evidence.ranks_agree else evidence.outputs[rank]
    target_MH = (output_MH / spec.output.share - rest_MH) / spec.scale
    matrix_MHE = columns_EMH.permute(1, 2, 0)
    weights_ME = torch.linalg.lstsq(matrix_MHE, target_MH[:, :, None], driver="gelsd").solution[:, :, 0]
    residual_M = ((matrix_MHE @ weights_ME[:, :, None])[:, :, 0] - target_MH).norm(dim=-1) * spec.scale
    naive_M = evidence.naive_M / spec.output.share
    growth_M = (weights_ME.abs().sum(-1) / given.stages.topk_weights_MK.abs().sum(-1).clamp(min=1e-30)).clamp(min=1.0)
    if not bool((residual_M <= RESIDUAL_LIMIT * growth_M * (naive_M + naive_M.mean())).all()):
        return None
    return Recovered(weights_ME, weights_ME.abs().topk(spec.routing.top_k, -1).indices, rank)


@functools.lru_cache(maxsize=4)
def each_expert(given: Problem) -> Tensor:
    """What every expert, alone and with weight 1, makes of every token: [E, M, H]."""
    x_MH, spec = given.tokens.hidden_states, given.spec
    ones_M1 = x_MH.new_ones(x_MH.shape[0], 1, dtype=torch.float64)
    alone = []
    for e in range(spec.routing.num_experts):
        choice = Choice(torch.full_like(ones_M1, e, dtype=torch.int64), ones_M1, given.stages.margin_M)
        alone.append(forward(spec, given.exact, x_MH, choice=choice).routed_MH)
    return torch.stack(alone)


@dataclass(frozen=True, slots=True)
class Story:
    """family: None where the sentence describes without naming a cause.    stage: as in a Finding."""

    family: str | None
    stage: str
    sentence: str


# How exactly a weight is recovered, as a share of the largest of its token.
_WEIGHT = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 6e-3}


# Of so many rows that fit, on the average, the nearest is a coincidence.
_ALIKE = 10.0


def routing_story(evidence: Evidence, recovered: Recovered) -> Story | None:
    """How the recovered weights differ from the law's, if it is simple enough for a sentence."""
    given = evidence.given
    held_M = evidence.held_RM.any(0) if evidence.ranks_agree else evidence.held_RM[recovered.rank]
    rows, stages = (evidence.decided_M & held_M).nonzero()[:, 0], given.stages
    law_ME = torch.zeros_like(recovered.weights_ME).scatter(1, stages.topk_ids_MK, stages.topk_weights_MK)
    found_ME = recovered.weights_ME[rows]
    near_M1 = _WEIGHT[given.dtype] * torch.maximum(law_ME[rows], found_ME.abs()).amax(-1, keepdim=True).clamp(min=1e-30)
    moved = describe_moves(_sources(found_ME, law_ME, 2 * near_M1[:, 0], rows, alike=False), "is routed as", rows)
    if moved is not None:
        return Story("H2", "topk_ids", f"tokens are routed as other tokens: {moved}")
    if bool(((law_ME[rows] - found_ME).abs() <= near_M1).all()):
        return None  # the weights are right where they can be told
    misplaced = placement_story(law_ME[rows], found_ME, near_M1, evidence.layout)
    if misplaced is not None:
        return Story(misplaced[0], "routed", misplaced[1])
    for story in (_permuted, _renamed, _mapped, _rescaled):
        told = story(law_ME[rows], found_ME, near_M1)
        if told is not None:
            return told
    told = _lost(law_ME[rows], found_ME, near_M1, stages.topk_ids_MK[rows], evidence.layout)
    if told is not None:
        return told
    ordered_MK = recovered.weights_ME.gather(1, stages.topk_ids_MK)
    none_else = ((found_ME.abs() > near_M1).sum(-1) <= stages.topk_ids_MK.shape[1]).all()
    moved = describe_moves(
        _sources(ordered_MK[rows], stages.topk_weights_MK, 2 * near_M1[:, 0], rows, alike=False), "takes those of", rows
    )
    if moved is not None and bool(none_else):
        return Story("H2", "topk_weights", f"tokens have their own experts with the weights of other tokens: {moved}")
    return None


def _permuted(law_ME: Tensor, found_ME: Tensor, near_M1: Tensor) -> Story | None:
    """The right experts and the right weights, paired wrongly."""
    same_experts = ((law_ME.abs() > near_M1) == (found_ME.abs() > near_M1)).all()
    same_weights = ((law_ME.sort(-1).values - found_ME.sort(-1).values).abs() <= near_M1).all()
    if not bool(same_experts & same_weights):
        return None
    return Story(
        "D15",
        "topk_weights",
        "each token has the right experts and the right weights, but paired wrongly: weights and ids are not in the same order",
    )


def _renamed(law_ME: Tensor, found_ME: Tensor, near_M1: Tensor) -> Story | None:
    """Expert e of the law is another one throughout: its number or its weights are those of another."""
    law_order, found_order = law_ME.argsort(-1, descending=True), found_ME.argsort(-1, descending=True)
    law_sorted, found_sorted = law_ME.gather(1, law_order), found_ME.gather(1, found_order)
    if len(law_ME) < 2 or not bool(((law_sorted - found_sorted).abs() <= near_M1).all()):
        return None
    used = law_sorted > near_M1
    apart = law_sorted.new_ones(used.shape, dtype=torch.bool)
    gap = (law_sorted[:, :-1] - law_sorted[:, 1:]) > 2 * near_M1
    apart[:, :-1] &= gap
    apart[:, 1:] &= gap
    seen: dict[int, set[int]] = {}
    for e, f in zip(law_order[used & apart].tolist(), found_order[used & apart].tolist(), strict=True):
        seen.setdefault(e, set()).add(f)
    if not seen or any(len(others) > 1 for others in seen.values()):
        return None
    renamed = {e: next(iter(others)) for e, others in sorted(seen.items())}
    wrong = {e: f for e, f in renamed.items() if e != f}
    if not wrong:
        return None
    count = law_ME.shape[1]
    shifts = {(f - e) % count for e, f in renamed.items()}
    if len(shifts) == 1:
        shift = shifts.pop()
        told = f"every expert's number is off by {shift if shift <= count // 2 else shift - count:+d}"
    elif all(f == count - 1 - e for e, f in renamed.items()):
        told = "the experts are numbered backwards"
    elif len(wrong) > 4:
        return None
    else:
        told = ", ".join(f"expert {f} computes for expert {e}" for e, f in wrong.items())
    return Story("F7", "topk_ids", f"the right weights go to wrong experts: {told}")


def _mapped(law_ME: Tensor, found_ME: Tensor, near_M1: Tensor) -> Story | None:
    """Every expert's tokens go to one other, several perhaps to the same: any map of ids."""
    count = law_ME.shape[1]
    visited_ME, map_E = law_ME > near_M1, torch.arange(count)
    for e in range(count):
        rows = visited_ME[:, e]
        able = (found_ME[rows] >= law_ME[rows, e, None] - near_M1[rows]).all(0)
        if bool(rows.any()) and not bool(able[e]):
            if not bool(able.any()):
                return None
            more_E = (found_ME[rows] - law_ME[rows, e, None]).sum(0)  # of others that it computes for
            map_E[e] = int(more_E.masked_fill(~able, torch.inf).argmin())
    moved = (map_E != torch.arange(count)).nonzero()[:, 0].tolist()
    whole_ME = torch.zeros_like(law_ME).index_add(1, map_E, law_ME)
    if not moved or int(visited_ME[:, moved].sum()) < max(3, 2 * len(moved)):
        return None
    if not bool(((whole_ME - found_ME).abs() <= near_M1).all()):
        return None
    told = ", ".join(f"expert {int(map_E[e])} computes for expert {e}" for e in moved[:4])
    more = f", and {len(moved) - 4} more" if len(moved) > 4 else ""
    return Story("F7", "topk_ids", f"the right weights go to wrong experts: {told}{more}")


def _lost(law_ME: Tensor, found_ME: Tensor, near_M1: Tensor, ids_MK: Tensor, layout: Layout) -> Story | None:
    """Some of the (token, expert) pairs do not count, the others are right; or one expert counts beside the right ones."""
    visited, counted = law_ME > near_M1, found_ME.abs() > near_M1
    right = (law_ME - found_ME).abs() <= near_M1
    if bool((right | ~visited).all()):
        extra = (counted & ~visited).any(0).nonzero()[:, 0].tolist()
        if len(extra) > 1 or not extra:
            return None
        weights = found_ME[:, extra[0]][(counted & ~visited)[:, extra[0]]]
        return Story(
            "F7", "topk_ids",
            f"expert {extra[0]} counts for {len(weights)} tokens that were not routed to it, with weights {span_text(weights)}",
        )  # fmt: skip
    lost = visited & ~counted
    if not bool(lost.any()) or bool((counted & ~visited).any()) or not bool((right | lost).all()):
        return None
    for slot, which in ((-1, "last"), (0, "first")):
        one = torch.zeros_like(visited).scatter(1, ids_MK[:, slot, None], True)
        if ids_MK.shape[1] > 1 and bool((lost == (one & visited)).all()):
            told = f"the {which} expert that each token chose does not count; the others have their lawful weights"
            return Story("D13", "topk_weights", told)
    nth = visited.cumsum(0)  # the how manieth token of an expert this is
    limit = int(nth[visited & ~lost].max()) if bool((visited & ~lost).any()) else 0
    pairs = f"{int(lost.sum())} of {int(visited.sum())} token-expert pairs do not count, the others are right"
    if limit and bool((lost == (visited & (nth > limit))).all()):
        return Story(
            "G9", "routed", f"{pairs}: no expert serves more than its first {limit} token{'s' if limit > 1 else ''}"
        )
    experts = lost.any(0).nonzero()[:, 0]
    whole = bool((lost[:, experts] == visited[:, experts]).all())
    many = len(experts) > 1
    which = f"expert{'s' if many else ''} {numbers_text(experts.tolist())}"
    used = [e for e in range(visited.shape[1]) if bool(visited[:, e].any())]
    owners = layout.owners_of(experts.tolist(), used)
    which += f" ({owners})" if whole and owners else ""
    told = f"{which} never count{'' if many else 's'}" if whole else f"{which} lose{'' if many else 's'} tokens"
    return Story("F7" if whole else "G9", "routed", f"{pairs}: {told}")


def _rescaled(law_ME: Tensor, found_ME: Tensor, near_M1: Tensor) -> Story | None:
    """The right experts in the right proportions, with another sum."""
    factor_M1 = (law_ME * found_ME).sum(-1, keepdim=True) / law_ME.square().sum(-1, keepdim=True)
    if not bool(((factor_M1 * law_ME - found_ME).abs() <= near_M1).all()) or not bool(
        (law_ME > near_M1).sum(-1).gt(1).all()
    ):
        return None
    lawful, found = law_ME.sum(-1), found_ME.sum(-1)
    return Story(
        None, "topk_weights",
        f"each token has the right experts in the right proportions, but their weights sum to {span_text(found)} "
        f"instead of {span_text(lawful)}: another normalisation",
    )  # fmt: skip


def span_text(values: Tensor) -> str:
    """'0.25' or '0.5 to 0.75'."""
    least, most = f"{float(values.min()):.3g}", f"{float(values.max()):.3g}"
    return least if least == most else f"{least} to {most}"


def rows_story(evidence: Evidence) -> Story | None:
    """Rows or columns that are right in another place, in the whole output or in R or S alone; all ranks alike."""
    given = evidence.given
    stages, spec = given.stages, given.spec
    rows = (evidence.decided_M & evidence.held_RM.any(0)).nonzero()[:, 0]
    if len(rows) < 2 or not evidence.ranks_agree:
        return None
    naive_M = evidence.naive_M
    limit_M = RESIDUAL_LIMIT / 2 * (naive_M + naive_M.mean())
    output_MH = evidence.assembled_MH
    alone = (
        ("the output", stages.output_MH),
        ("R", spec.output.share * spec.scale * stages.routed_MH),
        ("S", spec.output.share * stages.shared_MH),
    )
    for name, part_MH in alone:
        if not bool(part_MH.any()):
            continue
        source_M = _sources((output_MH - (stages.output_MH - part_MH))[rows], part_MH, limit_M[rows], rows)
        moved = describe_moves(source_M, "gets the row of", rows)
        if moved is not None and source_M is not None:
            ranks = _exchanged(rows, source_M, evidence)
            family = "H2" if ranks is None else "B12"
            if ranks is not None and name == "S":
                told = f"the shared experts read the dispatched batch, not the rank's own tokens: {moved} in S"
                return Story("C2", "shared", told)
            return Story(family, "output", f"rows of {name} stand at the wrong tokens{ranks or ''}: {moved}")
    of_parts = (_columns_moved(evidence, rows, limit_M, name, part_MH) for name, part_MH in alone[1:])
    return (
        _columns_story(evidence, rows, limit_M)
        or _unsummed_story(evidence, rows, limit_M)
        or next((story for story in of_parts if story is not None), None)
    )


def _exchanged(rows: Tensor, source_M: Tensor, evidence: Evidence) -> str | None:
    """', those of another dp rank' if every row that moved came from one: gather and scatter do not mirror each other."""
    if evidence.layout.grid.dp == 1 and evidence.layout.grid.sp == 1:
        return None
    rank_of = evidence.held_RM.int().argmax(0)
    moved = source_M != rows
    if not bool((rank_of[rows[moved]] != rank_of[source_M[moved]]).all()):
        return None
    other = "dp" if evidence.layout.grid.sp == 1 else "tp"
    return f", those of another {other} rank, so gather and scatter do not mirror each other"


def _columns_story(evidence: Evidence, rows: Tensor, limit_M: Tensor) -> Story | None:
    """Columns of the output that are another column of the law's, 0 or twice it."""
    law_HM = evidence.given.stages.output_MH[rows].T
    found_HM = evidence.assembled_MH[rows].T
    limit_H = (limit_M[rows].norm() / len(law_HM) ** 0.5).expand(len(law_HM))
    if len(rows) < 4:
        return None  # too few numbers in a column to recognise it by
    moved = _columns_moved(evidence, rows, limit_M, "the output", evidence.given.stages.output_MH)
    if moved is not None:
        return moved
    wrong_H = (found_HM - law_HM).norm(dim=-1) > limit_H
    for factor, told in ((0.0, "are 0"), (2.0, "count twice")):
        off = (found_HM - factor * law_HM)[wrong_H].norm(dim=-1)
        if bool(wrong_H.any()) and not bool(wrong_H.all()) and bool((off <= max(1.0, factor) * limit_H[wrong_H]).all()):
            columns = numbers_text(wrong_H.nonzero()[:, 0].tolist())
            return Story("H4", "output", f"columns {columns} of {len(law_HM)} {told}, the others are right")
    return None


def _columns_moved(evidence: Evidence, rows: Tensor, limit_M: Tensor, name: str, part_MH: Tensor) -> Story | None:
    """Columns of the output, or of R or S in it, that are another column of the law's."""
    rest_MH = evidence.given.stages.output_MH - part_MH
    law_HM, found_HM = part_MH[rows].T, (evidence.assembled_MH - rest_MH)[rows].T
    if len(rows) < 4 or not bool(part_MH.any()):
        return None
    limit_H = (limit_M[rows].norm() / len(law_HM) ** 0.5).expand(len(law_HM))
    columns = torch.arange(len(law_HM))
    moved = describe_moves(_sources(found_HM, law_HM, limit_H, columns), "is", columns, "column")
    of = "" if name == "the output" else f" of {name}"
    return None if moved is None else Story("H4", "output", f"columns{of} stand in the wrong places: {moved}")


def _unsummed_story(evidence: Evidence, rows: Tensor, limit_M: Tensor) -> Story | None:
    """Blocks of rows, or of columns, each of which is one rank's partial sum: gathered where they were to be summed."""
    given, layout = evidence.given, evidence.layout
    held, grid = rank_shares(given, layout), layout.grid
    if not any(part.shard for part in held) or any(part.shard is None and part.scaled for part in held):
        return None
    partial_RMH = torch.zeros(grid.tp, *evidence.outputs[0].shape, dtype=torch.float64)
    for part in held:
        value_MH = given.spec.output.share * (given.spec.scale if part.scaled else 1.0) * part.value_MH
        if part.shard is not None:
            partial_RMH[part.shard % grid.tp] += value_MH  # a sum over dp, if there is one, has taken place
        elif part.name == "shared bias":
            partial_RMH[0] += value_MH  # only the first rank keeps it
        else:
            partial_RMH += value_MH  # comes after the sum
    miss_RMH = (evidence.assembled_MH - partial_RMH)[:, rows]
    by_row = miss_RMH.norm(dim=-1) <= limit_M[rows]
    by_column = miss_RMH.norm(dim=1) <= limit_M[rows].norm() / miss_RMH.shape[-1] ** 0.5
    home_m = (evidence.held_RM.int().argmax(0)[rows] // grid.tp).tolist()
    for what, fits, homes in (("rows", by_row, home_m), ("columns", by_column, [0] * by_column.shape[1])):
        if _in_blocks(fits.T.tolist(), homes):
            told = f"the {what} are cut into blocks, each of them one rank's partial sum: gathered, not summed"
            return Story("B7", "output", told)
    return None


def rows_by_set(evidence: Evidence) -> dict[tuple[int, ...], Tensor]:
    """The ranks that have the same tokens, and those tokens, for ranks that have any."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank, held_M in enumerate(evidence.held_RM):
        rows = tuple(held_M.nonzero()[:, 0].tolist())
        if rows:
            found.setdefault(rows, []).append(rank)
    return {tuple(ranks): torch.tensor(rows) for rows, ranks in found.items()}


def _in_blocks(fits: list[list[bool]], homes: list[int]) -> bool:
    """Whether ranks can be given to rows so that they never go down within one home.    fits: by row and rank.

    Two ranks or more have a row that is theirs alone: some tokens need one rank, and rows of zeros are anybody's.
    """
    alone: set[int] = set()
    last: dict[int, int] = {}
    for row, home in zip(fits, homes, strict=True):
        able = [rank for rank, fit in enumerate(row) if fit and rank >= last.get(home, 0)]
        if not able:
            return False
        last[home] = able[0]
        if sum(row) == 1:
            alone.add(row.index(True))
    return len(alone) > 1


def numbers_text(numbers: Sequence[int]) -> str:
    """'3', '0, 2, 5' or '16 to 32'; every other one, and the first few of many."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) > 2 and last - first == len(numbers) - 1:
        return f"{first} to {last}"
    if len(numbers) > 3 and all(b - a == 2 for a, b in itertools.pairwise(numbers)):
        return f"every other one, {first} to {last}"
    shown = ", ".join(map(str, numbers[:6]))
    return shown if len(numbers) <= 6 else f"{shown}, ..."


def _sources(found: Tensor, law: Tensor, limit_M: Tensor, rows: Tensor, *, alike: bool = True) -> Tensor | None:
    """Which row of law each row of found is, its own if that fits; None if some row is none of them, or many are alike.

    rows: where each row of found stands.    alike: whether the nearest counts where several rows fit that one has moved to.
    """
    distance = torch.cdist(found, law, compute_mode="donot_use_mm_for_euclid_dist")
    fits = distance <= limit_M[:, None]
    if not bool(fits.any(-1).all()) or float(fits.sum(-1).double().mean()) > _ALIKE:
        return None
    own = fits.gather(1, rows[:, None])[:, 0]
    source = torch.where(own, rows, distance.argmin(-1))
    count = len(law)
    shifts = [s for s in range(1, count) if bool(fits.gather(1, ((rows + s) % count)[:, None]).all())]
    if len(shifts) == 1:
        return (rows + shifts[0]) % count
    return source if alike or not bool((fits.sum(-1)[~own] > 1).any()) else None


def describe_moves(source_M: Tensor | None, verb: str, rows: Tensor, noun: str = "token") -> str | None:
    """'each token gets the row of the one before it', or the first moves one by one; None if nothing moved.

    source_M: where each of the rows comes from.
    """
    if source_M is None or len(rows) < 2:
        return None
    tokens, sources = rows.tolist(), source_M.tolist()
    count = max(*tokens, *sources) + 1
    moves = [(m, other) for m, other in zip(tokens, sources, strict=True) if m != other]
    if not moves:
        return None
    shifts = {(other - m) % count for m, other in zip(tokens, sources, strict=True)}
    if len(set(sources)) == 1:
        return f"every {noun} {verb} {noun} {sources[0]}"
    if len(shifts) == 1:
        shift = shifts.pop()
        step, side = (count - shift, "before") if 2 * shift >= count else (shift, "after")
        return f"each {noun} {verb} the one {f'{step} places ' if step > 1 else ''}{side} it, around the end"
    if all(other == count - 1 - m for m, other in moves):
        return f"the order is reversed, {noun} 0 {verb} {noun} {count - 1}"
    told = ", ".join(f"{noun} {m} {verb} {noun} {other}" for m, other in moves[:3])
    return told if len(moves) <= 3 else f"{told}, and {len(moves) - 3} more"


def suspects(topk_ids_MK: Tensor, wrong_M: Tensor) -> list[int]:
    """One or two experts that all wrong tokens visit and no right one does; empty if there are none or more."""
    visits_ME = torch.zeros(len(wrong_M), int(topk_ids_MK.max()) + 1, dtype=torch.bool).scatter(1, topk_ids_MK, True)
    only_E = visits_ME[wrong_M].any(0) & ~visits_ME[~wrong_M].any(0)
    if not bool((~wrong_M).any()) or not bool(visits_ME[wrong_M][:, only_E].any(-1).all()):
        return []
    experts = only_E.nonzero()[:, 0].tolist()
    return experts if len(experts) <= 2 else []
