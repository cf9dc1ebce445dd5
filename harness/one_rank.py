"""A wrong rule that some ranks, or some experts, follow alone: they were loaded or computed otherwise than the others.

Each wrong law of the routed experts is computed once for every rank's share of them; the output then tells in whose
shares it shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.algebra import RESIDUAL_LIMIT, Evidence
from harness.parts import of_experts, piece_of, share_of
from harness.problem import Problem
from harness.recover import Story, suspects
from harness.variants import Variant, variants
from reference.moe import Choice, Stages, forward
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


def one_expert_story(evidence: Evidence) -> Story | None:
    """A wrong law that one or two experts follow alone, those that all wrong tokens visit and no right one does."""
    given, wrong_M = evidence.given, evidence.wrong_RM.any(0)
    rows = (evidence.decided_M & wrong_M).nonzero()[:, 0]
    able = suspects(given.stages.topk_ids_MK, wrong_M)
    if not able or len(rows) < 2 or given.spec.vision is not None or not evidence.ranks_agree:
        return None
    for experts in ([e] for e in able) if len(able) > 1 else ():
        told = _of_those_experts(evidence, experts, rows)
        if told is not None:
            return told
    return _of_those_experts(evidence, able, rows)


def _of_those_experts(evidence: Evidence, experts: list[int], rows: Tensor) -> Story | None:
    given = evidence.given
    alone = of_experts(given, experts)
    target_mH = (evidence.assembled_MH - given.stages.output_MH)[rows]
    limit_m = RESIDUAL_LIMIT * (evidence.naive_M + evidence.naive_M.mean())[rows]
    fits: dict[tuple[str, str], float] = {}
    # what takes the weights of other experts, which are 0 here, is asked below
    laws = [v for v in variants(alone, None, 1) if v.stage == "routed" and v.family not in ("F7", "G8", "P1")]
    for variant in (*laws, *_with_those_of_another(given, alone, experts)):
        try:
            change_mH = (variant.compute().output_MH - alone.stages.output_MH)[rows]
        except SpecError:
            continue  # this layer cannot get that rule wrong
        left_m = (target_mH - change_mH).norm(dim=-1)
        if bool((left_m <= limit_m).all()):
            fits[variant.family, variant.sentence] = float(left_m.square().sum())
    if not fits:
        return _products_counted(evidence, experts, target_mH, rows, limit_m)
    best = [key for key, left in fits.items() if left <= 4 * min(fits.values())]
    families, numbers = {family for family, _ in best}, " and ".join(map(str, experts))
    told = "; or ".join(sentence for _, sentence in best[:3])
    family = families.pop() if len(families) == 1 else None
    where = "" if told.startswith("expert ") else f", in expert{'s' if len(experts) > 1 else ''} {numbers} alone"
    return Story(family, "routed", f"{told}{where}")


def _products_counted(
    evidence: Evidence, experts: list[int], target_mH: Tensor, rows: Tensor, limit_m: Tensor
) -> Story | None:
    """Experts with a second bias, of which the product counts otherwise than once and the bias as it should."""
    if not evidence.given.spec.experts.bias:
        return None
    without = {"b2": torch.zeros_like(evidence.given.exact["b2"])}
    no_bias = replace(evidence.given, exact=evidence.given.exact | without)
    products = [of_experts(no_bias, [e]).stages.output_MH[rows] for e in experts]
    matrix = torch.stack([product.flatten() for product in products], 1)
    factors = torch.linalg.lstsq(matrix, target_mH.flatten()[:, None], driver="gelsd").solution[:, 0]
    left_m = (target_mH.flatten() - matrix @ factors).view_as(target_mH).norm(dim=-1)
    off = [(e, float(factor)) for e, factor in zip(experts, factors, strict=True) if abs(float(factor)) > 0.02]
    if not bool((left_m <= limit_m).all()) or not off:
        return None
    told = ", ".join(f"the w2 of expert {e} counts {_counted(factor)}" for e, factor in off)
    return Story("F7", "routed", f"{told} (expected 1), all others and the biases are right")


def _with_those_of_another(given: Problem, alone: Problem, experts: list[int]) -> Iterator[Variant]:
    """One expert with matrices of another."""
    if len(experts) > 1:
        return
    e, biases = experts[0], given.spec.experts.bias
    for names in (("w13",), ("w2",), ("w13", "w2")):
        moved = {*names, *(name.replace("w", "b") for name in names if biases)}
        for f in range(given.spec.routing.num_experts):
            if f != e:
                told = f"expert {e} has the {' and '.join(names)} of expert {f}"
                yield Variant("F7", "routed", told, partial(_moved, given, alone, moved, e, f))


def _moved(given: Problem, alone: Problem, names: set[str], e: int, f: int) -> Stages:
    weights = dict(alone.exact)
    for name in names & weights.keys():
        weights[name] = weights[name].clone()
        weights[name][e] = given.exact[name][f]
    stages = alone.stages
    choice = Choice(stages.topk_ids_MK, stages.topk_weights_MK, stages.margin_M)
    return forward(given.spec, weights, given.tokens.hidden_states, choice=choice)


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
