"""Where a wrong output first went wrong: the stages that the ranks hand out, each held to the law's, in the order of the pass.

A stage may be a number of every rank or a partial sum: what the ranks of a group hold is added up in float64, and what
then is the law's is right. A part, R or S, is judged as the output of a layer that has no other part.
M tokens, m of a rank, H hidden, E experts, K top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.case import Grid
from harness.compare import compare, near_ties
from harness.problem import Problem, ways
from reference import moe
from reference.spec import RouterPrecision, Routing

ORDER = (
    "logits", "scores", "topk_ids", "topk_weights", "routed", "shared", "routed_reduced", "shared_reduced", "sum",
    "reduction",
)  # fmt: skip
# Logits of layers from outside may be off by so many of the dtype's roundings of all addends together, ours by as many
# of the logit itself.
_LOGITS = 4.0
# Behind a norm each number of a token is stored three times: so many roundings of a random walk are 16 deviations.
_NORMED = 12.0
# Scores and weights may be off by this many roundings beside what the logits' error makes of them.
_WEIGHTS = 16.0
# A row that is off by so many errors of the naive run, and by such a share of its length, needs no error analysis.
_FAR = (50.0, 0.3)
_EVERY, _PARTS = "on every rank", "summed over ranks"


@dataclass(frozen=True, slots=True, eq=False)
class Handed:
    """What one rank's layer tells of the judged call.

    tensors: by the names of ORDER.    factors: how often each counts the law's, for the names where the layer says it.
    unit: of the output.    rows: the rank's tokens.    own: those of them that it takes through the layer itself.
    """

    tensors: Mapping[str, Tensor]
    factors: Mapping[str, float]
    unit: float
    rows: slice
    own: slice


@dataclass(frozen=True, slots=True)
class Placed:
    """stage: the first that is wrong; None if too little is handed out to say.    read: how each one was read."""

    stage: str | None
    read: dict[str, str] = field(default_factory=dict)

    @property
    def is_seen(self) -> bool:
        """Whether one that is handed out is wrong itself, and not by elimination."""
        return any(how.startswith("wrong") for how in self.read.values())


@dataclass(frozen=True, slots=True, eq=False)
class Looked:
    """What is wrong, and by whom it was judged.

    outputs: [M, H] of each rank, as `compare` takes them.    wrong_RM: bool.    exact: its router rounds where the page
    says; who writes a layer outside may round its logits, scores and weights to the dtype.    many: what only many rows
    together show is wrong too.
    """

    given: Problem
    outputs: Sequence[Tensor]
    wrong_RM: Tensor
    grid: Grid
    precision: RouterPrecision
    exact: bool
    many: bool = False


# By form, what each rank's tensor, or its group's sum, is in units of y: [M, H], the law's rows where it has none.
_Forms = dict[str, list[Tensor]]


def first_wrong(looked: Looked, ranks: Sequence[Handed]) -> Placed:
    """The first stage of a wrong output that is wrong itself, of those that the ranks hand out.

    Behind them, if all are right: "sum" of R and S, "reduction" of the sum, or "output" if nothing else is left.
    Tensors of another shape, and parts that some rank does not hand out, are passed over.
    """
    read: dict[str, str] = {}
    apart = _apart(ranks)
    for name, right in _ROUTING.items():
        told = [each for rank in apart if (each := _routing_of(looked.given, rank, name)) is not None]
        if name == "topk_ids" and any(_other_number(looked, rank) for rank in apart):
            return Placed(name, read | {name: "wrong, another number of experts"})
        if told:
            wrong = [not right(looked, rank, rows, found) for rank, rows, found in told]
            read[name] = "wrong" if any(wrong) else "right"
            if any(wrong):
                return Placed(name, read)
    forms: dict[str, _Forms] = {}
    for name in ("routed", "shared", "routed_reduced", "shared_reduced", "sum", "reduction"):
        seen = _forms(looked, ranks, name)
        if seen is None:
            continue
        found, factor = seen
        if name in ("routed_reduced", "shared_reduced", "reduction"):
            found.pop(_PARTS, None)
        read[name] = f"right, {' or '.join(found)}{_times(looked, factor)}" if found else "wrong"
        if not found:
            return Placed(_behind(looked, forms, _failed(name, forms)), read)
        forms[name] = found
    left = _left_over(looked, ranks, forms)
    return Placed(left and _behind(looked, forms, left), read)


# ---- the router


def _apart(ranks: Sequence[Handed]) -> list[Handed]:
    """Without those that tell of their router, to the bit, what one before them tells of the same tokens."""
    kept: list[Handed] = []
    for rank in ranks:
        if not any(rank.rows == other.rows and rank.own == other.own and _same_routing(rank, other) for other in kept):
            kept.append(rank)
    return kept


def _same_routing(one: Handed, other: Handed) -> bool:
    if one.factors != other.factors or one.tensors.keys() != other.tensors.keys():
        return False
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in _ROUTING if name in one.tensors)


def _routing_of(given: Problem, rank: Handed, name: str) -> tuple[Handed, slice, Tensor] | None:
    """A rank's tensor with its rows, if it has the shape of the law's."""
    found, law = rank.tensors.get(name), _law_of(given, name)
    rows = None if found is None or found.shape[1:] != law.shape[1:] else _rows(given, rank, found)
    return None if found is None or rows is None else (rank, rows, found)


def _other_number(looked: Looked, rank: Handed) -> bool:
    """Whether a token has more or fewer experts. Layers from outside may append slots of shared experts to them."""
    found, law_MK = rank.tensors.get("topk_ids"), looked.given.stages.topk_ids_MK
    if found is None or _rows(looked.given, rank, found) is None or not looked.exact:
        return False
    return found.shape[1] != law_MK.shape[1]


def _law_of(given: Problem, name: str) -> Tensor:
    stages = given.stages
    routing = {"logits": stages.logits_ME, "scores": stages.scores_ME, "topk_ids": stages.topk_ids_MK}
    return (routing | {"topk_weights": stages.topk_weights_MK}).get(name, stages.output_MH)


def _rows(given: Problem, rank: Handed, found: Tensor) -> slice | None:
    """Which tokens a tensor's rows are: the rank's, its share of them, or those of all ranks."""
    everything = slice(0, len(given.stages.output_MH))
    fitting = (rows for rows in (rank.rows, rank.own, everything) if rows.stop - rows.start == len(found))
    return next(fitting, None)


def _logits_right(looked: Looked, rank: Handed, rows: slice, found_mE: Tensor) -> bool:
    law_ME = looked.given.stages.logits_ME
    delta_ME = _logits_error(looked.given, looked.precision, looked.exact)
    return bool(((found_mE.double() - law_ME[rows]).abs() <= delta_ME[rows]).all())


@functools.lru_cache(maxsize=16)
def _logits_error(given: Problem, precision: RouterPrecision, exact: bool) -> Tensor:
    """What logits may be off by, [M, E]: roundings of the products, of their sum and, where a norm comes first, of it."""
    x_MH, half = given.tokens.hidden_states.double().abs(), torch.finfo(given.dtype).eps / 2
    weight_EH, epsilon = given.exact["router_weight"].abs(), given.spec.routing.router_norm_epsilon
    if epsilon is not None:
        x_MH = x_MH * torch.rsqrt(x_MH.square().mean(-1, keepdim=True) + epsilon) * x_MH.shape[1] ** -0.5
        x_MH = x_MH * given.exact["router_scale"].abs()
    addends_ME = x_MH @ weight_EH.T
    if given.spec.vision is not None:
        addends_ME = torch.maximum(addends_ME, x_MH @ given.exact["vision_router_weight"].abs().T)
    u = half if precision.logits == "model" else 2.0**-24
    error_ME = _LOGITS * u * (given.stages.logits_ME.abs() if exact else addends_ME)
    error_ME = error_ME + x_MH.shape[1] * 2.0**-24 * addends_ME
    if epsilon is None:
        return error_ME
    spread_ME = (x_MH.square() @ weight_EH.square().T).sqrt()  # each number of the token is rounded for itself
    return error_ME + half * (_NORMED * spread_ME if exact else _LOGITS * addends_ME)


def _scores_right(looked: Looked, rank: Handed, rows: slice, found_mE: Tensor) -> bool:
    """Scores are held to those that the rank's own logits give, if it tells them."""
    given, (logits_mE, delta_mE) = looked.given, _logits_of(looked, rank, rows)
    law_mE = torch.empty_like(logits_mE)
    for routing, rows_m in _branches(given, rows):
        law_mE[rows_m] = moe.score(logits_mE[rows_m], routing)
    u = _unit(looked, looked.precision.scores, found_mE)
    off_mE = law_mE.abs() * (2 * delta_mE + _WEIGHTS * u + _exponent(logits_mE)) + torch.finfo(given.dtype).tiny
    return bool(((found_mE.double() - law_mE).abs() <= off_mE).all())


def _ids_right(looked: Looked, rank: Handed, rows: slice, found_mK: Tensor) -> bool:
    decided_m = ~near_ties(looked.given, looked.precision)[rows]
    return _same_sets(found_mK[decided_m], looked.given.stages.topk_ids_MK[rows][decided_m])


def _same_sets(found_MK: Tensor, law_MK: Tensor) -> bool:
    return torch.equal(found_MK.sort(-1).values.long(), law_MK.sort(-1).values)


def _weights_right(looked: Looked, rank: Handed, rows: slice, found_mK: Tensor) -> bool:
    """By expert, and as the rank's own logits give them; with s or without where the layer does not say."""
    given, told = looked.given, _routing_of(looked.given, rank, "topk_ids")
    if told is None or told[1] != rows:
        return True  # whose weight is whose cannot be told
    ids_mK, (logits_mE, delta_mE) = told[2].long(), _logits_of(looked, rank, rows)
    law_mK, same_m = torch.zeros(ids_mK.shape, dtype=torch.float64), torch.zeros(len(ids_mK), dtype=torch.bool)
    for routing, rows_m in _branches(given, rows):
        prefix = "" if routing is given.spec.routing else "vision_"
        bias_E = given.exact.get(f"{prefix}e_score_correction_bias") if routing.correction_bias else None
        chosen = moe.select_experts(logits_mE[rows_m], moe.score(logits_mE[rows_m], routing), bias_E, routing)
        weights_mK = chosen.topk_weights_MK
        if routing.per_expert_scale:
            weights_mK = weights_mK * given.exact[f"{prefix}per_expert_scale"][chosen.topk_ids_MK]
        order_mK = chosen.topk_ids_MK.argsort(-1)
        law_mK[rows_m] = weights_mK.gather(1, order_mK)
        same_m[rows_m] = (chosen.topk_ids_MK.gather(1, order_mK) == ids_mK[rows_m].sort(-1).values).all(-1)
    same_m &= ~near_ties(given, looked.precision)[rows]
    found_mK = found_mK.double().gather(1, ids_mK.argsort(-1))
    u = max(_unit(looked, kept, found_mK) for kept in (looked.precision.scores, looked.precision.weights))
    off_m1 = 2 * delta_mE.amax(-1, keepdim=True) + _WEIGHTS * u + _exponent(logits_mE)
    limit_mK = off_m1 * law_mK.abs().amax(-1, keepdim=True)
    factors = _factors(looked, rank, "topk_weights")
    return any(bool(((found_mK / factor - law_mK).abs() <= limit_mK)[same_m].all()) for factor in factors)


def _logits_of(looked: Looked, rank: Handed, rows: slice) -> tuple[Tensor, Tensor]:
    """The rank's own logits, found right, which are exact; else the law's and what they may be off by. Both [m, E]."""
    told = _routing_of(looked.given, rank, "logits")
    if told is not None and told[1] == rows:
        logits_mE = told[2].double()
        return logits_mE, torch.zeros_like(logits_mE)
    delta_ME = _logits_error(looked.given, looked.precision, looked.exact)
    return looked.given.stages.logits_ME[rows], delta_ME[rows]


def _branches(given: Problem, rows: slice) -> Iterator[tuple[Routing, Tensor]]:
    """Which of the rows follow which rule."""
    is_vision = given.tokens.is_vision
    if given.spec.vision is None or is_vision is None:
        yield given.spec.routing, torch.ones(rows.stop - rows.start, dtype=torch.bool)
        return
    yield given.spec.routing, ~is_vision[rows]
    yield given.spec.vision.routing, is_vision[rows]


def _unit(looked: Looked, kept: str, found: Tensor) -> float:
    """Half a unit of the dtype in which numbers are kept."""
    half = not looked.exact or kept == "model"
    return float(torch.finfo(looked.given.dtype).eps / 2) if half else 2.0**-24


def _exponent(logits_mE: Tensor) -> Tensor:
    """What an exponential adds whose argument is rounded to fp32, [m, 1]."""
    return 2.0**-22 * logits_mE.abs().amax(-1, keepdim=True)


_ROUTING: dict[str, Callable[[Looked, Handed, slice, Tensor], bool]] = {
    "logits": _logits_right,
    "scores": _scores_right,
    "topk_ids": _ids_right,
    "topk_weights": _weights_right,
}


# ---- the parts


def _factors(looked: Looked, rank: Handed, name: str) -> list[float]:
    """How often a tensor may count the law's: as the layer says, else with s or without, in the output's unit or not."""
    if name in rank.factors:
        return [rank.factors[name]]
    s = looked.given.spec.scale
    if name in ("topk_weights", "routed", "routed_reduced"):
        return list(dict.fromkeys((1.0, s)))
    return list(dict.fromkeys((1.0, rank.unit)))


def _times(looked: Looked, factor: float) -> str:
    """How often a stage counts the law's, if not once."""
    s = looked.given.spec.scale
    return {s: ", times s", 1 / s: ", times 1/s", 1.0: ""}.get(factor, f", times {factor:g}")


def _forms(looked: Looked, ranks: Sequence[Handed], name: str) -> tuple[_Forms, float] | None:
    """In which forms a stage is right on all ranks, and times what; None where it is not handed out."""
    given, law_MH = looked.given, looked.given.stages.output_MH
    told = [_routing_of(given, rank, name) for rank in ranks]
    if any(each is None for each in told):
        return None
    if name.startswith(("routed", "shared")):
        part = name.removesuffix("_reduced")
        if part == "shared" and given.spec.shared is None:
            return None
        if given.spec.routing.num_zero_experts and part == "routed":
            return None  # the zero experts' part may be inside
        given = _alone(given, part)
        law_MH = given.stages.output_MH
    times = {"routed": given.spec.scale, "shared": 1.0}.get(name.removesuffix("_reduced"), given.spec.output.share)
    seen = [each for each in told if each is not None]
    for factor in _factors(looked, ranks[0], name):
        right: _Forms = {}
        whole = [_placed(law_MH, rows, found.double() * (times / factor)) for _, rows, found in seen]
        if not _wrong(given, looked, whole):
            right[_EVERY] = whole
        rows = [each for _, each, _ in seen]
        if len(_groups(looked.grid, rows)) < len(rows):
            summed = _summed(law_MH, [found.double() * (times / factor) for _, _, found in seen], rows, looked.grid)
            if not _wrong(given, looked, summed):
                right[_PARTS] = summed
        if right:
            return right, factor
    return {}, 1.0


def _placed(law_MH: Tensor, rows: slice, found_mH: Tensor) -> Tensor:
    whole_MH = law_MH.clone()
    whole_MH[rows] = found_mH
    return whole_MH


def _summed(law_MH: Tensor, found: Sequence[Tensor], rows: Sequence[slice], grid: Grid) -> list[Tensor]:
    """For each rank what the ranks with the same tokens hold together."""
    totals: dict[int, Tensor] = {}
    for group in _groups(grid, rows):
        total_mH = torch.stack([found[rank] for rank in group]).sum(0)
        totals |= dict.fromkeys(group, _placed(law_MH, rows[group[0]], total_mH))
    return [totals[rank] for rank in range(len(rows))]


def _groups(grid: Grid, rows: Sequence[slice]) -> list[list[int]]:
    """The ranks whose tensors are of the same tokens: all of them, or the tp ranks of a data-parallel rank."""
    by_rows: dict[tuple[int, int, int], list[int]] = {}
    everything = len({(each.start, each.stop) for each in rows}) == 1
    for rank, each in enumerate(rows):
        key = (0 if everything else rank // grid.tp, each.start, each.stop)
        by_rows.setdefault(key, []).append(rank)
    return list(by_rows.values())


def _wrong(given: Problem, looked: Looked, outputs: Sequence[Tensor]) -> bool:
    if _far_off(given, looked, outputs):
        return True
    compared = compare(given, outputs, ways(looked.given.spec, looked.grid), looked.precision)
    return compared.wrong or (looked.many and compared.projection is not None)


def _far_off(given: Problem, looked: Looked, outputs: Sequence[Tensor]) -> bool:
    """Whether a row without a near tie is so wrong that no error analysis, which takes milliseconds, has to be asked."""
    law_MH, naive_M = given.stages.output_MH, given.naive_error(ways(given.spec, looked.grid), looked.precision)
    limit_M = torch.maximum(_FAR[0] * naive_M, _FAR[1] * law_MH.norm(dim=-1))
    far_RM = (torch.stack(list(outputs)) - law_MH).norm(dim=-1) > limit_M
    return bool((far_RM & ~near_ties(given, looked.precision)).any())


@functools.lru_cache(maxsize=16)
def _alone(given: Problem, part: str) -> Problem:
    """The layer with nothing but R, s included, or nothing but S; every token keeps its experts."""
    spec, stages = given.spec, given.stages
    zero_MH, output = torch.zeros_like(stages.output_MH), replace(spec.output, combine="sum")
    gone = ["fc2_latent_bias"]
    if part == "routed":
        spec, output_MH = replace(spec, shared=None, output=output), spec.scale * stages.routed_MH
        stages = replace(stages, shared_MH=zero_MH)
    else:
        spec, output_MH = replace(spec, output=output), stages.shared_MH
        stages, gone = replace(stages, routed_MH=zero_MH), [*gone, "w2", "b2"]
    weights, exact = (
        {n: torch.zeros_like(t) if n.removeprefix("vision_") in gone else t for n, t in stored.items()}
        for stored in (given.weights, given.exact)
    )
    stages = replace(stages, offset_H=torch.zeros_like(stages.offset_H), output_MH=output_MH)
    return replace(given, spec=spec, weights=weights, exact=exact, stages=stages, _errors={})


# ---- who is to blame


def _failed(name: str, forms: Mapping[str, _Forms]) -> str:
    """What went wrong where a name is, all before it being right: the sum, or a reduction that has or has not been."""
    if name in ("routed", "shared"):
        return name
    if name != "sum":
        return "reduction"
    met = [set(forms.get(f"{part}_reduced", forms.get(part, {}))) for part in ("routed", "shared")]
    return "reduction" if all(met) and not met[0] & met[1] else "sum"


def _behind(looked: Looked, forms: Mapping[str, _Forms], stage: str) -> str:
    """The stage, or the one before it that brought most of the error along, being itself just within its limits."""
    # a row on another legal route is far from the law's in every part
    rows_RM = looked.wrong_RM & ~near_ties(looked.given, looked.precision)
    if stage in ("routed", "shared") or not bool(rows_RM.any()):
        return stage
    looked = replace(looked, wrong_RM=rows_RM)
    output_NH = _error(looked, list(looked.outputs), looked.given.stages.output_MH)
    share, parts = looked.given.spec.output.share, {}
    for name in ("routed", "shared"):
        if name in forms:
            law_MH = _alone(looked.given, name).stages.output_MH
            parts[name] = share * _error(looked, next(reversed(forms[name].values())), law_MH)
    before = [(max(parts, key=lambda name: float(parts[name].norm())), sum(parts.values()))] if parts else []
    if stage != "sum" and "sum" in forms:
        found = next(reversed(forms["sum"].values()))
        before.append(("sum", _error(looked, found, looked.given.stages.output_MH)))
    for name, error_NH in before:
        if bool((output_NH - error_NH).norm() <= output_NH.norm() / 2):
            return name
    return stage


def _error(looked: Looked, found: Sequence[Tensor], law_MH: Tensor) -> Tensor:
    """Of the wrong rows of all ranks, [N, H]."""
    return (torch.stack(list(found)) - law_MH)[looked.wrong_RM]


def _left_over(looked: Looked, ranks: Sequence[Handed], forms: Mapping[str, _Forms]) -> str | None:
    """Everything handed out is right and the output is not."""
    given, grid = looked.given, looked.grid
    if "reduction" in forms:
        return "output"
    if "sum" in forms:
        return "reduction" if grid.tp > 1 else "output"
    due = {"routed", *({"shared"} if given.spec.shared is not None else set())}
    if not due <= forms.keys():
        return None
    if grid.ranks == 1:
        return "sum"
    rows = [rank.rows for rank in ranks]
    summed = _summed(
        given.stages.output_MH, [y[each] for y, each in zip(looked.outputs, rows, strict=True)], rows, grid
    )
    return None if _wrong(given, looked, summed) else "reduction"  # each rank's own sum, right but for being one
