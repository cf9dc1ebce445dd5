"""From factors to causes: one table from what a reading shows to what went wrong, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.algebra import Reading
from harness.errors import ranks_text


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
    Cause("B13", {"routed": "s/tp", "shared": "1/tp"}, "the ranks' partial sums are averaged instead of added (R, S / tp)"),
    Cause("B13", {"routed": "s/tp"}, "the routed part is averaged over the ranks instead of summed (R / tp)"),
    Cause("B13", {"shared": "1/tp"}, "the shared experts' output is divided by tp: averaged over the ranks instead of summed (S / tp)"),
    Cause("B3", {"shared": "tp"}, "the shared experts' output is summed once per rank (S x tp): it was complete on every rank before the sum"),
    Cause("A1", {"routed": "s^2", "shared": "s"}, "the sum is scaled although R carried s already: s^2 on R, s on S"),
    Cause("A1", {"routed": "s^2"}, "the routed scaling factor is applied twice (s^2)"),
    Cause("A5", {"routed": "1", "shared": "1/s"}, "the fp16 form R + S/s is returned and its unit 1/s is not declared"),
    Cause("A3", {"routed": "s", "shared": "s"}, "the routed scaling factor multiplies the shared experts too: s*(R + S)"),
    Cause("A3", {"routed": "1", "shared": "s"}, "the routed scaling factor multiplies the shared experts in place of the routed part"),
    Cause("A2", {"routed": "1"}, "the routed scaling factor is never applied"),
    Cause("H1", {"routed": "0", "shared": "0", "input": "1"}, "the layer returns its input"),
    Cause("A6", {"routed": "0", "shared": "0"}, "nothing was computed or nothing was written there"),
    Cause("E4", {"routed": "2*s", "shared": "2"}, "everything counts twice"),
    Cause("A6", {"routed": "0"}, "the routed part is missing: an absent scaling factor read as 0, weights of 0, or a kernel that wrote nothing"),
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
    Cause("sign", {"routed": "-s", "shared": "-1"}, "the output has the wrong sign"),
    Cause("sign", {"routed": "-s"}, "the routed part has the wrong sign"),
    Cause("sign", {"shared": "-1"}, "the shared experts' output has the wrong sign"),
    Cause("H1", {"input": "1"}, "the layer adds its input x: the residual belongs to the caller"),
    Cause("H1", {"input": "tp"}, "the layer adds its input x on every rank before the sum: the residual belongs to the caller"),
    Cause("H1", {"input": "s"}, "the layer adds its input x, scaled by s: the residual belongs to the caller"),
    Cause("H1", {"input": "-1"}, "the layer subtracts its input x: the residual belongs to the caller"),
    Cause("half", {"routed": "s/2", "shared": "1/2"}, "the parts are averaged instead of added"),
)  # fmt: skip


def find_causes(reading: Reading, lawful: dict[str, str], has_scale: bool) -> list[Cause]:
    """The first rows of CAUSES that fit the reading, each for parts that deviate and that no earlier row explains."""
    found: list[Cause] = []
    left = unexplained(reading, lawful, found)
    for cause in CAUSES:
        wanted = {name: _without_s(symbol) if not has_scale else symbol for name, symbol in cause.symbols.items()}
        if not all(name in reading.symbols for name in wanted) or not left & wanted.keys():
            continue
        if all(_matches(reading, name, symbol, lawful) for name, symbol in wanted.items()):
            if found and not wanted.keys() <= left:
                continue  # a second cause has parts of its own
            found.append(cause)
            left = unexplained(reading, lawful, found)
    return found


# Which part a bias goes with: multiplied or lost together, it needs no cause of its own.
_WITH = {"expert bias": "routed", "latent bias": "routed", "shared bias": "shared"}
# A factor of R by what a bias gets that the law does not scale.
_UNSCALED = {"s*tp": "tp", "s^2": "s", "s/tp": "1/tp", "1": "1/s", "-s": "-1", "2*s": "2", "s/2": "1/2"}


def unexplained(reading: Reading, lawful: dict[str, str], causes: Sequence[Cause]) -> set[str]:
    """The parts that deviate from the law and belong to none of the causes."""
    explained = {name for cause in causes for name in cause.symbols}
    left = set()
    for name, symbol in reading.symbols.items():
        owner, lawful_symbol = _WITH.get(name), lawful.get(name, "0")
        if name in explained or (symbol == lawful_symbol and name not in reading.own_only):
            continue
        if owner in explained:
            whole = reading.symbols[owner] if owner else ""
            if symbol in (whole, _UNSCALED.get(whole, whole)):
                continue
        left.add(name)
    return left


def _matches(reading: Reading, name: str, wanted: str, lawful: dict[str, str]) -> bool:
    if wanted == "own":
        return name in reading.own_only and reading.symbols[name] == lawful[name]
    return name not in reading.own_only and reading.symbols[name] == wanted


def _without_s(symbol: str) -> str:
    return {"s": "1", "s*tp": "tp", "s/tp": "1/tp", "s/2": "1/2", "2*s": "2", "-s": "-1"}.get(symbol, symbol)


def uneven_cause(readings: Sequence[Reading], lawful: dict[str, str]) -> Cause | None:
    """Why the shares of a part count differently, from the readings of all ranks; None where no pattern is known.

    A rank's row of counts says how often each rank's share is in its output: 1 as the law says, tp, or not at all.
    """
    names = [name for name in ("routed", "shared") if any(_deviates(reading, name, lawful) for reading in readings)]
    tables = [
        tuple(_counts(reading, name, lawful[name], rank) for rank, reading in enumerate(readings)) for name in names
    ]
    if not tables or any(table != tables[0] for table in tables):
        return None
    what = " and ".join({"routed": "R", "shared": "S"}[name] for name in names)
    return _alike(tables[0], what) if len(set(tables[0])) == 1 else _by_rank(tables[0], what)


def _deviates(reading: Reading, name: str, lawful: dict[str, str]) -> bool:
    return name in reading.uneven or name in reading.own_only or reading.symbols.get(name, "1") != lawful.get(name, "1")


def _counts(reading: Reading, name: str, lawful: str, rank: int) -> tuple[str, ...]:
    """How often each share counts, in units of what the law says: "1", "0", "2", "tp", or a symbol that is none of them."""
    units = {lawful: "1", "s*tp" if lawful == "s" else "tp": "tp", "2*s" if lawful == "s" else "2": "2"}
    if name in reading.own_only:
        own = units.get(reading.symbols[name], reading.symbols[name])
        return tuple(own if shard == rank else "0" for shard in range(reading.ranks))
    symbols = reading.uneven.get(name) or (reading.symbols[name],) * reading.ranks
    return tuple(units.get(symbol, symbol) for symbol in symbols)


def _alike(table: tuple[tuple[str, ...], ...], what: str) -> Cause | None:
    """All ranks return the same sum of shares, a wrong one."""
    counts = table[0]
    counted = [shard for shard, count in enumerate(counts) if count != "0"]
    lost = [shard for shard, count in enumerate(counts) if count == "0"]
    if len(counted) == 1 and counts[counted[0]] == "tp":
        return Cause(
            "F9", {}, f"every rank computes rank {counted[0]}'s share of {what}: the others' weights are never used"
        )
    if lost and {counts[shard] for shard in counted} == {"1"}:
        gave = "ranks gave nothing or the sum skips them" if len(lost) > 1 else "rank gave nothing or the sum skips it"
        return Cause("B8", {}, f"the share of {what} of {ranks_text(lost)} is missing: the {gave}")
    return None


def _by_rank(table: tuple[tuple[str, ...], ...], what: str) -> Cause | None:
    """Each rank returns another sum of shares."""
    ranks = range(len(table))
    rest = {count for rank in ranks for shard, count in enumerate(table[rank]) if shard != rank}
    own = {table[rank][rank] for rank in ranks}
    if rest == {"1"} and own in ({"2"}, {"tp"}):
        return Cause("B14", {}, f"each rank adds its own share of {what} again after the sum")
    if rest == {"1"} and own == {"0"}:
        return Cause("B14", {}, f"each rank lacks its own share of {what}, the others' are there")
    met = [tuple(shard for shard, count in enumerate(row) if count == "1") for row in table]
    complete = all(set(row) <= {"0", "1"} for row in table)
    if complete and all(rank in met[rank] and all(met[other] == met[rank] for other in met[rank]) for rank in ranks):
        groups = "; ".join(ranks_text(group) for group in dict.fromkeys(met))
        return Cause("B8", {}, f"{what} is summed over parts of the ranks, not over all of them: {groups}")
    return None


def uneven_shares(reading: Reading, lawful: dict[str, str]) -> str | None:
    """'rank 2's share counted 0', for a part whose shares count differently."""
    for name, symbols in reading.uneven.items():
        wrong = {shard: symbol for shard, symbol in enumerate(symbols) if symbol != lawful.get(name)}
        if wrong:
            told = ", ".join(f"rank {shard}'s share counted {symbol}" for shard, symbol in wrong.items())
            return f"{name}: {told} (expected {lawful.get(name, '0')} each)"
    return None
