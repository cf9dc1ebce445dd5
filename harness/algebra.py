"""Reads an output as a sum of the oracle's parts: which factor stands before each, as a product of s and sizes of the grid.

A least-squares fit in float64: on whole parts; on a rank's own share against the rest; on each share; on whole parts and
the layer's input, which the law does not add. Rows in which rounding may change the choice of experts take no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.compare import near_ties
from harness.layout import Layout
from harness.parts import LETTERS, Part, layer_input, parts, rank_shares
from harness.problem import Problem, ways
from reference.spec import RouterPrecision

# A residual counts as rounding within this many times the naive runs' error, scaled by the largest factor.
RESIDUAL_LIMIT = 6.0
# A part that is gone leaves less to round, and what stands in its place may be small: S of a small buffer, say.
_RESIDUAL_WITHOUT = 1.5
_GONE = 0.05
# A factor is read as a symbol within this share of it (the dtype's own rounding of weights is common to a column).
_READING = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """outputs: [M, H] float64 for each rank, in units of y; rows of other data-parallel ranks hold the law's values.

    held_RM: bool, the rows that a rank has.    wrong_RM: those that need an explanation.

    stages: what rank 0's layer tells of its call, where it tells anything: logits, topk_ids, topk_weights.
    columns_H: bool, the columns that are fitted, all by default.
    """

    given: Problem
    outputs: Sequence[Tensor]
    held_RM: Tensor
    layout: Layout
    precision: RouterPrecision
    wrong_RM: Tensor
    stages: Mapping[str, Tensor]
    columns_H: Tensor | None = None

    @property
    def tp(self) -> int:
        return self.layout.grid.tp

    @property
    def naive_M(self) -> Tensor:
        """float64 [M]: the unit of errors; that of the others where the naive run is not finite."""
        naive_M = self.given.naive_error(ways(self.given.spec, self.layout.grid), self.precision)
        finite_M = naive_M.isfinite()
        return naive_M if bool(finite_M.all()) else naive_M.where(finite_M, naive_M[finite_M].mean().nan_to_num(0.0))

    @property
    def decided_M(self) -> Tensor:
        """Bool [M]: rows whose choice of experts rounding cannot change; all rows if there are none."""
        decided_M = ~near_ties(self.given, self.precision)
        return decided_M if bool(decided_M.any()) else torch.ones_like(decided_M)

    @property
    def ranks_agree(self) -> bool:
        """Ranks with the same tokens return the same, but for rounding: what differs by rank has then met a collective
        after it.
        """
        limit_M, tp = 2 * self.naive_M, self.tp
        return all(
            bool(((output - self.outputs[rank - rank % tp]).norm(dim=-1) <= limit_M).all())
            for rank, output in enumerate(self.outputs)
        )

    @property
    def assembled_MH(self) -> Tensor:
        """The output of tp rank 0 of every data-parallel rank, each in its own rows."""
        whole_MH = self.outputs[0].clone()
        for rank in range(self.tp, len(self.outputs), self.tp):
            whole_MH[self.held_RM[rank]] = self.outputs[rank][self.held_RM[rank]]
        return whole_MH


@dataclass(frozen=True, slots=True)
class Reading:
    """One rank's factors by part. own_only: parts of which only the rank's own share counts.

    uneven: parts whose shares count differently, each share with its symbol, "?" where no token needs it.
    unread: those shares, of each part.
    """

    symbols: dict[str, str]
    own_only: frozenset[str]
    uneven: dict[str, tuple[str, ...]]
    unread: dict[str, frozenset[int]] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        """'y = s*R + tp*S', R_own where only the rank's own share counts."""
        return f"y = {formula(self)}"

    @property
    def is_symbolic(self) -> bool:
        """Every factor has a name; a bare number may be the best fit to something that is no sum of parts."""
        read = [symbol for name, symbol in self.symbols.items() if name != "input" or not symbol.isdecimal()]
        read += [symbol for symbols in self.uneven.values() for symbol in symbols]
        return all(symbol == "uneven" or not _is_number(symbol) for symbol in read)


def symbol_values(scale: float, sizes: Mapping[str, int]) -> dict[str, float]:
    """The factors that faults produce, by name, the plainest first; names that coincide with an earlier one are left out.

    sizes: of the grid, by name (`Layout.sizes`).
    """
    distinct: dict[str, float] = {}
    for name, value in named_factors(scale, sizes).items():
        if all(not _same_number(value, other) for other in distinct.values()):
            distinct[name] = value
    return distinct


def other_names(symbol: str, scale: float, sizes: Mapping[str, int]) -> list[str]:
    """Factors that are the same number by accident: at s = 16 and tp = 4, s/tp is tp."""
    named = named_factors(scale, sizes)
    if symbol not in named or symbol == "0":
        return []
    return [name for name, value in named.items() if name != symbol and _same_number(value, named[symbol])]


def _same_number(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=1e-9, abs_tol=1e-12)


def named_factors(scale: float, sizes: Mapping[str, int]) -> dict[str, float]:
    """All of them, those too that are one number by accident."""
    named = {"1": 1.0, "0": 0.0}
    if scale != 1.0:
        named |= {"s": scale, "s^2": scale**2, "1/s": 1 / scale, "s^3": scale**3}
    for name, size in sizes.items():
        named |= {name: float(size), f"1/{name}": 1 / size}
        if scale != 1.0:
            named |= {f"s*{name}": scale * size, f"s/{name}": scale / size}
    for name, size in sizes.items():
        named[f"{name}^2"] = float(size**2)
        if scale != 1.0:
            named |= {
                f"s^2*{name}": scale**2 * size,
                f"{name}/s": size / scale,
                f"s*{name}^2": scale * size**2,
            }
    named |= {"2": 2.0, "-1": -1.0, "1/2": 0.5}
    if scale != 1.0:
        named |= {"2*s": 2 * scale, "-s": -scale, "s/2": scale / 2}
    return named


def law(given: Problem) -> dict[str, str]:
    """The lawful symbol of each part that exists."""
    s = "s" if given.spec.scale != 1.0 else "1"
    return {part.name: s if part.scaled else "1" for part in parts(given)}


def lawful_reading(given: Problem) -> Reading:
    return Reading(law(given), frozenset(), {})


def is_lawful(reading: Reading, lawful: Reading) -> bool:
    if reading.own_only or reading.uneven:
        return False
    return all(symbol == lawful.symbols.get(name, "0") for name, symbol in reading.symbols.items())


def read_whole(evidence: Evidence, rank: int, rows_M: Tensor | None = None) -> Reading | None:
    """The factors of whole parts in one rank's output; None if no such sum explains it within rounding.

    rows_M: bool [M], the rows to be explained; without it all that are decided.
    """
    return _fit(evidence, rank, _whole(parts(evidence.given)), rows_M)


def read_with_input(evidence: Evidence, rank: int) -> Reading | None:
    """The same with the layer's input as one more part: a residual that belongs to the caller."""
    return _fit(evidence, rank, _whole((*parts(evidence.given), layer_input(evidence.given))), counts=("input",))


def read_shares(evidence: Evidence, rank: int, rows_M: Tensor | None = None) -> Reading | None:
    """The factors of each rank's share, where whole parts do not explain the output: own against rest, then each alone.

    Where all ranks return the same, no share is a rank's own, and only the second is asked.    rows_M: as in `read_whole`.
    """
    columns = rank_shares(evidence.given, evidence.layout)
    if not any(part.shard for part in columns):
        return None  # one rank holds all, or no share is a rank's own
    rows_M = evidence.decided_M & evidence.held_RM[rank] if rows_M is None else rows_M
    columns = tuple(part for part in columns if bool(part.value_MH[rows_M].any()))  # of the rest, no factor is told
    own = None if evidence.ranks_agree else _fit(evidence, rank, _own_and_rest(columns, rank, evidence.layout), rows_M)
    return own or _fit(evidence, rank, _shares(columns), rows_M, own=not evidence.ranks_agree)


def serves_nobody(evidence: Evidence, rank: int) -> bool:
    """Whether a rank of several has no expert that any of its tokens needs, so that nothing of R is its own."""
    if evidence.layout.grid.ep == 1:
        return False
    held_M, shares = evidence.held_RM[rank], rank_shares(evidence.given, evidence.layout)
    own = [part for part in shares if part.name == "routed" and part.shard == rank]
    return bool(shares) and not any(bool(part.value_MH[held_M].any()) for part in own)


def idle_ranks(evidence: Evidence) -> int:
    """How many ranks hold no expert that any token needs; 0 where that is not known."""
    shares = rank_shares(evidence.given, evidence.layout)
    busy = {part.shard for part in shares if part.name == "routed"}
    return evidence.layout.grid.ranks - len(busy) if evidence.layout.grid.ep > 1 and None not in busy and busy else 0


def explained_by(evidence: Evidence, symbols: Mapping[str, str]) -> bool:
    """Whether whole parts with these factors are what every rank returned, within the residual that a fit may leave."""
    given, named = evidence.given, named_factors(evidence.given.spec.scale, evidence.layout.sizes)
    addends = [named[symbols[part.name]] * part.value_MH for part in parts(given) if symbols.get(part.name) in named]
    if len(addends) < len(parts(given)):
        return False
    predicted_MH = given.spec.output.share * torch.stack(addends).sum(0)
    growth = max(1.0, max(abs(named[symbol]) for symbol in symbols.values()) / max(1.0, given.spec.scale))
    limit_M = RESIDUAL_LIMIT * growth * (evidence.naive_M + evidence.naive_M.mean())
    return all(
        bool(((output - predicted_MH).norm(dim=-1) <= limit_M)[held_M & evidence.decided_M].all())
        for output, held_M in zip(evidence.outputs, evidence.held_RM, strict=True)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Column:
    """One unknown factor. shards: the ranks whose share it covers, None where every rank holds the part."""

    name: str
    shards: frozenset[int] | None
    value_MH: Tensor


def _whole(columns: Sequence[Part]) -> list[_Column]:
    return _joined(columns, lambda part: "")


def _own_and_rest(columns: Sequence[Part], rank: int, layout: Layout) -> list[_Column]:
    return _joined(columns, lambda part: "own" if part.shard == layout.own(part.name, rank) else "rest")


def _shares(columns: Sequence[Part]) -> list[_Column]:
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


def _fit(
    evidence: Evidence,
    rank: int,
    columns: Sequence[_Column],
    rows_M: Tensor | None = None,
    *,
    own: bool = True,
    counts: Sequence[str] = (),
) -> Reading | None:
    """own: whether a rank's own share has a name.    counts: parts that may come in any whole number, once a rank say."""
    given, layout = evidence.given, evidence.layout
    rows = (evidence.decided_M & evidence.held_RM[rank] if rows_M is None else rows_M).nonzero()[:, 0]
    picked = slice(None) if evidence.columns_H is None else evidence.columns_H
    target = (evidence.outputs[rank][rows] / given.spec.output.share)[:, picked]
    columns = [column for column in columns if bool(column.value_MH[rows].any())]
    if target.shape[0] == 0 or not columns or target.numel() < 2 * len(columns):
        return None
    matrix = torch.stack([column.value_MH[rows][:, picked].flatten() for column in columns], 1)
    solved = torch.linalg.lstsq(matrix, target.flatten()[:, None], driver="gelsd").solution[:, 0]
    naive_M = evidence.naive_M[rows] / given.spec.output.share
    residual_M = (target - (matrix @ solved).view_as(target)).norm(dim=-1)
    growth = max(1.0, float(solved.abs().max()) / max(1.0, given.spec.scale))
    whole = len({column.name for column in columns}) == len(columns)  # of single shares, most are gone as a rule
    gone = whole and bool((solved.abs() < _GONE).any())
    limit = (_RESIDUAL_WITHOUT if gone else RESIDUAL_LIMIT) * growth
    if not bool((residual_M <= limit * (naive_M + naive_M.mean())).all()):
        return None
    noise = float(naive_M.norm()) * growth / math.sqrt(target.numel())
    spread = torch.linalg.pinv(matrix.T @ matrix).diagonal().clamp(min=0).sqrt() * noise
    if bool((6 * spread > 0.2).any()):
        return None  # the tokens do not determine every factor
    names = symbol_values(given.spec.scale, layout.sizes)
    read: dict[str, list[tuple[frozenset[int] | None, str]]] = {}
    whole_numbers = multiples(given.spec.scale, layout) if counts else names
    for column, value, deviation in zip(columns, solved.tolist(), spread.tolist(), strict=True):
        able = whole_numbers if column.name in counts else names
        read.setdefault(column.name, []).append((column.shards, fit_symbol(value, deviation, able, given.dtype)))
    return _read(read, rank if own else None, layout, law(given))


def multiples(scale: float, layout: Layout) -> dict[str, float]:
    """All factors, and whole numbers and as many times s up to the number of ranks: what each rank may add once."""
    named, ranks = symbol_values(scale, layout.sizes), range(2, layout.grid.ranks + 1)
    counts = {f"{n}": float(n) for n in ranks} | ({f"{n}*s": n * scale for n in ranks} if scale != 1.0 else {})
    return named | {n: v for n, v in counts.items() if not any(_same_number(v, other) for other in named.values())}


def _read(
    read: dict[str, list[tuple[frozenset[int] | None, str]]], rank: int | None, layout: Layout, lawful: dict[str, str]
) -> Reading:
    """rank: whose own shares are named as such; None where they mean nothing. A part that no row needs is lawful."""
    symbols, own_only, uneven, unread = dict(lawful), set(), {}, {}
    for name, factors in read.items():
        mine = None if rank is None else frozenset({layout.own(name, rank)})
        own = [symbol for shards, symbol in factors if mine is not None and shards == mine]
        others = {symbol for shards, symbol in factors if shards != mine}
        by_shard = {shard: symbol for shards, symbol in factors for shard in shards or ()}
        unread[name] = frozenset(range(layout.shares(name))) - by_shard.keys()
        if len({symbol for _, symbol in factors}) == 1:
            symbols[name] = factors[0][1]
        elif own and others == {"0"}:
            symbols[name] = own[0]
            own_only.add(name)
        else:
            symbols[name] = "uneven"
            uneven[name] = tuple(by_shard.get(shard, "?") for shard in range(layout.shares(name)))
    return Reading(symbols, frozenset(own_only), uneven, unread)


def fit_symbol(value: float, deviation: float, names: dict[str, float], dtype: torch.dtype) -> str:
    """The name of a factor within the noise of its measurement, else the number."""
    nearest = min(names, key=lambda name: abs(names[name] - value))
    reach = max(6 * deviation, _READING[dtype] * max(abs(names[nearest]), 0.05))
    if abs(names[nearest] - value) <= reach:
        return nearest
    number = f"{value:.3g}"
    return f"{value:.5g}" if number in names else number  # 1.004 is not 1


def formula(reading: Reading) -> str:
    """'s*R + tp*S'."""
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


def _is_number(symbol: str) -> bool:
    try:
        float(symbol)
    except ValueError:
        return False
    return symbol not in ("0", "1", "2", "-1")
