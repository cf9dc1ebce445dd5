"""Write the combinations of options that the main job tries: python -m tests.combinations > table

Every pair of values that some legal case has together stands in one row at least: greedy, the same each time. The table
is kept as data in harness/main_job.py; tests/test_main_job.py demands that it still covers every pair.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from harness.case import OPTIONS, Case, parse_grid
from harness.errors import UsageError
from harness.systems.runner import RunnerSystem

GRIDS = (
    "tp2",
    "tp4.ep2",
    "tp4.ep4",
    "dp2",
    "tp2.dp2",
    "tp2.ep2.dp2",
    "tp2.ep4.dp2",
    "ep3.dp3",
    "tp2.ep2.sp2",
    "tp2.ep4.dp2.sp2",
)
FACTORS: dict[str, tuple[str, ...]] = {"grid": GRIDS} | {
    name: values for name, (values, _) in OPTIONS.items() if name not in ("size", "s", "quant", "calls", "backend")
}
# a model that has all that options can name, and one without shared experts and without s
MODELS = ("deepseek_v3", "mixtral")

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def case_of(model: str, row: Row) -> Case | None:
    """The legal case of a row, or None. junk and pads keep seven tokens; unequal shares come from the grids."""
    options = {name: value for name, value in row.items() if name != "grid"}
    try:
        case = Case(model=model, grid=parse_grid(row["grid"]), **options)  # type: ignore[arg-type]
    except UsageError:
        return None
    return case if RunnerSystem().supports(case) is None else None


def pairs_of(row: Row) -> set[Pair]:
    return set(itertools.combinations(sorted(row.items()), 2))


def legal_pairs(model: str) -> set[Pair]:
    """All pairs that some legal row has: each is completed by defaults, and by single changes of them."""
    found: set[Pair] = set()
    default = {name: values[0] for name, values in FACTORS.items()}
    for one, other in itertools.combinations(FACTORS, 2):
        for a, b in itertools.product(FACTORS[one], FACTORS[other]):
            for grid in GRIDS:
                row = default | {"grid": grid, one: a, other: b}
                if case_of(model, row) is not None:
                    found.add(tuple(sorted([(one, a), (other, b)])))  # type: ignore[arg-type]
                    break
    return found


def rows(model: str) -> Iterator[Row]:
    """Rows that together have every legal pair."""
    rng = random.Random(0)
    left = legal_pairs(model)
    default = {name: values[0] for name, values in FACTORS.items()}
    while left:
        first = min(left)
        best: tuple[int, Row] | None = None
        for trial in range(60):
            row = default | dict(first)
            if "grid" not in dict(first):
                row["grid"] = GRIDS[trial % len(GRIDS)]
            if case_of(model, row) is None:
                continue
            free = [name for name in FACTORS if name not in dict(first) and name != "grid"]
            for name in rng.sample(free, len(free)):
                for value in rng.sample(FACTORS[name], len(FACTORS[name])):
                    changed = row | {name: value}
                    if case_of(model, changed) is not None and len(pairs_of(changed) & left) >= len(
                        pairs_of(row) & left
                    ):
                        row = changed
            gain = len(pairs_of(row) & left)
            if best is None or gain > best[0]:
                best = (gain, row)
        assert best is not None, first
        left -= pairs_of(best[1])
        yield best[1]


def main() -> None:
    for model in MODELS:
        print(f"# {model}")
        for row in rows(model):
            case = case_of(model, row)
            print(f'    "{str(case).partition("@")[2]}",')


if __name__ == "__main__":
    main()
