"""From a wrong output to one sentence: what was counted how often, times what, on which rank, and why that happens.

First the algebra: the output of a rank is fitted by least squares on the known parts (R and S of each rank's shard,
biases, zero experts), and each coefficient is read as a product of s and tp. If no such sum explains the output, the
wrong laws of variants.py are tried, then single experts. What nothing explains is called unknown, with its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.errors import ranks_text
from harness.parts import LETTERS, Part, expert_parts, parts
from harness.problem import Problem
from harness.variants import Variant, variants
from reference.spec import RouterPrecision, SpecError

# A residual is explained away if it stays within this many times the naive runs' error, scaled by the largest factor.
_RESIDUAL_LIMIT = 6.0
# A coefficient is read as a symbol within this share of it (the dtype's own rounding of weights is common to a column).
_READING = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Choices nearer than this to a tie may fall either way in the dtype, so those rows convict no variant.
_TIE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """sentence: one line.    family: of the fault, None if unknown.    coefficients: part -> symbol ("s^2"), the same on
    all ranks, empty where the algebra does not apply.
    """

    sentence: str
    family: str | None
    stage: str = "output"
    coefficients: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """outputs: [M, H] float64 for each rank, in units of y.    wrong_RM: the rows that need an explanation."""

    given: Problem
    outputs: Sequence[Tensor]
    tp: int
    precision: RouterPrecision
    wrong_RM: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """One rank's factors by part. own_only: parts of which only the rank's own share counts.

    uneven: parts whose shares count differently, each rank's share with its symbol.
    """

    symbols: dict[str, str]
    own_only: frozenset[str]
    uneven: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        """'y = s*R + tp*S', R_own where only the rank's own share counts."""
        return f"y = {_formula(self)}"


def diagnose(evidence: Evidence) -> Diagnosis:
    """The cause of a mismatch in one sentence; never a guess: what does not fit is unknown."""
    plain = _plain_cause(evidence)
    if plain is not None:
        return plain
    readings = [read_algebra(evidence, rank) for rank in range(len(evidence.outputs))]
    told = [reading for reading in readings if reading is not None]
    if len(told) == len(readings) and told:
        lawful = law(evidence.given, evidence.tp)
        off = [rank for rank, reading in enumerate(told) if not _is_lawful(reading, lawful)]
        if off:
            return _algebra_sentence(evidence, told, off)
    return _variant_cause(evidence) or _expert_cause(evidence) or _unknown(evidence)


def _plain_cause(evidence: Evidence) -> Diagnosis | None:
    """What needs no arithmetic: not-a-number, infinity, all zeros."""
    bad = [r for r, output in enumerate(evidence.outputs) if not bool(output.isfinite().all())]
    if bad:
        output = evidence.outputs[bad[0]]
        rows = (~output.isfinite()).any(-1).nonzero()[:, 0]
        kind = "NaN" if bool(output.isnan().any()) else "infinity"
        return Diagnosis(
            f"{kind} in {len(rows)} of {len(output)} rows, first in token {int(rows[0])}, on {ranks_text(bad)}; "
            "the oracle is finite everywhere", "G5" if kind == "NaN" else "D12",
        )  # fmt: skip
    zero = [r for r, output in enumerate(evidence.outputs) if not bool(output.any())]
    if len(zero) == len(evidence.outputs):
        return Diagnosis(
            "y = 0 on every rank: nothing was computed or nothing was written",
            "A6",
            coefficients={"routed": "0", "shared": "0"},
        )
    return None


# ------------------------------------------------------------------------------------------------------- the algebra


def symbol_values(scale: float, tp: int) -> dict[str, float]:
    """The factors that faults produce, by name, the plainest first; names that coincide with an earlier one are left out."""
    named = {"1": 1.0, "0": 0.0}
    if scale != 1.0:
        named |= {"s": scale, "s^2": scale**2, "1/s": 1 / scale, "s^3": scale**3}
    if tp > 1:
        named |= {"tp": float(tp), "1/tp": 1 / tp, "tp^2": float(tp**2)}
        if scale != 1.0:
            named |= {
                "s*tp": scale * tp,
                "s/tp": scale / tp,
                "s^2*tp": scale**2 * tp,
                "tp/s": tp / scale,
                "s*tp^2": scale * tp**2,
            }
    named |= {"2": 2.0, "-1": -1.0, "1/2": 0.5}
    if scale != 1.0:
        named |= {"2*s": 2 * scale, "-s": -scale, "s/2": scale / 2}
    distinct: dict[str, float] = {}
    for name, value in named.items():
        if all(not math.isclose(value, other, rel_tol=1e-9, abs_tol=1e-12) for other in distinct.values()):
            distinct[name] = value
    return distinct


def law(given: Problem, tp: int) -> dict[str, str]:
    """The lawful symbol of each part that exists."""
    s = "s" if given.spec.scale != 1.0 else "1"
    return {part.name: s if part.scaled else "1" for part in parts(given, tp)}


def read_algebra(evidence: Evidence, rank: int) -> Reading | None:
    """Fit one rank's output on the parts; None if no sum of parts explains it within rounding.

    Whole parts first, then the rank's own share against the rest, then each rank's share: the fewest unknowns that do.
    """
    columns = parts(evidence.given, evidence.tp)
    for grouping in (_whole, _own_and_rest, _shares):
        reading = _fit(evidence, rank, grouping(columns, rank))
        if reading is not None:
            return reading
        if evidence.tp == 1:
            return None
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Column:
    """One unknown factor. shards: the ranks whose share it covers, None where every rank holds the part."""

    name: str
    shards: frozenset[int] | None
    value_MH: Tensor


def _whole(columns: Sequence[Part], rank: int) -> list[_Column]:
    return _joined(columns, lambda part: "")


def _own_and_rest(columns: Sequence[Part], rank: int) -> list[_Column]:
    return _joined(columns, lambda part: "own" if part.shard == rank else "rest")


def _shares(columns: Sequence[Part], rank: int) -> list[_Column]:
    return _joined(columns, lambda part: str(part.shard))


def _joined(columns: Sequence[Part], key: Callable[[Part], str]) -> list[_Column]:
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in columns:
        groups.setdefault((part.name, key(part)), []).append(part)
    joined = []
    for (name, _), members in groups.items():
        held = [part.shard for part in members if part.shard is not None]
        total = torch.stack([part.value_MH for part in members]).sum(0)
        joined.append(_Column(name, frozenset(held) if held else None, total))
    return joined


def _fit(evidence: Evidence, rank: int, columns: Sequence[_Column]) -> Reading | None:
    given, tp = evidence.given, evidence.tp
    target = evidence.outputs[rank] / given.spec.output.share
    if target.shape[0] == 0 or not columns or target.numel() < 2 * len(columns):
        return None
    matrix = torch.stack([column.value_MH.flatten() for column in columns], 1)
    solved = torch.linalg.lstsq(matrix, target.flatten()[:, None], driver="gelsd").solution[:, 0]
    naive_M = given.naive_error(tp, evidence.precision) / given.spec.output.share
    residual_M = (target - (matrix @ solved).view_as(target)).norm(dim=-1)
    growth = max(1.0, float(solved.abs().max()) / max(1.0, given.spec.scale))
    if not bool((residual_M <= _RESIDUAL_LIMIT * growth * (naive_M + naive_M.mean())).all()):
        return None
    noise = float(naive_M.norm()) * growth / math.sqrt(target.numel())
    spread = torch.linalg.pinv(matrix.T @ matrix).diagonal().clamp(min=0).sqrt() * noise
    if bool((6 * spread > 0.2).any()):
        return None  # the tokens do not determine every factor
    names = symbol_values(given.spec.scale, tp)
    read: dict[str, list[tuple[frozenset[int] | None, str]]] = {}
    for column, value, deviation in zip(columns, solved.tolist(), spread.tolist(), strict=True):
        read.setdefault(column.name, []).append((column.shards, _symbol(value, deviation, names, given.dtype)))
    return _read(read, rank, tp)


def _read(read: dict[str, list[tuple[frozenset[int] | None, str]]], rank: int, tp: int) -> Reading:
    symbols, own_only, uneven = {}, set(), {}
    mine = frozenset({rank})
    for name, factors in read.items():
        own = [symbol for shards, symbol in factors if shards == mine]
        others = {symbol for shards, symbol in factors if shards != mine}
        if len({symbol for _, symbol in factors}) == 1:
            symbols[name] = factors[0][1]
        elif own and others == {"0"}:
            symbols[name] = own[0]
            own_only.add(name)
        else:
            symbols[name] = "uneven"
            by_shard = {shard: symbol for shards, symbol in factors for shard in shards or ()}
            uneven[name] = tuple(by_shard.get(shard, "0") for shard in range(tp))
    return Reading(symbols, frozenset(own_only), uneven)


def _symbol(value: float, deviation: float, names: dict[str, float], dtype: torch.dtype) -> str:
    """The name of a factor within the noise of its measurement, else the number."""
    nearest = min(names, key=lambda name: abs(names[name] - value))
    reach = max(6 * deviation, _READING[dtype] * max(abs(names[nearest]), 0.05))
    return nearest if abs(names[nearest] - value) <= reach else f"{value:.3g}"


def _is_lawful(reading: Reading, lawful: dict[str, str]) -> bool:
    return not reading.own_only and not reading.uneven and all(reading.symbols[name] == lawful[name] for name in lawful)


@dataclass(frozen=True, slots=True)
class Cause:
    """A row of the table below. Symbols a part must have; "own" is the lawful symbol on the rank's own shard alone."""

    family: str
    symbols: dict[str, str]
    sentence: str


# Symbols are written for a layer with s; without one, s reads as 1. The first row that fits is the cause; "S" rows are
# skipped where the layer has no shared experts.
CAUSES = (
    Cause("B1", {"routed": "own", "shared": "own"}, "nothing is reduced: each rank returns its own partial sum"),
    Cause("B1", {"routed": "own"}, "the routed part is not reduced: each rank returns its own share of it"),
    Cause("B5", {"shared": "own"}, "the shared experts' output is left partial: each rank adds only its own share"),
    Cause("B2", {"routed": "s*tp", "shared": "tp"}, "everything is reduced twice (R, S x tp)"),
    Cause("B2", {"routed": "s*tp"}, "the routed part is reduced twice: what the kernel had reduced is reduced again (R x tp)"),
    Cause("B3", {"shared": "tp"}, "the shared experts' output is summed once per rank (S x tp): it was complete on every rank before the sum"),
    Cause("A1", {"routed": "s^2", "shared": "s"}, "the sum is scaled although R carried s already: s^2 on R, s on S"),
    Cause("A1", {"routed": "s^2"}, "the routed scaling factor is applied twice (s^2)"),
    Cause("A5", {"routed": "1", "shared": "1/s"}, "the fp16 form R + S/s is returned and its unit 1/s is not declared"),
    Cause("A3", {"routed": "s", "shared": "s"}, "the routed scaling factor multiplies the shared experts too: s*(R + S)"),
    Cause("A2", {"routed": "1"}, "the routed scaling factor is never applied"),
    Cause("A6", {"routed": "0"}, "the routed part is missing: an absent scaling factor read as 0, or a kernel that wrote nothing"),
    Cause("E2", {"shared": "1/s"}, "the shared experts' output is divided by s although R carries s"),
    Cause("E4", {"shared": "2"}, "the shared experts' output is added twice"),
    Cause("E3", {"shared": "0"}, "the shared experts' output is missing"),
    Cause("B10", {"expert bias": "s*tp"}, "the second expert bias is added on every rank (x tp)"),
    Cause("F5", {"expert bias": "0"}, "the second expert bias is dropped"),
    Cause("C4", {"latent bias": "tp"}, "the latent output projection runs before the sum over ranks: its bias is added tp times"),
    Cause("A3", {"latent bias": "s"}, "the routed scaling factor multiplies the bias of the latent projection"),
    Cause("F5", {"latent bias": "0"}, "the bias of the latent output projection is dropped"),
    Cause("B10", {"shared bias": "tp"}, "the second shared bias is added on every rank (x tp)"),
    Cause("F5", {"shared bias": "0"}, "the second shared bias is dropped"),
    Cause("A2", {"zero": "1"}, "the zero experts' part lacks the routed scaling factor"),
    Cause("B2", {"zero": "s*tp"}, "the zero experts' part is reduced although every rank holds all of it (Z x tp)"),
    Cause("sign", {"routed": "-s"}, "the output has the wrong sign"),
)  # fmt: skip


def _algebra_sentence(evidence: Evidence, readings: Sequence[Reading], off: Sequence[int]) -> Diagnosis:
    given, tp = evidence.given, evidence.tp
    lawful = law(given, tp)
    first = readings[off[0]]
    alike = [rank for rank in off if _same(readings[rank], first)]
    cause = _cause(first, lawful, given.spec.scale != 1.0)
    s_text = f"s={given.spec.scale:g}, " if given.spec.scale != 1.0 else ""
    where = "" if len(alike) == len(readings) else f" on {ranks_text(alike)}"
    formula = f"y = {_formula(first)} instead of {_formula(Reading(lawful, frozenset(), {}))}"
    why = cause.sentence if cause else _shards_text(first, lawful) or "no known cause has these factors"
    whole = {n: s for n, s in first.symbols.items() if n not in first.own_only and n not in first.uneven}
    coefficients = whole if len(alike) == len(readings) and not first.own_only and not first.uneven else {}
    return Diagnosis(
        f"{formula}{where} ({s_text}tp={tp}): {why}", cause.family if cause else None, "output", coefficients
    )


def _same(one: Reading, other: Reading) -> bool:
    return one.symbols == other.symbols and one.own_only == other.own_only and one.uneven == other.uneven


def _cause(reading: Reading, lawful: dict[str, str], has_scale: bool) -> Cause | None:
    for cause in CAUSES:
        wanted = {name: _without_s(symbol) if not has_scale else symbol for name, symbol in cause.symbols.items()}
        if not all(name in reading.symbols for name in wanted):
            continue
        if all(_matches(reading, name, symbol, lawful) for name, symbol in wanted.items()):
            deviates = [n for n in wanted if n in reading.own_only or reading.symbols[n] != lawful[n]]
            if deviates:
                return cause
    return None


def _matches(reading: Reading, name: str, wanted: str, lawful: dict[str, str]) -> bool:
    if wanted == "own":
        return name in reading.own_only and reading.symbols[name] == lawful[name]
    return name not in reading.own_only and reading.symbols[name] == wanted


def _without_s(symbol: str) -> str:
    return {"s": "1", "s*tp": "tp", "s^2": "s^2", "-s": "-1"}.get(symbol, symbol)


def _formula(reading: Reading) -> str:
    terms = []
    for name, symbol in reading.symbols.items():
        letter = LETTERS[name]
        if name in reading.own_only:
            letter += "_own"
        if name in reading.uneven:
            terms.append(f"[{', '.join(reading.uneven[name])}]*{letter}_r")
        elif symbol == "1":
            terms.append(letter)
        elif symbol != "0":
            terms.append(f"{symbol}*{letter}")
    return " + ".join(terms) or "0"


def _shards_text(reading: Reading, lawful: dict[str, str]) -> str | None:
    for name, symbols in reading.uneven.items():
        wrong = {shard: symbol for shard, symbol in enumerate(symbols) if symbol != lawful[name]}
        if wrong:
            told = ", ".join(f"rank {shard}'s share counted {symbol}" for shard, symbol in wrong.items())
            return f"{name}: {told} (expected {lawful[name]} each)"
    return None


# ------------------------------------------------------------------------------------- wrong laws and single experts

# Variants that explained an earlier mismatch, the latest first: one fault shows in many cases, and trying all laws is dear.
_recent: list[tuple[str, str]] = []


def _variant_cause(evidence: Evidence) -> Diagnosis | None:
    candidates = sorted(variants(evidence.given), key=lambda v: _recent_rank(v))
    for variant in candidates:
        ranks = _explained_by(evidence, variant)
        if ranks is None:
            continue
        key = (variant.family, variant.sentence)
        if key in _recent:
            _recent.remove(key)
        _recent.insert(0, key)
        where = "" if len(ranks) == len(evidence.outputs) else f" on {ranks_text(ranks)}"
        return Diagnosis(variant.sentence + where, variant.family, variant.stage)
    return None


def _recent_rank(variant: Variant) -> int:
    key = (variant.family, variant.sentence)
    return _recent.index(key) if key in _recent else len(_recent)


def _explained_by(evidence: Evidence, variant: Variant) -> list[int] | None:
    """The ranks whose wrong rows a variant explains, if it explains every wrong row that is no near tie."""
    given = evidence.given
    try:
        stages = variant.compute()
    except SpecError:
        return None  # this layer cannot get that rule wrong
    naive_M = given.naive_error(evidence.tp, evidence.precision)
    growth_M = (stages.output_MH.norm(dim=-1) / given.stages.output_MH.norm(dim=-1).clamp(min=1e-30)).clamp(min=1.0)
    limit_M = _RESIDUAL_LIMIT * growth_M * (naive_M + naive_M.mean())
    decided_M = torch.minimum(stages.margin_M, given.stages.margin_M) > _TIE[given.dtype]
    ranks = []
    for rank, output in enumerate(evidence.outputs):
        wrong_M = evidence.wrong_RM[rank]
        if not bool(wrong_M.any()):
            continue
        judged_M = decided_M if bool((wrong_M & decided_M).any()) else wrong_M
        if not bool(((output - stages.output_MH).norm(dim=-1) <= limit_M)[judged_M].all()):
            return None
        ranks.append(rank)
    return ranks


def _expert_cause(evidence: Evidence) -> Diagnosis | None:
    """Experts that count more or less often than their router weight says."""
    given, tp = evidence.given, evidence.tp
    routing = given.spec.routing
    if given.spec.vision is not None or routing.num_experts > 64 or routing.weight_on == "input":
        return None
    alone = [value for value in enumerate(expert_parts(given)) if bool(value[1].any())]
    rest = given.stages.output_MH / given.spec.output.share - given.spec.scale * given.stages.routed_MH
    matrix = torch.stack([value.flatten() for _, value in alone], 1)
    if not alone or matrix.shape[0] < 2 * matrix.shape[1]:
        return None
    naive_M = given.naive_error(tp, evidence.precision) / given.spec.output.share
    names = symbol_values(given.spec.scale, tp)
    told = []
    for output in evidence.outputs:
        target = output / given.spec.output.share - rest
        solved = torch.linalg.lstsq(matrix, target.flatten()[:, None], driver="gelsd").solution[:, 0]
        residual_M = (target - (matrix @ solved).view_as(target)).norm(dim=-1)
        if not bool((residual_M <= _RESIDUAL_LIMIT * (naive_M + naive_M.mean())).all()):
            return None
        noise = float(naive_M.norm()) / math.sqrt(target.numel())
        spread = torch.linalg.pinv(matrix.T @ matrix).diagonal().clamp(min=0).sqrt() * noise
        for (e, _), value, deviation in zip(alone, solved.tolist(), spread.tolist(), strict=True):
            symbol = _symbol(value, deviation, names, given.dtype)
            if symbol != ("s" if given.spec.scale != 1.0 else "1") and (e, symbol) not in told:
                told.append((e, symbol))
    if not told or len(told) > max(2, routing.num_experts // 4):
        return None
    experts = ", ".join(f"expert {e} counted {symbol}" for e, symbol in told)
    return Diagnosis(
        f"{experts} (expected {'s' if given.spec.scale != 1.0 else '1'}), all others right", "F7", "routed"
    )


def _unknown(evidence: Evidence) -> Diagnosis:
    given = evidence.given
    errors = torch.stack([(output - given.stages.output_MH).norm(dim=-1) for output in evidence.outputs])
    rank, row = divmod(int(errors.argmax()), errors.shape[1])
    relative = float(errors[rank, row] / given.stages.output_MH[row].norm().clamp(min=1e-30))
    wrong = int(evidence.wrong_RM.any(0).sum())
    return Diagnosis(
        f"unknown: neither a sum of the parts nor a wrong rule explains it; {wrong} of {errors.shape[1]} rows wrong, "
        f"worst token {row} on rank {rank}, off by {relative:.3g} of its length", None,
    )  # fmt: skip
