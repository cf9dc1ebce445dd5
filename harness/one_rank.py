"""A wrong rule that some ranks follow alone: the experts of one rank were loaded or computed otherwise than the others'.

Each wrong law of the routed experts is computed once for every rank's share of them; the output then tells in whose
shares it shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence
from harness.parts import piece_of, share_of
from harness.recover import Story, suspects
from harness.variants import variants
from reference.spec import SpecError


def one_rank_story(evidence: Evidence) -> Story | None:
    """The wrong law that explains the output in the shares of some ranks; None if none does, or if ranks disagree."""
    layout = evidence.layout
    rows = (evidence.decided_M & evidence.held_RM.any(0)).nonzero()[:, 0]
    if layout.grid.ranks == 1 or layout.owners is None or not evidence.ranks_agree or len(rows) == 0:
        return None
    return _in_shares(evidence, "routed", rows) or _in_shares(evidence, "shared", rows)


def _in_shares(evidence: Evidence, part: str, rows: Tensor) -> Story | None:
    given, layout = evidence.given, evidence.layout
    if layout.shares(part) == 1 or (part == "shared" and given.spec.shared is None):
        return None
    alone = [share_of(given, layout, part, share) for share in range(layout.shares(part))]
    laws = [{v.sentence: v for v in variants(each, None, 1) if v.stage == part and v.family != "P1"} for each in alone]
    target = (evidence.assembled_MH - given.stages.output_MH)[rows]
    limit = RESIDUAL_LIMIT * (evidence.naive_M + evidence.naive_M.mean())[rows]
    for sentence, variant in laws[0].items():
        try:
            deltas = [
                (of_share[sentence].compute().output_MH - each.stages.output_MH)[rows]
                for of_share, each in zip(laws, alone, strict=True)
            ]
        except (SpecError, KeyError):
            continue  # this layer, or a share of it, cannot get that rule wrong
        shares = _explaining(target, deltas, limit)
        if shares is not None:
            return Story(variant.family, part, f"{sentence}, on {layout.holders(part, shares)} alone")
    return None


def piece_story(evidence: Evidence) -> Story | None:
    """One rank's piece of one or two experts counts otherwise than it should; None if that is not all."""
    given, layout = evidence.given, evidence.layout
    grid, wrong_M = layout.grid, evidence.wrong_RM.any(0)
    if layout.owners is None or grid.moe_tp == 1 or given.spec.vision is not None or not evidence.ranks_agree:
        return None
    experts = suspects(given.stages.topk_ids_MK, wrong_M)
    rows = (evidence.decided_M & wrong_M).nonzero()[:, 0]
    if not experts or len(rows) == 0:
        return None
    holders = [layout.owners[e] * grid.moe_tp + piece for e in experts for piece in range(grid.moe_tp)]
    pieces = [piece_of(given, layout, e, piece) for e in experts for piece in range(grid.moe_tp)]
    target = (evidence.assembled_MH - given.stages.output_MH)[rows]
    matrix = torch.stack([value_MH[rows].flatten() for value_MH in pieces], 1)
    factors = torch.linalg.lstsq(matrix, target.flatten()[:, None], driver="gelsd").solution[:, 0]
    left = (target.flatten() - matrix @ factors).view_as(target).norm(dim=-1)
    limit = RESIDUAL_LIMIT * (evidence.naive_M + evidence.naive_M.mean())[rows]
    names = [e for e in experts for _ in range(grid.moe_tp)]
    off = [i for i, factor in enumerate(factors.tolist()) if abs(factor) > 0.02]
    if not bool((left <= limit).all()) or not off or len(off) == len(pieces):
        return None
    told = ", ".join(
        f"the piece of expert {names[i]} on {layout.where([holders[i]])} counts {_counted(float(factors[i]))}"
        for i in off
    )
    return Story("F8", "routed", f"{told} (expected 1), all others right: it was not loaded, or not as it is stored")


def _counted(excess: float) -> str:
    """'0' or '1.05': rounding makes a 0 of either sign."""
    return f"{round(1 + excess, 3) + 0.0:g}"


def _explaining(target_mH: Tensor, deltas: list[Tensor], limit_m: Tensor) -> list[int] | None:
    """The ranks whose deltas add up to the target; None if they do not, or if all of them are needed."""
    used = [rank for rank, delta in enumerate(deltas) if bool(delta.any())]
    if len(used) < 2:
        return None
    matrix = torch.stack([deltas[rank].flatten() for rank in used], 1)
    factors = torch.linalg.lstsq(matrix, target_mH.flatten()[:, None], driver="gelsd").solution[:, 0]
    counted = [rank for rank, factor in zip(used, factors.tolist(), strict=True) if abs(factor - 1) <= 0.05]
    others = [factor for factor in factors.tolist() if abs(factor - 1) > 0.05]
    if not counted or not others or any(abs(factor) > 0.05 for factor in others):
        return None
    left_mH = target_mH - torch.stack([deltas[rank] for rank in counted]).sum(0)
    return counted if bool((left_mH.norm(dim=-1) <= limit_m).all()) else None
