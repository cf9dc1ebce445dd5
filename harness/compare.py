"""Is an output within rounding of the law? The row rule; for near ties the list of legal routes; for many rows a projection.

A row is wrong if its error exceeds RUN_LIMIT times that of the worse naive run *and* DEVIATION_LIMIT times the standard
deviation that the error analysis expects. Rows past the first limit whose choice of experts was a near tie are compared
with every legal choice instead. Where a row has no yardstick (yardstick.py), a row beyond the limits is undecided. Where
all rows of a large half-precision case are right, projection.py looks for what only many of them show. All limits are
measured: docs/tolerance.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.problem import Problem, Ways
from harness.projection import DTYPES, FROM_TOKENS, LIMIT, Projected, project
from harness.route_certificates import Certificate, certificate
from harness.yardstick import yardstick
from reference.naive import naive
from reference.rounding import RoundingErrors, analyse, router_error
from reference.routes import undecided_rows
from reference.spec import RouterPrecision

RUN_LIMIT = 2.5
DEVIATION_LIMIT = 1.5
_ROUTES_TOLD = 4


@dataclass(frozen=True, slots=True)
class Worst:
    """Absolute figures of the row and of the element that are furthest off, among those that were analysed.

    error, allowed: L2 of the row and its limit.    element, bound: of one element, and its certified bound.
    """

    error: float
    allowed: float
    element: float
    bound: float


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """wrong_RM, undecided_RM: bool [ranks, M].    ratio: the largest row error in units of the worse naive run.

    deviations, bound: the same in units of the expected deviation and of the certified bound; None while no row passed
    the first limit, since they are dear.    worst: in units of y.    certain: a wrong row is beyond the certified bound,
    which proves that no rounding made it.
    certificates: of the rows beyond the limits that are near ties.
    why: for what reasons rows are undecided, in words.
    tolerance: the smallest rtol = atol with which torch.testing.assert_close would let the output pass; naive_tolerance:
    the same of a clean naive run, for a wrong output.
    projected: what many rows together say; None where nobody asked, since a row is wrong, in fp32 and for few tokens.
    """

    wrong_RM: Tensor
    undecided_RM: Tensor
    ratio: float
    deviations: float | None = None
    bound: float | None = None
    worst: Worst | None = None
    certain: bool = False
    certificates: tuple[Certificate, ...] = ()
    tolerance: float = 0.0
    naive_tolerance: float | None = None
    projected: Projected | None = None
    why: str = ""

    @property
    def wrong(self) -> bool:
        """Whether a row is wrong; a projection may accuse where none is."""
        return bool(self.wrong_RM.any())

    @property
    def undecided(self) -> bool:
        return bool(self.undecided_RM.any())

    @property
    def ties(self) -> int:
        """Rows that were right on another legal choice of experts."""
        return sum(each.holds is True for each in self.certificates)

    @property
    def projection(self) -> Projected | None:
        """Parts that count too often or too seldom, seen over many rows; None if there are none."""
        return self.projected if self.projected is not None and self.projected.found else None

    def figures(self) -> dict[str, object]:
        told: dict[str, object] = {"row_error_over_naive": _short(self.ratio), "limit": RUN_LIMIT}
        if self.deviations is not None and self.bound is not None:
            told |= {"row_error_over_deviation": _short(self.deviations), "deviation_limit": DEVIATION_LIMIT}
            told["error_over_certified_bound"] = _short(self.bound)
            told |= {"wrong_rows": int(self.wrong_RM.any(0).sum()), "rows": self.wrong_RM.shape[1]}
        if self.wrong and self.worst is not None:
            told |= {"certain": self.certain, "row_error": _short(self.worst.error)}
            told |= {"row_error_allowed": _short(self.worst.allowed), "element_error": _short(self.worst.element)}
            told["certified_bound"] = _short(self.worst.bound)
        told["tolerance_needed"] = _short(self.tolerance)
        if self.naive_tolerance is not None:
            told["tolerance_of_naive_run"] = _short(self.naive_tolerance)
        if self.projected is not None:
            told |= {"projection": _short(self.projected.largest), "projection_limit": LIMIT}
            told |= {f"factor of {each.name}": _short(each.factor) for each in self.projected.found}
        if self.ties:
            told["rows_on_another_legal_route"] = self.ties
        unsettled = [each for each in self.certificates if each.holds is not True]
        if unsettled:
            told["routes"] = [each.as_dict() for each in unsettled[:_ROUTES_TOLD]]
        return told


def compare(given: Problem, outputs: Sequence[Tensor], ways: Ways, precision: RouterPrecision) -> Comparison:
    """Compare what each rank returned with y.

    outputs: one [M, H] for each rank, float64, in units of y; the law's own rows where a rank has none.
    """
    found_RMH = torch.stack(list(outputs))
    error_RMH = found_RMH - given.stages.output_MH
    error_RM = error_RMH.norm(dim=-1)
    unit = yardstick(given, ways, precision)
    naive_M = unit.naive_M
    beyond_RM = ~(error_RM <= RUN_LIMIT * naive_M)  # the negation also catches NaN, of the output and of the yardstick
    undecided_RM = torch.zeros_like(beyond_RM)
    if not beyond_RM.any():
        ratio, tolerance = _largest(error_RM, naive_M), tolerance_needed(error_RMH, given.stages.output_MH)
        projected = project_outputs(given, outputs, ways, precision)
        return Comparison(beyond_RM, undecided_RM, ratio, tolerance=tolerance, projected=projected)
    tie_M = beyond_RM.any(0) & near_ties(given, precision)
    rows = _to_analyse(given, error_RM, naive_M, beyond_RM, tie_M)
    x_MH, is_vision = given.tokens.hidden_states, given.tokens.is_vision
    rounding = analyse(
        given.spec, given.exact, x_MH, given.stages, ways.routed, precision, is_vision, rows, shared_tp=ways.shared
    )  # fmt: skip
    deviation_M = torch.zeros_like(naive_M).index_copy(0, rows, rounding.deviation_M)
    wrong_RM = beyond_RM & ~(error_RM <= DEVIATION_LIMIT * deviation_M)
    allowed_M = torch.fmax(RUN_LIMIT * naive_M, DEVIATION_LIMIT * deviation_M)
    certificates = []
    for row in (wrong_RM.any(0) & tie_M).nonzero()[:, 0].tolist():
        allowed = float(allowed_M[row])
        seen = certificate(given, row, found_RMH[:, row], allowed, DEVIATION_LIMIT, ways, precision)
        certificates.append(seen)
        if seen.holds is None:
            undecided_RM[:, row], wrong_RM[:, row] = wrong_RM[:, row], False
        elif seen.holds:
            wrong_RM[:, row] = False
    ties = int(undecided_RM.any(0).sum())
    told = [f"{ties} near ties with too many legal routes to list"] if ties else []
    blind_RM = wrong_RM & unit.cannot_judge(found_RMH)
    undecided_RM, wrong_RM = undecided_RM | blind_RM, wrong_RM & ~blind_RM
    why = "; ".join([*told, *unit.reasons(blind_RM)])
    error_RMH, error_RM = error_RMH.masked_fill(blind_RM[..., None], 0.0), error_RM.masked_fill(blind_RM, 0.0)
    wrong = bool(wrong_RM.any())
    return Comparison(
        wrong_RM,
        undecided_RM,
        _largest(error_RM, naive_M.nan_to_num(nan=torch.inf)),
        _largest(error_RM[:, rows], deviation_M[rows]),
        float((error_RMH[:, rows].abs() / rounding.bound_MH).amax()),
        _worst(error_RMH[:, rows], rounding, allowed_M[rows]),
        _is_certain(given, error_RMH[:, rows], rounding, (wrong_RM & ~tie_M)[:, rows]),
        tuple(certificates),
        tolerance_needed(error_RMH, given.stages.output_MH),
        _naive_tolerance(given, ways, precision) if wrong else None,
        None if wrong else project_outputs(given, outputs, ways, precision),
        why,
    )


def tolerance_needed(error_RMH: Tensor, law_MH: Tensor) -> float:
    """The smallest rtol = atol with which torch.testing.assert_close lets such an error pass; inf for NaN."""
    if error_RMH.numel() == 0:
        return 0.0
    return float(torch.nan_to_num(error_RMH.abs() / (1 + law_MH.abs()), nan=torch.inf).amax())


@functools.lru_cache(maxsize=64)
def _naive_tolerance(given: Problem, ways: Ways, precision: RouterPrecision) -> float:
    x_MH, stages, is_vision = given.tokens.hidden_states, given.stages, given.tokens.is_vision
    runs = naive(given.spec, given.weights, x_MH, stages, ways.routed, precision, is_vision, shared_tp=ways.shared)
    return tolerance_needed(torch.stack(runs).double() - stages.output_MH, stages.output_MH)


def _worst(error_RmH: Tensor, rounding: RoundingErrors, allowed_m: Tensor) -> Worst:
    error_Rm, bound_RmH = error_RmH.norm(dim=-1), rounding.bound_MH.expand_as(error_RmH)
    row = torch.nan_to_num(error_Rm / allowed_m, nan=torch.inf).argmax()
    element = torch.nan_to_num(error_RmH.abs() / bound_RmH, nan=torch.inf).argmax()
    return Worst(
        float(error_Rm.flatten()[row]),
        float(allowed_m.expand_as(error_Rm).flatten()[row]),
        float(error_RmH.abs().flatten()[element]),
        float(bound_RmH.flatten()[element]),
    )


def _is_certain(given: Problem, error_RmH: Tensor, rounding: RoundingErrors, wrong_Rm: Tensor) -> bool:
    """Whether a wrong row's error is beyond its bound. Overflow, which only fp16 is near to, no bound covers."""
    beyond_RmH = ~(error_RmH.abs() <= rounding.bound_MH)
    if given.dtype is torch.float16:
        beyond_RmH &= error_RmH.isfinite()
    return bool((beyond_RmH.any(-1) & wrong_Rm).any())


def project_outputs(
    given: Problem, outputs: Sequence[Tensor], ways: Ways, precision: RouterPrecision, *, for_a_name: bool = False
) -> Projected | None:
    """What many rows together say of outputs as `compare` takes them: each token's worst rank, near ties left out.

    None in fp32 and for few tokens. `compare` asks only where no row is wrong; a diagnosis asks elsewhere, for_a_name.
    """
    if not for_a_name and (given.dtype not in DTYPES or len(outputs[0]) < FROM_TOKENS):
        return None
    error_RMH = torch.stack(list(outputs)) - given.stages.output_MH
    worst_M = error_RMH.norm(dim=-1).argmax(0)
    error_MH = error_RMH[worst_M, torch.arange(len(worst_M))]
    return project(given, error_MH, ~near_ties(given, precision), ways, precision, for_a_name=for_a_name)


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


def _largest(error_RM: Tensor, unit_M: Tensor) -> float:
    """The largest ratio, where an error of exactly 0 counts as 0 whatever the unit."""
    if error_RM.numel() == 0:
        return 0.0
    return float(torch.where(error_RM == 0, 0.0, error_RM / unit_M).amax())


def _short(value: float) -> float:
    return float(f"{value:.4g}")
