"""A factor that is a size of the grid may be a constant, or another size: what does the probe read on another grid?"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from harness.algebra import Evidence, Reading, named_factors, other_names
from harness.case import Case, Grid
from harness.causes import sizes_in
from harness.diagnose import Diagnosis, algebra_sentence
from harness.errors import UsageError
from harness.layout import Layout

# What a probe of a case says: "wrong", "exact" and so on, and the factor of each part, empty where there is none.
Asked = tuple[str, Mapping[str, str]]

_HINT = re.compile(r"; at [\w.]+=\d+ it could also be a factor of [^;:(]+, another [\w.]+ tells")


def told_apart(cause: Diagnosis, seen: Evidence, case: Case, ask: Callable[[Case], Asked]) -> Diagnosis:
    """The cause with the one factor that both grids have; without a name if the other grid reads something else.

    Left as it is where no factor is a size of the grid, or where the other grid shows no fault at all.
    """
    if not any(sizes_in(symbol, seen.layout) for symbol in cause.coefficients.values()):
        return cause
    for grid, dtype in itertools.product(_others(case), dict.fromkeys((case.dtype, "fp32"))):
        try:
            other = replace(case, grid=grid, dtype=dtype, tokens=0, split=None)
        except UsageError:
            continue
        verdict, symbols = ask(other)
        if verdict == "wrong" and symbols:
            return _confirmed(cause, seen, symbols, other)
        if verdict in ("exact", "rounded"):
            return cause
    return cause


def _others(case: Case) -> Iterator[Grid]:
    """Grids of the same kind whose sizes are neither 2 nor K nor each other."""
    grid, taken = case.grid, {2, case.spec.routing.top_k}
    for tp in (3, 5, 4) if grid.tp > 1 else (1,):
        for dp in (4, 5, 3) if grid.dp > 1 else (1,):
            ep = {1: 1, grid.ranks: tp * dp, grid.tp: tp, grid.dp: dp}.get(grid.ep)
            sizes = [size for size in (tp, dp) if size > 1]
            if ep is not None and len({*sizes, *taken}) == len(sizes) + len(taken):
                yield Grid(tp=tp, ep=ep, dp=dp, sp=tp if grid.sp > 1 else 1)


def _confirmed(cause: Diagnosis, seen: Evidence, symbols: Mapping[str, str], other: Case) -> Diagnosis:
    """symbols: by part, on the other grid."""
    layout = Layout(other.grid, None)
    here = named_factors(seen.given.spec.scale, seen.layout.sizes)
    common: dict[str, str] = {}
    for name, symbol in cause.coefficients.items():
        there = [symbols.get(name, ""), *other_names(symbols.get(name, ""), other.spec.scale, layout.sizes)]
        able = [each for each in there if each in here and math.isclose(here[each], here.get(symbol, math.nan))]
        if not able:
            break
        common[name] = symbol if symbol in able else able[0]
    sentence = _HINT.sub("", cause.sentence)
    if symbols.keys() != cause.coefficients.keys() or len(common) < len(symbols):
        return replace(cause, sentence=f"{sentence}; but {layout.text} reads otherwise", family=None)
    if common == cause.coefficients:
        return replace(cause, sentence=f"{sentence}, as it is at {layout.text}")
    told = algebra_sentence(seen, dict.fromkeys(range(len(seen.outputs)), Reading(common, frozenset(), {})))
    return replace(told, sentence=f"{_HINT.sub('', told.sentence)}, as it is at {layout.text}")
