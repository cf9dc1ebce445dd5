"""Is an output within rounding of the law? The row rule, and for near ties the list of legal routes.

A row is wrong if its error exceeds RUN_LIMIT times that of the worse naive run *and* DEVIATION_LIMIT times the standard
deviation that the error analysis expects. Rows past the first limit whose choice of experts was a near tie are compared
with every legal choice instead. Both limits are measured: docs/tolerance.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.problem import Problem, Ways
from reference.moe import Choice, forward
from reference.rounding import analyse, router_error
from reference.routes import legal_routes, undecided_rows
from reference.spec import RouterPrecision

RUN_LIMIT = 2.5
DEVIATION_LIMIT = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """wrong_RM, undecided_RM: bool [ranks, M].    ratio: the largest row error in units of the worse naive run.

    deviations, bound: the same in units of the expected deviation and of the certified bound; None while no row passed
    the first limit, since they are dear.    ties: rows that were right on another legal choice of experts.
    """

    wrong_RM: Tensor
    undecided_RM: Tensor
    ratio: float
    deviations: float | None
    bound: float | None
    ties: int

    @property
    def wrong(self) -> bool:
        return bool(self.wrong_RM.any())

    @property
    def undecided(self) -> bool:
        return bool(self.undecided_RM.any())

    def figures(self) -> dict[str, object]:
        told: dict[str, object] = {"row_error_over_naive": _short(self.ratio), "limit": RUN_LIMIT}
        if self.deviations is not None and self.bound is not None:
            told |= {"row_error_over_deviation": _short(self.deviations), "deviation_limit": DEVIATION_LIMIT}
            told["error_over_certified_bound"] = _short(self.bound)
            told |= {"wrong_rows": int(self.wrong_RM.any(0).sum()), "rows": self.wrong_RM.shape[1]}
        if self.ties:
            told["rows_on_another_legal_route"] = self.ties
        return told


def compare(given: Problem, outputs: Sequence[Tensor], ways: Ways, precision: RouterPrecision) -> Comparison:
    """Compare what each rank returned with y.

    outputs: one [M, H] for each rank, float64, in units of y; the law's own rows where a rank has none.
    """
    found_RMH = torch.stack(list(outputs))
    error_RM = (found_RMH - given.stages.output_MH).norm(dim=-1)
    naive_M = given.naive_error(ways, precision)
    beyond_RM = ~(error_RM <= RUN_LIMIT * naive_M)  # the negation also catches NaN
    undecided_RM = torch.zeros_like(beyond_RM)
    if not beyond_RM.any():
        return Comparison(beyond_RM, undecided_RM, _largest(error_RM, naive_M), None, None, 0)
    tie_M = beyond_RM.any(0) & near_ties(given, precision)
    rows = _to_analyse(given, error_RM, naive_M, beyond_RM, tie_M)
    x_MH, is_vision = given.tokens.hidden_states, given.tokens.is_vision
    rounding = analyse(
        given.spec, given.exact, x_MH, given.stages, ways.routed, precision, is_vision, rows, shared_tp=ways.shared,
        packed=given.is_quantised,
    )  # fmt: skip
    deviation_M = torch.zeros_like(naive_M).index_copy(0, rows, rounding.deviation_M)
    wrong_RM = beyond_RM & ~(error_RM <= DEVIATION_LIMIT * deviation_M)
    miss = (found_RMH[:, rows] - given.stages.output_MH[rows]).abs() / rounding.bound_MH
    ties = 0
    for row in (wrong_RM.any(0) & tie_M).nonzero()[:, 0].tolist():
        allowed = max(RUN_LIMIT * float(naive_M[row]), DEVIATION_LIMIT * float(deviation_M[row]))
        right = _on_a_legal_route(given, row, found_RMH[:, row], allowed, ways, precision)
        if right is None:
            undecided_RM[:, row], wrong_RM[:, row] = wrong_RM[:, row], False
        elif right:
            wrong_RM[:, row], ties = False, ties + 1
    return Comparison(
        wrong_RM,
        undecided_RM,
        _largest(error_RM, naive_M),
        _largest(error_RM[:, rows], deviation_M[rows]),
        float(miss.amax()),
        ties,
    )


# An error beyond this many roundings of all addends together, times the root of the longest sum, is no rounding error:
# over all twins, dtypes and sizes the largest deviation is 2.4 of them in fp32 and 0.5 in bf16 and fp16
# (docs/tolerance.md). Such a row needs no error analysis, which takes milliseconds.
_HOPELESS = 12.0


def _to_analyse(given: Problem, error_RM: Tensor, naive_M: Tensor, beyond_RM: Tensor, tie_M: Tensor) -> Tensor:
    """The rows past the first limit that the second may acquit, near ties, and the worst row, for its figures."""
    stages, u = given.stages, torch.finfo(given.dtype).eps / 2
    addends_M = given.spec.scale * (stages.routed_MH + stages.zero_MH).norm(dim=-1) + stages.shared_MH.norm(dim=-1)
    longest = max(given.spec.hidden_size, *given.spec.tp_widths().values())
    hopeless_RM = error_RM > _HOPELESS * longest**0.5 * u * (addends_M + stages.offset_H.norm())
    hopeless_RM &= error_RM > 10 * RUN_LIMIT * naive_M
    chosen_M = (beyond_RM & ~hopeless_RM).any(0) | tie_M
    chosen_M[torch.nan_to_num(error_RM, nan=torch.inf).amax(0).argmax()] = True
    return chosen_M.nonzero()[:, 0]


@functools.lru_cache(maxsize=64)
def near_ties(given: Problem, precision: RouterPrecision) -> Tensor:
    """Bool [M]: tokens whose choice of experts rounding may change."""
    spec, tokens, logits_ME = given.spec, given.tokens, given.stages.logits_ME
    delta_ME = router_error(spec, given.exact, tokens.hidden_states, precision, tokens.is_vision)
    text_M = undecided_rows(spec.routing, logits_ME, given.exact.get("e_score_correction_bias"), delta_ME)
    if spec.vision is None or tokens.is_vision is None:
        return text_M
    bias_E = given.exact.get("vision_e_score_correction_bias")
    return torch.where(tokens.is_vision, undecided_rows(spec.vision.routing, logits_ME, bias_E, delta_ME), text_M)


def _on_a_legal_route(
    given: Problem, row: int, found_RH: Tensor, allowed: float, ways: Ways, precision: RouterPrecision
) -> bool | None:
    """Whether what each rank has for that token is right on one of its legal routes; None if they are too many to list.

    allowed: the error that the row may have on the oracle's own route. Another one may weigh its experts more, as where
    a sparsemixer's mask changes, and then has a larger deviation.
    """
    spec, weights = given.spec, given.exact
    x_1H, is_vision = given.tokens.hidden_states[row : row + 1], _rows(given.tokens.is_vision, slice(row, row + 1))
    routing, prefix = spec.routing, ""
    if spec.vision is not None and is_vision is not None and bool(is_vision[0]):
        routing, prefix = spec.vision.routing, "vision_"
    delta_E = router_error(spec, weights, x_1H, precision, is_vision)[0]
    bias_E, factor_E = (weights.get(prefix + name) for name in ("e_score_correction_bias", "per_expert_scale"))
    routes = legal_routes(routing, given.stages.logits_ME[row], bias_E, delta_E, factor_E)
    if routes is None:
        return None
    every = Choice(*(torch.cat(parts) for parts in zip(*map(_parts, routes), strict=True)))
    x_NH = x_1H.expand(len(routes), -1)  # N routes, as if they were as many tokens
    is_vision = None if is_vision is None else is_vision.expand(len(routes))
    stages = forward(spec, weights, x_NH, is_vision_M=is_vision, choice=every)
    error_R, route_R = (found_RH[:, None] - stages.output_MH).norm(dim=-1).min(1)
    if bool((error_R <= allowed).all()):
        return True
    if not bool((error_R <= 10 * allowed).all()):  # NaN, or no route can excuse it
        return False
    rounding = analyse(
        spec, weights, x_NH, stages, ways.routed, precision, is_vision, route_R, shared_tp=ways.shared,
        packed=given.is_quantised,
    )  # fmt: skip
    return bool((error_R <= (DEVIATION_LIMIT * rounding.deviation_M).clamp(min=allowed)).all())


def _parts(choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    return choice.topk_ids_MK, choice.topk_weights_MK, choice.margin_M


def _largest(error_RM: Tensor, unit_M: Tensor) -> float:
    """The largest ratio, where an error of exactly 0 counts as 0 whatever the unit."""
    if error_RM.numel() == 0:
        return 0.0
    return float(torch.where(error_RM == 0, 0.0, error_RM / unit_M).amax())


def _rows(tensor: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
