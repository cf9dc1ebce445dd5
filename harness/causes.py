"""From factors to causes: one table from what a reading shows to what went wrong, and the sentence that says so."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.algebra import Reading
from harness.errors import ranks_text
from harness.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
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
    Cause("H1", {"routed": "0", "input": "1"}, "the input x stands where R belongs"),
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


def find_causes(reading: Reading, lawful: dict[str, str], has_scale: bool, layout: Layout) -> list[Cause]:
    """The first rows of CAUSES that fit the reading, each for parts that deviate and that no earlier row explains."""
    found: list[Cause] = []
    left = unexplained(reading, lawful, found)
    for cause in _for_sizes(CAUSES, layout):
        wanted = {name: _without_s(symbol) if not has_scale else symbol for name, symbol in cause.symbols.items()}
        if not all(name in reading.symbols for name in wanted) or not left & wanted.keys():
            continue
        if all(_matches(reading, name, symbol, lawful) for name, symbol in wanted.items()):
            if found and not wanted.keys() <= left:
                continue  # a second cause has parts of its own
            found.append(cause)
            left = unexplained(reading, lawful, found)
    if "input" in left:
        times = f"times {reading.symbols['input']}"
        told = f"the layer adds its input x, {times}: the residual belongs to the caller"
        found.append(Cause("H1", {"input": reading.symbols["input"]}, told))
    return found


@functools.lru_cache(maxsize=64)
def _for_sizes(causes: tuple[Cause, ...], layout: Layout) -> tuple[Cause, ...]:
    """The table, and after it each row about tp once more for every other size of the grid."""
    rows = list(causes)
    for name in layout.sizes:
        if name == "tp":
            continue
        for cause in causes:
            if any("tp" in symbol for symbol in cause.symbols.values()):
                symbols = {part: symbol.replace("tp", name) for part, symbol in cause.symbols.items()}
                sentence = re.sub(r"\btp\b", name, cause.sentence).replace("once per rank", f"once per {_RANKS[name]}")
                if name == "moe.tp":
                    sentence = sentence.replace("on every rank", "with every piece of an expert")
                rows.append(Cause(cause.family, symbols, sentence))
    return tuple(rows)


_RANKS = {"dp": "dp rank", "ep": "ep rank", "ranks": "rank of the whole grid", "moe.tp": "piece of an expert"}


def sizes_in(symbol: str, layout: Layout) -> set[str]:
    """The sizes of the grid that a factor is made of: {'tp'} of 's*tp^2'."""
    return set(re.split(r"[*/^]", symbol)) & layout.sizes.keys()


# Which part a bias goes with: multiplied or lost together, it needs no cause of its own.
_WITH = {"expert bias": "routed", "latent bias": "routed", "shared bias": "shared"}


def _unscaled(symbol: str) -> str:
    """A factor of R by what a bias gets that the law does not scale."""
    return {"s^2": "s", "1": "1/s"}.get(symbol) or _without_s(symbol)


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
            if symbol in (whole, _unscaled(whole)):
                continue
        left.add(name)
    return left


def _matches(reading: Reading, name: str, wanted: str, lawful: dict[str, str]) -> bool:
    if wanted == "own":
        return name in reading.own_only and reading.symbols[name] == lawful[name]
    return name not in reading.own_only and reading.symbols[name] == wanted


def _without_s(symbol: str) -> str:
    """A symbol of the table as it reads in a layer without s."""
    if symbol in ("s/2", "2*s", "-s"):
        return {"s/2": "1/2", "2*s": "2", "-s": "-1"}[symbol]
    if symbol.startswith(("s*", "s/")):
        return symbol[2:] if symbol[1] == "*" else f"1{symbol[1:]}"
    return "1" if symbol == "s" else symbol


# the parts that are cut into shares, as a sentence calls them
_LETTERS = {"routed": "R", "shared": "S", "expert bias": "B"}


def uneven_causes(readings: Mapping[int, Reading], lawful: dict[str, str], layout: Layout) -> list[Cause]:
    """Why the shares of a part count differently, from the readings of all ranks; empty where no pattern is known.

    A rank's row of counts says how often each share is in its output: 1 as the law says, a size, or not at all.
    """
    names = [n for n in _LETTERS if any(_deviates(reading, n, lawful) for reading in readings.values())]
    wrong = {r: reading for r, reading in readings.items() if any(_deviates(reading, name, lawful) for name in names)}
    tables = [
        {rank: _counts(reading, name, lawful[name], rank, layout) for rank, reading in wrong.items()} for name in names
    ]
    letters = [_LETTERS[name] for name in names]
    if names == ["routed", "expert bias"] or (len(tables) == 2 and _same(tables[0], tables[1])):
        both = _pattern(tables[0], " and ".join(letters), names[0], layout)
        return [] if both is None else [both]
    found = [_pattern(table, letter, name, layout) for table, letter, name in zip(tables, letters, names, strict=True)]
    return [cause for cause in found if cause is not None] if None not in found else []


def _same(one: Mapping[int, tuple[str, ...]], other: Mapping[int, tuple[str, ...]]) -> bool:
    """Equal but for what one of both does not know."""
    pairs = [(one[rank], other[rank]) for rank in one]
    return all(len(a) == len(b) and _merged([a, b]) is not None for a, b in pairs)


def _pattern(table: Mapping[int, tuple[str, ...]], what: str, part: str, layout: Layout) -> Cause | None:
    merged = _merged(table.values())
    if merged is not None:
        return _alike(merged, what, part, layout)
    return _by_rank(table, what, part, layout)


def _merged(rows: Iterable[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The rows as one, if they are equal but for shares that one of them does not know."""
    known = [{count for count in column if count != "?"} for column in zip(*rows, strict=True)]
    if any(len(counts) > 1 for counts in known):
        return None
    return tuple(counts.pop() if counts else "?" for counts in known)


def _deviates(reading: Reading, name: str, lawful: dict[str, str]) -> bool:
    return name in reading.uneven or name in reading.own_only or reading.symbols.get(name, "1") != lawful.get(name, "1")


def _counts(reading: Reading, name: str, lawful: str, rank: int, layout: Layout) -> tuple[str, ...]:
    """How often each share counts, in units of what the law says: "1", "0", "2", a size's name, or another symbol."""
    units = {"s": "1", "2*s": "2", "1": "1/s", "s^2": "s", "-s": "-1"} if lawful == "s" else {}
    units |= {f"s*{size}" if lawful == "s" else size: size for size in layout.sizes}
    count = layout.shares(name)
    if name in reading.own_only:
        own = units.get(reading.symbols[name], reading.symbols[name])
        mine, unread = layout.own(name, rank), reading.unread.get(name, frozenset())
        return tuple(own if shard == mine else "?" if shard in unread else "0" for shard in range(count))
    symbols = reading.uneven.get(name) or (reading.symbols[name],) * count
    return tuple(units.get(symbol, symbol) for symbol in symbols)


def _alike(counts: tuple[str, ...], what: str, part: str, layout: Layout) -> Cause | None:
    """All ranks return the same sum of shares, a wrong one."""
    counted = [shard for shard, count in enumerate(counts) if count not in ("0", "?")]
    lost = [shard for shard, count in enumerate(counts) if count == "0"]
    instead = {counts[shard] for shard in counted}
    if lost and len(instead) == 1 and (count := instead.pop()) in layout.sizes:
        who = layout.holders(part, counted)
        if len(counted) == 1:
            return Cause(
                "F9", {}, f"every rank computes the share of {what} of {who}: the others' weights are never used"
            )
        return Cause(
            "F9", {}, f"the shares of {what} of {who} count {count} times, the others never: ranks hold each other's weights"
        )  # fmt: skip
    if lost and counted and {counts[shard] for shard in counted} == {"1"}:
        gave = "ranks gave nothing or the sum skips them" if len(lost) > 1 else "rank gave nothing or the sum skips it"
        held = layout.experts_text(lost) if part == "routed" else None
        which = f"{layout.holders(part, lost)}{f', with {held},' if held else ''}"
        family = "F5" if part == "expert bias" else "B8"
        gave += ", or no rank holds them" if held and "S" not in what and layout.are_whole(lost) else ""
        return Cause(family, {}, f"the share of {what} of {which} is missing: the {gave}")
    more = {counts[shard] for shard in counted} - {"1"}
    if not lost and "1" in counts and len(more) == 1 and (count := more.pop()) in {"2", *layout.sizes}:
        who = layout.holders(part, [shard for shard in counted if counts[shard] == count])
        return Cause("B2", {}, f"the share of {what} of {who} counts {count} times, the others once")
    for count, family, how in _ON_SHARES["S" if part == "shared" else "R"]:
        if set(counts) - {"?"} == {"1", count}:
            who = layout.holders(part, [shard for shard in counted if counts[shard] == count])
            return Cause(family, {}, how.format(f"the share of {what} of {who}"))
    return None


# What counts differently in some shares: the count, in units of the law's, the family, the sentence.
_ON_SHARES = {
    "R": (
        ("1/s", "A2", "the routed scaling factor misses {}"),
        ("s", "A1", "the routed scaling factor is applied twice to {}"),
        ("-1", "sign", "{} is subtracted"),
    ),
    "S": (
        ("1/s", "E2", "{} is divided by s"),
        ("s", "A3", "the routed scaling factor multiplies {}"),
        ("-1", "sign", "{} is subtracted"),
    ),
}


def _by_rank(table: Mapping[int, tuple[str, ...]], what: str, part: str, layout: Layout) -> Cause | None:
    """Each rank returns another sum of shares."""
    mine = {rank: layout.own(part, rank) for rank in table}
    rest = {count for rank, row in table.items() for shard, count in enumerate(row) if shard != mine[rank]} - {"?"}
    own = {row[mine[rank]] for rank, row in table.items()} - {"?"}
    if rest == {"1"} and (own == {"2"} or (len(own) == 1 and own <= layout.sizes.keys())):
        return Cause("B14", {}, f"each rank adds its own share of {what} again after the sum")
    if rest == {"1"} and own == {"0"} and layout.shares(part) > 2:  # of two ranks, one may return what is the other's
        return Cause("B14", {}, f"each rank lacks its own share of {what}, the others' are there")
    factors = (rest | own) - {"0"}
    if len(factors) != 1:
        return None
    factor = factors.pop()
    times = "" if factor == "1" else f", and counts {factor} times"
    if factor not in ("1", "2", *layout.sizes):
        return None
    table = {rank: tuple("1" if count == factor else count for count in row) for rank, row in table.items()}
    if rest == {"0"} and not times:
        family = "B5" if part == "shared" else "B1"
        return Cause(family, {}, f"{_is(what)} not reduced: each rank returns its own share of it")
    fits = {name: groups for name, groups in layout.groups().items() if part == "routed" and _meets(table, groups)}
    if fits:
        name, groups = next(iter(fits.items()))
        told = "; ".join(map(ranks_text, groups))
        return Cause(
            "B8", {}, f"{_is(what)} summed over {name} alone ({told}){times}: a sum over {layout.beside(name)} is missing"
        )  # fmt: skip
    met = {rank: tuple(shard for shard, count in enumerate(row) if count == "1") for rank, row in table.items()}
    if not times and all(
        mine[rank] in met[rank] and all(met[other] == met[rank] for other in met[rank] if other in met) for rank in met
    ):
        groups_text = "; ".join(layout.holders(part, group) for group in dict.fromkeys(met.values()))
        return Cause("B8", {}, f"{_is(what)} summed over parts of the ranks, not over all of them: {groups_text}")
    return None


def _is(what: str) -> str:
    return f"{what} {'are' if ' and ' in what else 'is'}"


def _meets(table: Mapping[int, tuple[str, ...]], groups: Sequence[tuple[int, ...]]) -> bool:
    """Whether each rank counts exactly its group, as far as its tokens tell."""
    mine = {rank: group for group in groups for rank in group}
    return all(
        count == "?" or (count == "1") == (shard in mine[rank])
        for rank, row in table.items()
        for shard, count in enumerate(row)
    )


def uneven_shares(reading: Reading, lawful: dict[str, str], layout: Layout) -> str | None:
    """'the share of rank 2 counted 0', for a part whose shares count differently."""
    for name, symbols in reading.uneven.items():
        wrong = {shard: symbol for shard, symbol in enumerate(symbols) if symbol not in (lawful.get(name), "?")}
        if wrong:
            told = ", ".join(f"the share of {layout.holders(name, [shard])} counted {s}" for shard, s in wrong.items())
            return f"{name}: {told} (expected {lawful.get(name, '0')} each)"
    return None
